"""What is asked of a build is read strictly, and what cannot be built is refused before it, with a reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddexport.engine.module import TensorRT
from ddexport.engine.options import (
    BuildOptions,
    OptionError,
    bytes_from_text,
    known_targets,
    profile_from_text,
    resolve,
    targets_from_text,
)
from ddexport.runtime.engines import Profile
from ddexport.runtime.machine import Gpu


def test_texts_are_read_or_refused() -> None:
    """Protects an hour of building from a slip in a number."""
    assert profile_from_text("1,4,8") == Profile(1, 4, 8)
    assert profile_from_text("16") == Profile(16, 16, 16)
    same = {targets_from_text(text) for text in ("sm80,sm89", "SM89, sm_80", "8.0,8.9", "80,89,sm80")}
    assert same == {("sm80", "sm89")}
    assert targets_from_text("sm120,sm89") == ("sm89", "sm120")  # by number, not by letter
    assert (targets_from_text("current"), targets_from_text("default")) == (("current",), ())
    assert bytes_from_text("4GB") == bytes_from_text("4g") == bytes_from_text("4 GiB") == 4 << 30
    assert (bytes_from_text("1.5k"), bytes_from_text("77"), bytes_from_text("77b")) == (1536, 77, 77)
    refused: dict[Any, tuple[str, ...]] = {
        profile_from_text: (
            "", "1,2", "4,1,8", "0,1,2", "-1,1,1", "a", "1,4,8,16", "1.5", "1,4,99999999",
        ),
        targets_from_text: ("", ",", "ada", "sm80,current", "sm8", "smx9", "12345"),
        bytes_from_text: ("", "4 apples", "-1GB", "GB", "1e3", "0"),
    }  # fmt: skip
    for read, texts in refused.items():
        for text in texts:
            with pytest.raises(OptionError):
                read(text)


def package(backend: str, gpu: Gpu | None, version: str = "11.4.0.1") -> TensorRT:
    """A package that only answers which GPUs it knows."""
    capability = SimpleNamespace(SM75=1, SM89=2, SM80=3, SM120=4, CURRENT=0, NONE=9)
    return TensorRT(backend, SimpleNamespace(ComputeCapability=capability), version, gpu)


def test_what_a_package_cannot_do_here_is_refused(a_gpu: Gpu, tmp_path: Path) -> None:
    """Protects against settings that TensorRT ignores, logs, or fails on after the build."""
    rtx, full = package("tensorrt-rtx", None, "1.7.1.116"), package("tensorrt", a_gpu)
    rows: list[tuple[TensorRT, dict[str, Any], str]] = [
        (rtx, {"version_compatible": True}, "lean runtime"),
        (rtx, {"hardware": "ampere+"}, "hardware-compatibility-level"),
        (rtx, {"timing_cache": Path("x")}, "no timing cache"),
        (rtx, {"targets": ("current",)}, "there is none"),
        (rtx, {"targets": ("sm89", "sm90")}, "cannot build for sm90"),
        (package("tensorrt-rtx", a_gpu), {"targets": ("current",)}, "cannot build for sm90"),
        (package("tensorrt", None), {}, "there is none"),
        (full, {"targets": ("sm80",)}, "GPU of this machine only"),
        (full, {"timing_cache": tmp_path / "none" / "x"}, "no folder"),
        (package("tensorrt", a_gpu, "8.6.1"), {}, "too old"),
    ]
    for trt, options, message in rows:
        with pytest.raises(OptionError, match=message) as caught:
            resolve(BuildOptions(**options), trt)
        assert caught.value.hint


def test_what_works_there_is_not_refused(a_gpu: Gpu) -> None:
    """Protects against refusing on the target machine what needs its GPU."""
    full, rtx = package("tensorrt", a_gpu), package("tensorrt-rtx", Gpu(0, "NVIDIA Ada", (8, 9), 1))
    wide = {"hardware": "ampere+", "version_compatible": True, "timing_cache": Path("x")}
    rows: list[tuple[TensorRT, dict[str, Any], str]] = [
        (full, {}, "sm90"), (full, {"targets": ("current",)}, "sm90"), (full, wide, "sm90"),
        (rtx, {}, "default"), (rtx, {"targets": ("current",)}, "sm89"), (rtx, {"targets": ("sm75",)}, "sm75"),
    ]  # fmt: skip
    for trt, options, target in rows:
        resolved = resolve(BuildOptions(**options), trt)
        assert resolved == BuildOptions(**options | {"targets": (target,)})


@pytest.mark.tensorrt
def test_the_real_package_knows_these_gpus(without_gpu: TensorRT) -> None:
    """Protects against a release that renames what the options are mapped to."""
    assert {"sm80", "sm86", "sm89", "sm120"} <= set(known_targets(without_gpu))
