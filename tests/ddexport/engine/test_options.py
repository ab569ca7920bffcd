"""What is asked of a build is read strictly, and what cannot be built is refused before it, with a reason."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddexport.engine.checks import REFUSALS, check_options, check_targets, known_targets
from ddexport.engine.module import TensorRT
from ddexport.engine.options import (
    BuildOptions,
    OptionError,
    bytes_from_text,
    profile_from_text,
    targets_from_text,
)
from ddexport.runtime.engines import Profile
from ddexport.runtime.machine import Gpu

FLAGS = ("TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT", "WEIGHT_STREAMING", "SPARSE_WEIGHTS")


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
        bytes_from_text: ("", "4 apples", "-1GB", "GB", "1e3"),
    }  # fmt: skip
    for read, texts in refused.items():
        for text in texts:
            with pytest.raises(OptionError):
                read(text)


def test_senseless_options_are_refused_and_all_are_in_the_key() -> None:
    """Protects the builder: TensorRT only logs some of these; and the key, from a forgotten option."""
    for wrong in (
        {"profiles": ()}, {"workspace": 0}, {"optimization_level": 6}, {"optimization_level": -1},
        {"hardware": "x"},
    ):  # fmt: skip
        with pytest.raises(OptionError):
            BuildOptions(**wrong)  # type: ignore[arg-type]
    elsewhere = {"profiles", "targets", "hardware", "version_compatible", "timing_cache"}
    base = BuildOptions().canonical()
    assert set(base) == {field.name for field in fields(BuildOptions)} - elsewhere
    for name, value in base.items():
        changed = replace(BuildOptions(), **{name: True if value is False else 1})  # type: ignore[arg-type]
        assert changed.canonical() != base, name


def package(backend: str, gpu: Gpu | None, version: str = "11.4.0.1", flags: Any = FLAGS) -> TensorRT:
    """A package that only answers which names it has."""
    module = SimpleNamespace(
        BuilderFlag=SimpleNamespace(**{flag: flag for flag in flags}),
        ComputeCapability=SimpleNamespace(SM75=1, SM89=2, SM80=3, SM120=4, CURRENT=0, NONE=9),
    )
    return TensorRT(backend, module, version, gpu)


def test_what_a_package_cannot_do_here_is_refused(a_gpu: Gpu, tmp_path: Path) -> None:
    """Protects against settings that TensorRT ignores, logs, or fails on after the build."""
    rtx, full = package("tensorrt-rtx", None, "1.7.1.116"), package("tensorrt", a_gpu)
    old = package("tensorrt", a_gpu, flags=("TF32",))
    rows: list[tuple[TensorRT, dict[str, Any], str]] = [
        (rtx, {"version_compatible": True}, "lean runtime"),
        (rtx, {"hardware": "ampere+"}, "hardware-compatibility-level"),
        (rtx, {"timing_cache": Path("x")}, "no timing cache"),
        (rtx, {"refittable": True}, "refittable engines only where"),
        (rtx, {"strip_plan": True}, "without weights only where"),
        (rtx, {"targets": ("current",)}, "there is none"),
        (rtx, {"targets": ("sm89", "sm90")}, "cannot build for sm90"),
        (package("tensorrt-rtx", a_gpu), {"targets": ("current",)}, "cannot build for sm90"),
        (package("tensorrt", None), {}, "there is no GPU"),
        (full, {"targets": ("sm80",)}, "GPU of this machine only"),
        (full, {"timing_cache": tmp_path / "none" / "x"}, "no folder"),
        (package("tensorrt", a_gpu, "8.6.1"), {}, "too old"),
        (old, {"weight_streaming": True}, "does not know --weight-streaming"),
        (old, {"refittable": True}, "does not know --refittable"),
    ]
    for trt, options, message in rows:
        with pytest.raises(OptionError, match=message) as caught:
            check_options(BuildOptions(**options), trt)
        assert caught.value.hint
    assert all(refusal.message and refusal.hint for refusal in REFUSALS)


def test_what_works_there_is_not_refused(a_gpu: Gpu) -> None:
    """Protects against refusing on the target machine what needs its GPU."""
    full, rtx = package("tensorrt", a_gpu), package("tensorrt-rtx", Gpu(0, "NVIDIA Ada", (8, 9), 1))
    wide = {"hardware": "ampere+", "version_compatible": True, "strip_plan": True, "timing_cache": Path("x")}
    for options in ({}, {"targets": ("current",)}, wide):
        assert check_options(BuildOptions(**options), full) == ("sm90",)  # type: ignore[arg-type]
    assert check_options(BuildOptions(refittable=True, strip_plan=True), rtx) == ("default",)
    assert check_options(BuildOptions(targets=("current",)), rtx) == ("sm89",)


def test_turing_lacks_types() -> None:
    """Protects against a failure deep in the builder: no float32 products and no bfloat16 on sm75."""
    with pytest.raises(OptionError, match="float32 matrix products"):
        check_targets(("sm75", "sm89"), {("product", "float16"): 9, ("product", "float32"): 1})
    with pytest.raises(OptionError, match="bfloat16"):
        check_targets(("sm75",), {("convolution", "bfloat16"): 1})
    check_targets(("sm75",), {("product", "float16"): 9, ("convolution", "float32"): 1})
    check_targets(("sm80",), {("product", "float32"): 9})


@pytest.mark.tensorrt
def test_the_real_package_has_these_names(without_gpu: TensorRT) -> None:
    """Protects against a release that renames what the options are mapped to."""
    assert {"sm80", "sm86", "sm89", "sm120"} <= set(known_targets(without_gpu))
    everything = BuildOptions(tf32=True, weight_streaming=True, sparse_weights=True, targets=("sm80", "sm89"))
    assert check_options(everything, without_gpu) == ("sm80", "sm89")
    assert all(hasattr(without_gpu.module.BuilderFlag, flag) for flag in FLAGS)
