"""What is asked of a build is read strictly, and what cannot be built is refused before it, with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddexport.engine.module import TensorRT
from ddexport.engine.options import (
    BuildOptions,
    OptionError,
    bytes_from_text,
    profile_from_text,
    resolve,
    targets_from_text,
)
from ddexport.runtime.engines import Profile
from ddexport.runtime.machine import Gpu


def test_texts_are_read_or_refused() -> None:
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


@pytest.mark.tensorrt
def test_what_a_package_cannot_do_here_is_refused(without_gpu: TensorRT, a_gpu: Gpu, tmp_path: Path) -> None:
    """Settings that TensorRT ignores, logs, or fails on after the build; and nothing that works there. Full
    TensorRT, a data-centre GPU (sm90) and a desktop GPU (sm89) are made up, TensorRT-RTX is real."""
    rtx, ada = without_gpu, replace(without_gpu, gpu=Gpu(0, "NVIDIA Ada", (8, 9), 1))
    full = replace(rtx, backend="tensorrt", version="11.4.0.1", gpu=a_gpu)
    refused: list[tuple[TensorRT, dict[str, Any], str]] = [
        (rtx, {"version_compatible": True}, "lean runtime"),
        (rtx, {"hardware": "ampere+"}, "hardware-compatibility-level"),
        (rtx, {"timing_cache": Path("x")}, "timing cache"),
        (rtx, {"targets": ("current",)}, "none"),
        (rtx, {"targets": ("sm89", "sm90")}, "sm90"),
        (replace(rtx, gpu=a_gpu), {"targets": ("current",)}, "sm90"),
        (replace(full, gpu=None), {}, "none"),
        (full, {"targets": ("sm80",)}, "this machine"),
        (full, {"timing_cache": tmp_path / "none" / "x"}, "folder"),
        (replace(full, version="8.6.1"), {}, "too old"),
    ]
    for trt, options, reason in refused:
        with pytest.raises(OptionError, match=reason):
            resolve(BuildOptions(**options), trt)
    wide = {"hardware": "ampere+", "version_compatible": True, "timing_cache": Path("x")}
    accepted: list[tuple[TensorRT, dict[str, Any], tuple[str, ...]]] = [
        (full, {}, ("sm90",)), (full, {"targets": ("current",)}, ("sm90",)), (full, wide, ("sm90",)),
        (ada, {}, ("default",)), (ada, {"targets": ("current",)}, ("sm89",)),
        (ada, {"targets": ("sm80", "sm86", "sm120")}, ("sm80", "sm86", "sm120")),
    ]  # fmt: skip
    for trt, options, targets in accepted:
        assert resolve(BuildOptions(**options), trt) == BuildOptions(**options | {"targets": targets})
