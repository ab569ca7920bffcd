"""An engine is held against bundle and machine before it is loaded: one row for each way it may not fit."""

from __future__ import annotations

import importlib.util
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
from ddexport.runtime.bundle import Manifest
from ddexport.runtime.engines import MAX_SIDECARS, Profile, build_command, find_engines, fit, read_engine
from ddexport.runtime.records import to_json

_spec = importlib.util.spec_from_file_location("fake_tensorrt", Path(__file__).with_name("fake_tensorrt.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

FITS = ("", "", True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


@pytest.fixture
def manifest(root: Path) -> Manifest:
    made: Manifest = fake.write_bundle(root, ("fp32", "fp16", "bf16"))
    return made


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return fake.install(monkeypatch, tmp_path / "cache")


@pytest.fixture
def built(root: Path, manifest: Manifest) -> Callable[..., tuple[str, str, bool]]:
    """`built(...)` puts engines into the bundle, in place of others, and says how they fit."""

    def build(backend: str = "tensorrt-rtx", **changes: Any) -> tuple[str, str, bool]:
        shutil.rmtree(root / "engines", ignore_errors=True)
        fake.write_engines(root, manifest, backend, **changes)
        (engines,), errors = find_engines(root)
        assert not errors
        return fit(root, manifest, engines)

    return build


def test_which_gpus_an_engine_is_for(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's support matrix."""
    rows: list[tuple[str, dict[str, Any], list[tuple[int, int]], list[tuple[int, int]], str]] = [
        ("tensorrt-rtx", {}, [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)], [(7, 5), (10, 0)],
         "built for sm80, sm86, sm89, sm120 and later, and Toy GPU has sm"),
        ("tensorrt-rtx", {"targets": ("sm75", "sm120")}, [(7, 5), (12, 0)], [(8, 9), (9, 0), (12, 1)],
         "built for sm75, sm120, and Toy GPU has sm"),
        ("tensorrt", {}, [(8, 9)], [(8, 6), (9, 0)], "built for sm89, and Toy GPU has sm"),
        ("tensorrt", {"hardware": "same-compute-capability"}, [(8, 9)], [(9, 0)], "built for sm89, and"),
        ("tensorrt", {"hardware": "ampere+"}, [(8, 0), (9, 0), (10, 0)], [(7, 5)], "for sm80 and later, "),
    ]  # fmt: skip
    for backend, changes, able, unable, message in rows:
        for capability in able:
            fake.use_gpu(monkeypatch, *capability)
            assert built(backend, **changes) == FITS, (backend, changes, capability)
        for capability in unable:
            fake.use_gpu(monkeypatch, *capability)
            obstacle, note, supported = built(backend, **changes)
            assert message in obstacle and "; build for this machine: ddexport trt " in obstacle, capability
            assert not note and not supported


def test_hopper_is_a_note_and_comes_last(
    built: Any, root: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside NVIDIA's support matrix of TensorRT-RTX: only where nothing else is left, or by name."""
    fake.use_gpu(monkeypatch, 9, 0)
    obstacle, note, supported = built()
    assert (obstacle, supported) == ("", False)
    assert note.startswith(
        "Toy GPU has sm90, outside NVIDIA's support matrix of TensorRT-RTX; build for this"
    )
    assert "--backend tensorrt --precision fp32 --batch 1,4,8" in note
    (configuration,) = TensorRt.configurations(root, manifest, None, None)
    assert configuration.rank == backends.UNSUPPORTED and configuration.note == note


def test_another_package_system_or_bundle(built: Any) -> None:
    rows: list[tuple[str, dict[str, Any], str]] = [
        ("tensorrt-rtx", {"version": "1.6.0.1"}, "built with tensorrt-rtx 1.6.0.1, and here is 1.7.1.116"),
        ("tensorrt-rtx", {"version": "1.7.1.115", "version_compatible": True}, "tensorrt-rtx 1.7.1.115, and"),
        ("tensorrt", {"version": "11.3.0.99"}, "built with tensorrt 11.3.0.99, and here is 11.4.0.106"),
        ("tensorrt", {"version": "11.5.0.1", "version_compatible": True}, "built with tensorrt 11.5.0.1"),
        ("tensorrt", {"version": "10.16.1.11", "version_compatible": True}, "built with tensorrt 10.16.1.11"),
        ("tensorrt", {"platform": "win32-amd64"}, "built for win32-amd64, and this is"),
        ("tensorrt", {"source": "0" * 64}, "student_fp32.plan was built from another student_fp32.onnx"),
        ("tensorrt", {"bytes": 5}, "but its sidecar says 5"),
        (
            "tensorrt",
            {"split": 1},
            "student_fp32.plan is of another bundle: bundle toy has no student of",
        ),
    ]
    for backend, changes, message in rows:
        obstacle, *_ = built(backend, **changes)
        assert message in obstacle and "; build for this machine: " in obstacle, changes
    assert built("tensorrt", version="11.3.0.99", version_compatible=True) == FITS


def test_a_missing_plan_and_a_missing_role(built: Any, root: Path, manifest: Manifest) -> None:
    built()
    for path in root.glob("engines/*/student_fp32.plan"):
        path.unlink()
    for path in root.glob("engines/*/decoder_fp32.json"):
        path.unlink()
    obstacle, *_ = fit(root, manifest, find_engines(root)[0][0])
    assert obstacle.startswith("there is no decoder engine; student_fp32.plan has 0 bytes, but its sidecar")


def test_what_the_machine_lacks_is_not_cured_by_building(
    built: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fake.sys.modules, "tensorrt_rtx", None)
    obstacle, *_ = built()
    assert 'pip install "ddexport[tensorrt-rtx]"' in obstacle and "build" not in obstacle
    fake.use_gpu(monkeypatch, gpus=(), fault="no GPU can be used: no NVIDIA driver")
    assert built() == ("no GPU can be used: no NVIDIA driver", "", True)


def test_everything_is_said_at_once(built: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that rebuilds, whose options are those of `ddexport trt`."""
    fake.use_gpu(monkeypatch, 7, 5)
    obstacle, *_ = built(source="0" * 64, platform="win32-amd64", profiles=((1, 2, 4), (8, 8, 16)))
    for text in ("from another student", "from another decoder", "built for win32-amd64", "has sm75"):
        assert text in obstacle
    command = (
        f"ddexport trt {root} --backend tensorrt-rtx --precision fp32"
        " --batch 1,2,4 --batch 8,8,16 --compute-capability sm75"
    )
    assert obstacle.endswith(f"; build for this machine: {command}")
    trt = pytest.importorskip("ddexport.commands.trt")
    context = trt.command.make_context("trt", command.split()[2:])
    assert context.params["profiles"] == (Profile(1, 2, 4), Profile(8, 8, 16))


def test_the_command_names_a_package_that_has_engines_for_the_gpu(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hopper and data-centre Blackwell are not TensorRT-RTX's."""
    rows = [
        ((8, 9), "--backend tensorrt-rtx --precision fp16"),
        ((7, 5), "--backend tensorrt-rtx --precision fp16 --compute-capability sm75"),
        ((9, 0), "--backend tensorrt --precision fp16"),
        ((10, 0), "--backend tensorrt --precision fp16"),
        ((12, 1), "--backend tensorrt-rtx --precision fp16"),
    ]
    for capability, end in rows:
        fake.use_gpu(monkeypatch, *capability)
        assert build_command(root, 0, "fp16") == f"ddexport trt {root} {end}"


def lie(sidecar: Path, key: str, value: Any) -> None:
    content = json.loads(sidecar.read_text())
    content[key] = value
    sidecar.write_text(json.dumps(content))


def test_a_sidecar_that_lies_is_named(root: Path, manifest: Manifest) -> None:
    """And the others are read."""
    rows: list[tuple[str, Any, str]] = [
        ("schema", 4, "has schema 4, and this runtime reads 3"),
        ("schema", 2, "has schema 2, and this runtime reads 3"),
        ("backend", "tensorflow", "at `backend`"),
        ("backend", "tensorrt", "belongs in engines/tensorrt-1.7.1.116-default"),
        ("role", "teacher", "at `role`"),
        ("role", "decoder", "second decoder"),
        ("file", "../../student.onnx", "at `file`"),
        ("file", "/etc/passwd", "at `file`"),
        ("profiles", [], "at `profiles`"),
        (
            "profiles",
            [{"minimum": 3, "optimum": 2, "maximum": 4}],
            "optimum <= maximum, not 3/2/4",
        ),
        ("targets", [], "at `targets`"),
        ("surprise", 1, "unknown field `surprise`"),
        ("bytes", "many", "at `bytes`"),
    ]
    for key, value, message in rows:
        shutil.rmtree(root / "engines", ignore_errors=True)
        sidecar = fake.write_engines(root, manifest) / "student_fp32.json"
        lie(sidecar, key, value)
        (engines,), (error,) = find_engines(root)
        assert set(engines.engines) == {("decoder", None)}
        assert message in error.message and "student_fp32.json" in error.message


def test_a_sidecar_is_read_as_it_was_written(root: Path, manifest: Manifest) -> None:
    sidecar = fake.write_engines(root, manifest, profiles=((1, 1, 1), (2, 4, 8))) / "student_fp32.json"
    engine = read_engine(root, sidecar)
    assert to_json(engine) == sidecar.read_text() and engine.max_batch == 8
    with pytest.raises(ValueError, match="minimum <= optimum"):
        Profile(0, 1, 1)


def test_sidecars_are_bounded_and_links_of_the_hubs_cache_are_followed(
    root: Path, manifest: Manifest
) -> None:
    folder = fake.write_engines(root, manifest)
    for path in list(folder.iterdir()):
        path.symlink_to(path.rename(root / f"blob-{path.name}"))
    sets, errors = find_engines(root)
    assert len(sets[0].engines) == 2 and not errors
    (folder / "large.json").write_bytes(b" " * (9 << 20))
    assert any("larger than 8 MiB" in error.message for error in find_engines(root)[1])
    for number in range(MAX_SIDECARS):
        (folder / f"{number}.json").touch()
    assert "more than 512" in find_engines(root)[1][0].message


def test_configurations(root: Path, manifest: Manifest) -> None:
    """One a folder and precision, the fastest first; without engines the command that builds them."""
    configurations = partial(TensorRt.configurations, root, manifest)
    assert configurations(None, "cpu") == []
    (none,) = configurations(None, None)
    assert none.obstacle == f"no engines are built: {build_command(root, 0, 'fp16')}"
    assert configurations("bf16", None)[0].obstacle.endswith("--precision bf16")
    assert configurations("int8", None)[0].obstacle == "engines are built in fp16, bf16, fp32"
    for precision in ("fp32", "bf16", "fp16"):
        fake.write_engines(root, manifest, precision=precision)
    fake.write_engines(root, manifest, "tensorrt", "fp32")
    fake.write_engines(root, manifest, targets=("sm75",))
    lie(root / "engines" / "tensorrt-rtx-1.7.1.116-sm75" / "decoder_fp32.json", "bytes", -1)
    *able, damaged = configurations(None, "cuda:0")
    assert [(c.precision, c.folder) for c in able] == [
        ("fp16", "tensorrt-rtx-1.7.1.116-default"),
        ("bf16", "tensorrt-rtx-1.7.1.116-default"),
        ("fp32", "tensorrt-11.4.0.106-sm89"),
        ("fp32", "tensorrt-rtx-1.7.1.116-default"),
        ("fp32", "tensorrt-rtx-1.7.1.116-sm75"),
    ]
    assert [bool(c.obstacle) for c in able] == [False, False, False, False, True]
    assert "decoder_fp32.json" in damaged.obstacle
    wanted, damaged = configurations("bf16", None)
    assert wanted.precision == "bf16" and "decoder_fp32.json" in damaged.obstacle
    other = replace(wanted, device="cuda:3", obstacle="there is no GPU 3, but 1 in all")
    assert configurations("bf16", "cuda:3")[0] == other
