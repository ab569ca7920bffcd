"""An engine is held against the machine before it is loaded: one test for each way it may not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ddexport.runtime.engines import MAX_SIDECARS, find_engines
from ddexport.runtime.errors import BackendError
from ddexport.runtime.fit import Fit, builds, fit, rebuild_command
from ddexport.runtime.machine import Gpu, Machine, Package
from ddexport.runtime.manifest import read_manifest

from ddexport import runtime

Builder = Callable[..., Path]


def fit_of(bundle: Path, machine: Machine, precision: str = "fp32") -> Fit:
    manifest = read_manifest(bundle, verify=False)
    (build,) = [build for build in builds(bundle)[0] if build.precision == precision]
    return fit(build, {role: manifest.graph(role, precision) for role in ("student", "decoder")}, machine)


def known_machine(capability: tuple[int, int] = (8, 9), **known: Any) -> Machine:
    facts: dict[str, Any] = {
        "platform": runtime_platform(),
        "gpus": (Gpu(0, "Toy GPU", capability, 1 << 34),),
        "cuda": (13, 0),
        "cuda_problem": None,
        "bindings": Package("cuda-bindings", "13.5.0", None),
        "engine_packages": {
            "tensorrt": Package("tensorrt", "11.4.0.106", None),
            "tensorrt-rtx": Package("tensorrt-rtx", "1.7.1.116", None),
        },
        "distributions": {"tensorrt-cu13": "11.4", "tensorrt-rtx-cu13": "1.7"},
    }
    return Machine(**facts | known)


def runtime_platform() -> str:
    from ddexport.runtime.engines import this_platform

    return this_platform()


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_what_fits_fits(bundle: Path, build: Builder, backend: str) -> None:
    build(backend)
    assert fit_of(bundle, known_machine()) == Fit()


GPU_MISFITS = [
    (
        "tensorrt-rtx",
        {},
        (7, 5),
        "it was built for sm80, sm86, sm89 and sm120 or later, and Toy GPU has sm75",
    ),
    ("tensorrt-rtx", {}, (10, 0), "Toy GPU has sm100"),
    ("tensorrt-rtx", {"targets": ("sm86", "sm120")}, (8, 9), "it was built for sm86, sm120, and Toy GPU has"),
    ("tensorrt", {}, (8, 6), "it was built for sm89, and Toy GPU has sm86"),
    ("tensorrt", {"hardware": "same-compute-capability"}, (9, 0), "it was built for sm89, and Toy GPU has"),
    ("tensorrt", {"hardware": "ampere+"}, (7, 5), "it was built for sm80 or later, and Toy GPU has sm75"),
]


@pytest.mark.parametrize(("backend", "changes", "capability", "message"), GPU_MISFITS)
def test_another_gpu(
    bundle: Path,
    build: Builder,
    backend: str,
    changes: dict[str, Any],
    capability: tuple[int, int],
    message: str,
) -> None:
    build(backend, **changes)
    (misfit,) = fit_of(bundle, known_machine(capability)).misfits
    assert message in misfit


@pytest.mark.parametrize(
    ("backend", "changes", "capabilities"),
    [
        ("tensorrt-rtx", {}, [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)]),
        ("tensorrt-rtx", {"targets": ("sm75",)}, [(7, 5)]),
        ("tensorrt", {"hardware": "ampere+"}, [(8, 0), (9, 0), (10, 0)]),
        ("tensorrt", {"hardware": "same-compute-capability"}, [(8, 9)]),
    ],
)
def test_the_gpus_it_was_built_for(
    bundle: Path, build: Builder, backend: str, changes: dict[str, Any], capabilities: list[tuple[int, int]]
) -> None:
    build(backend, **changes)
    for capability in capabilities:
        assert fit_of(bundle, known_machine(capability)) == Fit()


def test_hopper_is_a_doubt_not_a_misfit(bundle: Path, build: Builder) -> None:
    build()
    result = fit_of(bundle, known_machine((9, 0)))
    assert result.obstacles == ()
    assert result.doubts == ("Toy GPU has sm90, which is outside NVIDIA's support matrix of TensorRT-RTX",)


PACKAGE_MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"version": "1.6.0.1"}, "it was built with tensorrt-rtx 1.6.0.1, and here is 1.7.1.116"),
    ({"version": "1.7.1.115", "version_compatible": True}, "it was built with tensorrt-rtx 1.7.1.115"),
    ({"platform": "win32-amd64"}, "it was built for win32-amd64, and this is"),
    ({"source": "0" * 64}, "student_fp32.plan was built from another student.onnx"),
    ({"inputs": ()}, "student_fp32.plan has other inputs or outputs than student.onnx"),
    ({"bytes": 5}, "but its sidecar says 5"),
    ({"options": {"strip_plan": True}}, "student_fp32.plan was built without its weights"),
]


@pytest.mark.parametrize(("changes", "message"), PACKAGE_MISFITS)
def test_another_package_system_or_graph(
    bundle: Path, build: Builder, changes: dict[str, Any], message: str
) -> None:
    build(**changes)
    result = fit_of(bundle, known_machine())
    assert any(message in misfit for misfit in result.misfits), result
    assert result.lacking == ()


@pytest.mark.parametrize(
    ("built", "compatible", "fits"),
    [
        ("11.4.0.106", False, True),
        ("11.3.0.99", False, False),
        ("11.3.0.99", True, True),
        ("11.5.0.1", True, False),
        ("10.16.1.11", True, False),
    ],
)
def test_the_version_is_the_same_or_compatible(
    bundle: Path, build: Builder, built: str, compatible: bool, fits: bool
) -> None:
    """Full TensorRT's version-compatible engines run on later releases of the same major version."""
    build("tensorrt", version=built, version_compatible=compatible)
    assert (fit_of(bundle, known_machine()).misfits == ()) == fits


LACKING: list[tuple[dict[str, Any], str]] = [
    ({"gpus": (), "cuda_problem": "no GPU can be used: no driver"}, "no GPU can be used: no driver"),
    (
        {"cuda": (12, 8)},
        "tensorrt-rtx is made for CUDA 13, and the driver supports CUDA 12.8: install a newer",
    ),
    ({"bindings": Package("cuda-bindings", None, "it is not installed")}, "it is not installed"),
    (
        {"bindings": Package("cuda-bindings", "12.9.1", None)},
        "tensorrt-rtx is made for CUDA 13, and cuda-bindings for CUDA 12: pip install 'cuda-bindings==13.*'",
    ),
    (
        {"engine_packages": {"tensorrt-rtx": Package("tensorrt-rtx", None, "it is broken")}},
        "it is broken",
    ),
]


@pytest.mark.parametrize(("known", "message"), LACKING)
def test_what_the_machine_lacks(bundle: Path, build: Builder, known: dict[str, Any], message: str) -> None:
    """No other engine would run either, so that it is told apart from a misfit."""
    build()
    result = fit_of(bundle, known_machine(**known))
    assert any(message in text for text in result.lacking), result
    assert result.misfits == ()


def test_a_missing_plan_and_a_missing_role(bundle: Path, build: Builder) -> None:
    folder = build()
    (folder / "student_fp32.plan").unlink()
    (folder / "decoder_fp32.json").unlink()
    assert fit_of(bundle, known_machine()).misfits == (
        "student_fp32.plan is missing",
        "there is no decoder engine",
    )


def test_worth_knowing(bundle: Path, build: Builder) -> None:
    build("tensorrt", made_with={"name": "NVIDIA L4", "driver": "13.1"})
    assert fit_of(bundle, known_machine()).notes == (
        "it was tuned on NVIDIA L4, and here is Toy GPU: it may run slower than it could",
        "it was built with a driver for CUDA 13.1, and this one supports 13.0",
    )


def test_everything_is_said_in_one_error_with_the_command_that_rebuilds(
    gpu: Any, bundle: Path, build: Builder
) -> None:
    gpu.cuda.devices = [SimpleNamespace(name=b"Old GPU", major=7, minor=5, totalGlobalMem=1)]
    gpu.cuda.driver = 12080
    build(source="0" * 64, version="1.6.0.1", platform="win32-amd64", profiles=((1, 2, 4), (8, 8, 16)))
    with pytest.raises(BackendError) as caught:
        runtime.load(bundle, backend="tensorrt")
    for what in (
        "built from another student.onnx",
        "built from another decoder.onnx",
        "tensorrt-rtx 1.6.0.1, and here is 1.7.1.116",
        "built for win32-amd64",
        "Old GPU has sm75",
        "the driver supports CUDA 12.8",
    ):
        assert what in caught.value.message
    assert caught.value.hint == (
        f"build for this machine: ddexport trt {bundle} --backend tensorrt-rtx --precision fp32"
        " --batch 1,2,4 --batch 8,8,16 --compute-capability sm75"
    )


def test_nothing_is_to_be_rebuilt_where_no_engine_could_run(gpu: Any, bundle: Path, build: Builder) -> None:
    gpu.cuda.devices = []
    build()
    with pytest.raises(BackendError, match="the driver knows no GPU") as caught:
        runtime.load(bundle, backend="tensorrt")
    assert "ddexport trt" not in caught.value.hint


def test_without_engines_the_command_that_builds_them(gpu: Any, bundle: Path) -> None:
    with pytest.raises(BackendError, match="no engines are built") as caught:
        runtime.load(bundle, backend="tensorrt")
    assert "--backend tensorrt-rtx --precision fp32 --batch 1,4,8" in caught.value.hint


@pytest.mark.parametrize(
    ("capability", "backend", "ends"),
    [
        ((8, 9), "tensorrt-rtx", "1,4,8"),
        ((7, 5), "tensorrt-rtx", "--compute-capability sm75"),
        ((9, 0), "tensorrt", "1,4,8"),
        ((10, 0), "tensorrt", "1,4,8"),
        ((12, 1), "tensorrt-rtx", "1,4,8"),
    ],
)
def test_the_command_names_a_package_that_has_engines_for_the_gpu(
    bundle: Path, build: Builder, capability: tuple[int, int], backend: str, ends: str
) -> None:
    """Hopper and data-centre Blackwell are not TensorRT-RTX's."""
    build()
    (made,) = builds(bundle)[0]
    command = rebuild_command(bundle, made, known_machine(capability))
    assert f"--backend {backend} " in command
    assert command.endswith(ends)


def test_the_command_is_one_that_exists(bundle: Path, build: Builder) -> None:
    """Its options are those of `ddexport trt`."""
    trt = pytest.importorskip("ddexport.commands.trt")
    build()
    words = rebuild_command(bundle, builds(bundle)[0][0], known_machine((7, 5))).split()[2:]
    context = trt.command.make_context("trt", words)
    assert context.params["backend"] == "tensorrt-rtx"
    assert context.params["precision"] == "fp32"


def lie(folder: Path, key: str, value: Any) -> None:
    path = folder / "student_fp32.json"
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", 2, "has schema 2, and this runtime reads up to 1"),
        ("backend", "tensorflow", "backend is 'tensorflow'"),
        ("file", "../../student.onnx", "not a .plan beside it"),
        ("file", "/etc/passwd", "not a .plan beside it"),
        ("profiles", [], "profiles must be"),
        ("profiles", [{"minimum": 3, "optimum": 2, "maximum": 4}], "profiles must be"),
        ("targets", [], "targets is empty"),
        ("surprise", 1, "unknown key surprise"),
        ("bytes", "many", "bytes must be int"),
    ],
)
def test_a_sidecar_that_lies_is_named(
    bundle: Path, build: Builder, key: str, value: Any, message: str
) -> None:
    lie(build(), key, value)
    found, errors = find_engines(bundle)
    assert [each.engine.role for each in found] == ["decoder"]
    assert message in errors[0].message


def test_nothing_outside_the_bundle_is_read(bundle: Path, build: Builder, tmp_path: Path) -> None:
    """Neither a folder nor a sidecar nor a plan that is a link to somewhere else."""
    folder = build()
    outside = Path(shutil.copytree(folder, tmp_path / "outside"))
    (bundle / "engines" / "linked").symlink_to(outside)
    (folder / "student_fp32.plan").unlink()
    (folder / "student_fp32.plan").symlink_to(outside / "student_fp32.plan")
    (folder / "decoder_fp32.json").unlink()
    (folder / "decoder_fp32.json").symlink_to(outside / "decoder_fp32.json")
    found, errors = find_engines(bundle)
    assert found == []
    assert len(errors) == 4
    assert all("outside the bundle" in error.message for error in errors)


def test_the_number_and_the_size_of_sidecars_are_bounded(bundle: Path, build: Builder) -> None:
    folder = build()
    (folder / "large.json").write_bytes(b" " * (9 << 20))
    assert "larger than 8 MiB" in find_engines(bundle)[1][0].message
    for number in range(MAX_SIDECARS):
        (folder / f"{number}.json").touch()
    found, errors = find_engines(bundle)
    assert found == []
    assert "more than 512" in errors[0].message
