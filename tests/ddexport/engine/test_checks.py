"""What cannot be built is refused before the build, each with its reason and a way out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from ddexport.runtime.machine import Gpu

from ddexport.engine.checks import REFUSALS, check_options, check_targets, known_targets
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions, OptionError

FLAGS = ("TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT", "WEIGHT_STREAMING", "SPARSE_WEIGHTS")


def package(
    backend: str, gpu: Gpu | None, version: str = "11.4.0.1", flags: tuple[str, ...] = FLAGS
) -> TensorRT:
    """A package that only answers which names it has."""
    module = SimpleNamespace(
        BuilderFlag=SimpleNamespace(**{flag: flag for flag in flags}),
        ComputeCapability=SimpleNamespace(SM75=1, SM89=2, SM80=3, SM120=4, CURRENT=0, NONE=9),
    )
    return TensorRT(backend, module, version, gpu)


RTX = package("tensorrt-rtx", None, "1.7.1.116")
REJECTED = {
    "version-compatible on rtx": (BuildOptions(version_compatible=True), "lean runtime"),
    "hardware level on rtx": (BuildOptions(hardware="ampere+"), "hardware-compatibility-level"),
    "timing cache on rtx": (BuildOptions(timing_cache=Path("x")), "no timing cache"),
    "refittable without a GPU": (BuildOptions(refittable=True), "refittable engines only where"),
    "stripped plan without a GPU": (BuildOptions(strip_plan=True), "without weights only where"),
    "current without a GPU": (BuildOptions(targets=("current",)), "there is none"),
    "a GPU it cannot target": (BuildOptions(targets=("sm89", "sm90")), "cannot build for sm90"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rtx_refuses_what_it_cannot_do_here(case: str) -> None:
    """Protects against settings that TensorRT-RTX ignores, logs, or fails on after the build."""
    options, message = REJECTED[case]
    with pytest.raises(OptionError, match=message) as caught:
        check_options(options, RTX)
    assert caught.value.hint


def test_full_tensorrt_needs_a_gpu() -> None:
    """Protects against a crash in the builder where there is no driver."""
    with pytest.raises(OptionError, match="there is no GPU") as caught:
        check_options(BuildOptions(), package("tensorrt", None))
    assert "--backend tensorrt-rtx" in caught.value.hint


def test_full_tensorrt_builds_for_its_own_gpu(a_gpu: Gpu) -> None:
    """Protects against an engine named for a GPU that it was not built for."""
    full = package("tensorrt", a_gpu)
    with pytest.raises(OptionError, match="GPU of this machine only"):
        check_options(BuildOptions(targets=("sm80",)), full)
    assert check_options(BuildOptions(), full) == ("sm90",)
    assert check_options(BuildOptions(targets=("current",)), full) == ("sm90",)
    wide = BuildOptions(hardware="ampere+", version_compatible=True, strip_plan=True, timing_cache=Path("x"))
    assert check_options(wide, full) == ("sm90",)


def test_a_timing_cache_needs_its_folder(a_gpu: Gpu, tmp_path: Path) -> None:
    """Protects the hour of a build whose kernel times could not be written at its end."""
    with pytest.raises(OptionError, match="no folder"):
        check_options(BuildOptions(timing_cache=tmp_path / "none" / "x"), package("tensorrt", a_gpu))


def test_tensorrt_before_10_is_refused(a_gpu: Gpu) -> None:
    """Protects against versions without strong typing, which would ignore the graph's types."""
    with pytest.raises(OptionError, match="too old"):
        check_options(BuildOptions(), package("tensorrt", a_gpu, "8.6.1"))


def test_a_flag_that_the_version_lacks_is_refused(a_gpu: Gpu) -> None:
    """Protects against an AttributeError from a package that dropped or has not yet got a setting."""
    old = package("tensorrt", a_gpu, flags=("TF32",))
    with pytest.raises(OptionError, match="does not know --weight-streaming"):
        check_options(BuildOptions(weight_streaming=True), old)
    with pytest.raises(OptionError, match="does not know --refittable"):
        check_options(BuildOptions(refittable=True), old)


def test_a_gpu_allows_what_needs_one(a_gpu: Gpu) -> None:
    """Protects against refusing on the target machine what works there."""
    ada = Gpu(0, "NVIDIA Ada", (8, 9), 1)
    rtx = package("tensorrt-rtx", ada)
    assert check_options(BuildOptions(refittable=True, strip_plan=True), rtx) == ("default",)
    assert check_options(BuildOptions(targets=("current",)), rtx) == ("sm89",)
    with pytest.raises(OptionError, match="cannot build for sm90") as caught:
        check_options(BuildOptions(targets=("current",)), package("tensorrt-rtx", a_gpu))
    assert "--backend tensorrt" in caught.value.hint


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


def test_every_refusal_says_what_to_do() -> None:
    """Protects the rule that an error comes with a way out."""
    assert all(refusal.message and refusal.hint for refusal in REFUSALS)
