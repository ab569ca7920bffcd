"""An engine is compared with bundle and machine before it is loaded: one row for each way it may not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ddexport.runtime import backends
from ddexport.runtime.backends.tensorrt import TensorRt
from ddexport.runtime.bundle import Manifest, read_manifest
from ddexport.runtime.engines import MAX_SIDECARS, Profile, build_command, find_engines, fit, read_engine
from ddexport.runtime.records import to_json
from tests.runtime import fake_tensorrt as fake
from tests.runtime import toy

pytestmark = pytest.mark.usefixtures("gpu")
FITS = ("", "", True)


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    for precision in ("fp16", "bf16"):
        toy.add_precision(bundle, precision)
    return read_manifest(bundle)


@pytest.fixture
def built(bundle: Path, manifest: Manifest) -> Callable[..., tuple[str, str, bool]]:
    """`built(...)` puts engines into the bundle, in place of others, and says how they fit."""

    def build(backend: str = "tensorrt-rtx", **changes: Any) -> tuple[str, str, bool]:
        shutil.rmtree(bundle / "engines", ignore_errors=True)
        fake.write_engines(bundle, manifest, backend, **changes)
        (engines,), errors = find_engines(bundle)
        assert not errors
        return fit(bundle, manifest, engines)

    return build


def test_which_gpus_an_engine_is_for(
    built: Any, bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's support matrix. Hopper lies outside that of TensorRT-RTX: it comes last, with a note."""
    rows: list[tuple[str, dict[str, Any], list[tuple[int, int]], list[tuple[int, int]], str]] = [
        ("tensorrt-rtx", {}, [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)], [(7, 5), (10, 0)], "sm80"),
        ("tensorrt-rtx", {"targets": ("sm75", "sm120")}, [(7, 5), (12, 0)], [(8, 9), (12, 1)], "sm75"),
        ("tensorrt", {}, [(8, 9)], [(8, 6), (9, 0)], "sm89"),
        ("tensorrt", {"hardware": "same-compute-capability"}, [(8, 9)], [(9, 0)], "sm89"),
        ("tensorrt", {"hardware": "ampere+"}, [(8, 0), (9, 0), (10, 0)], [(7, 5)], "sm80 and later"),
    ]  # fmt: skip
    for backend, changes, able, unable, target in rows:
        for capability in able:
            fake.use_gpu(monkeypatch, *capability)
            assert built(backend, **changes) == FITS, (backend, changes, capability)
        for capability in unable:
            fake.use_gpu(monkeypatch, *capability)
            obstacle, note, supported = built(backend, **changes)
            assert f"for {target}" in obstacle and "ddexport trt " in obstacle, (capability, obstacle)
            assert not note and not supported
    fake.use_gpu(monkeypatch, 9, 0)
    obstacle, note, supported = built()
    assert (obstacle, supported) == ("", False)
    assert "sm90" in note and "--backend tensorrt --precision fp32 --batch 1,4,8" in note
    (configuration,) = TensorRt.configurations(bundle, manifest, None, None)
    assert configuration.rank == backends.UNSUPPORTED and configuration.note == note


def test_another_package_system_bundle_or_machine(
    built: Any, bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[tuple[str, dict[str, Any], str]] = [
        ("tensorrt-rtx", {"version": "1.6.0.1"}, "1.6.0.1"),
        ("tensorrt-rtx", {"version": "1.7.1.115", "version_compatible": True}, "1.7.1.115"),
        ("tensorrt", {"version": "11.3.0.99"}, "11.3.0.99"),
        ("tensorrt", {"version": "11.5.0.1", "version_compatible": True}, "11.5.0.1"),
        ("tensorrt", {"version": "10.16.1.11", "version_compatible": True}, "10.16.1.11"),
        ("tensorrt", {"platform": "win32-amd64"}, "win32-amd64"),
        ("tensorrt", {"source": "0" * 64}, "another student.onnx"),
        ("tensorrt", {"bytes": 5}, "says 5"),
        ("tensorrt", {"split": 1}, "another bundle"),
    ]
    for backend, changes, named in rows:
        obstacle, *_ = built(backend, **changes)
        assert named in obstacle and "ddexport trt " in obstacle, (changes, obstacle)
    assert built("tensorrt", version="11.3.0.99", version_compatible=True) == FITS
    for name in ("student_fp32.plan", "decoder_fp32.json"):
        next(bundle.glob(f"engines/*/{name}")).unlink()
    obstacle, *_ = fit(bundle, manifest, find_engines(bundle)[0][0])
    assert "no decoder engine" in obstacle and "student_fp32.plan has 0 bytes" in obstacle
    # What the machine lacks is not cured by building.
    monkeypatch.setitem(fake.sys.modules, "tensorrt_rtx", None)
    obstacle, *_ = built()
    assert 'pip install "ddexport[tensorrt-rtx]"' in obstacle and "build" not in obstacle
    fake.use_gpu(monkeypatch, gpus=(), fault="there is no driver")
    assert built() == ("there is no driver", "", True)


def test_everything_is_said_at_once_with_the_command_that_rebuilds(
    built: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options are those of `ddexport trt`; it names a package that has engines for the GPU: Hopper and
    data-centre Blackwell are not TensorRT-RTX's."""
    fake.use_gpu(monkeypatch, 7, 5)
    obstacle, *_ = built(source="0" * 64, platform="win32-amd64", profiles=((1, 2, 4), (8, 8, 16)))
    for text in ("another student", "another decoder", "win32-amd64", "sm75"):
        assert text in obstacle
    command = (
        f"ddexport trt {bundle} --backend tensorrt-rtx --precision fp32"
        " --batch 1,2,4 --batch 8,8,16 --compute-capability sm75"
    )
    assert obstacle.endswith(command)
    trt = pytest.importorskip("ddexport.commands.trt")
    context = trt.command.make_context("trt", command.split()[2:])
    assert context.params["profiles"] == (Profile(1, 2, 4), Profile(8, 8, 16))
    for capability, backend, more in (
        ((8, 9), "tensorrt-rtx", ""),
        ((7, 5), "tensorrt-rtx", " --compute-capability sm75"),
        ((9, 0), "tensorrt", ""),
        ((10, 0), "tensorrt", ""),
        ((12, 1), "tensorrt-rtx", ""),
    ):
        fake.use_gpu(monkeypatch, *capability)
        wanted = f"ddexport trt {bundle} --backend {backend} --precision fp16{more}"
        assert build_command(bundle, 0, "fp16") == wanted


def lie(sidecar: Path, key: str, value: Any) -> None:
    content = json.loads(sidecar.read_text())
    content[key] = value
    sidecar.write_text(json.dumps(content))


def test_a_sidecar_is_read_as_it_was_written_and_one_that_lies_is_named(
    bundle: Path, manifest: Manifest
) -> None:
    """And the others are read."""
    sidecar = fake.write_engines(bundle, manifest, profiles=((1, 1, 1), (2, 4, 8))) / "student_fp32.json"
    engine = read_engine(bundle, sidecar)
    assert to_json(engine) == sidecar.read_text() and engine.max_batch == 8
    rows: list[tuple[str, Any, str]] = [
        ("schema", 4, "schema 4"),
        ("schema", 2, "schema 2"),
        ("backend", "tensorflow", "`backend`"),
        ("backend", "tensorrt", "engines/tensorrt-1.7.1.116-default"),
        ("role", "decoder", "second decoder"),
        ("file", "../../student.onnx", "`file`"),
        ("profiles", [{"minimum": 3, "optimum": 2, "maximum": 4}], "3/2/4"),
        ("profiles", [{"minimum": 0, "optimum": 1, "maximum": 1}], "`profiles"),
        ("targets", [], "`targets`"),
        ("surprise", 1, "`surprise`"),
    ]
    for key, value, named in rows:
        shutil.rmtree(bundle / "engines", ignore_errors=True)
        lie(fake.write_engines(bundle, manifest) / "student_fp32.json", key, value)
        (engines,), (error,) = find_engines(bundle)
        assert set(engines.engines) == {("decoder", None)}
        assert named in error.message and "student_fp32.json" in error.message, error.message


def test_sidecars_are_bounded(bundle: Path, manifest: Manifest) -> None:
    folder = fake.write_engines(bundle, manifest)
    for number in range(MAX_SIDECARS):
        (folder / f"{number}.json").touch()
    assert f"more than {MAX_SIDECARS}" in find_engines(bundle)[1][0].message


def test_configurations(bundle: Path, manifest: Manifest) -> None:
    """One for each folder and precision, the fastest first; without engines the command that builds them."""
    configurations = partial(TensorRt.configurations, bundle, manifest)
    assert configurations(None, "cpu") == []
    (none,) = configurations(None, None)
    assert build_command(bundle, 0, "fp16") in none.obstacle
    assert configurations("bf16", None)[0].obstacle.endswith("--precision bf16")
    assert "ddexport trt" not in configurations("int8", None)[0].obstacle
    for precision in ("fp32", "bf16", "fp16"):
        fake.write_engines(bundle, manifest, precision=precision)
    fake.write_engines(bundle, manifest, "tensorrt", "fp32")
    fake.write_engines(bundle, manifest, targets=("sm75",))
    lie(bundle / "engines" / "tensorrt-rtx-1.7.1.116-sm75" / "decoder_fp32.json", "bytes", -1)
    *able, damaged = configurations(None, "cuda:0")
    assert [(c.precision, c.folder, bool(c.obstacle)) for c in able] == [
        ("fp16", "tensorrt-rtx-1.7.1.116-default", False),
        ("bf16", "tensorrt-rtx-1.7.1.116-default", False),
        ("fp32", "tensorrt-11.4.0.106-sm89", False),
        ("fp32", "tensorrt-rtx-1.7.1.116-default", False),
        ("fp32", "tensorrt-rtx-1.7.1.116-sm75", True),
    ]
    wanted, other_damaged = configurations("bf16", None)
    assert wanted.precision == "bf16"
    for one in (damaged, other_damaged):
        assert "decoder_fp32.json" in one.obstacle
    other = replace(wanted, device="cuda:3", obstacle="there is no GPU 3, but 1 in all")
    assert configurations("bf16", "cuda:3")[0] == other
