"""`ddexport doctor` tells the truth about the machine and the bundle, also where there is nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ddexport import runtime
from ddexport.runtime import machine
from ddexport.runtime.backends import _saved
from ddexport.runtime.bundle import read_manifest, sha256_of
from ddexport.runtime.check import Golden, check
from ddexport.runtime.doctor import PACKAGES, command, diagnose
from ddexport.runtime.machine import Cuda, Gpu, cuda, gpu_fault, import_fault, version_of
from tests.runtime import toy


@pytest.fixture(autouse=True)
def asked_anew() -> Any:
    """What was looked up once on a made up machine is forgotten."""
    yield
    cuda.cache_clear()


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_with_nothing_installed(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine, no driver: it says so, in words, and ends well."""
    for module, _ in PACKAGES.values():
        monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    monkeypatch.setattr(machine, "version_of", lambda name: None)
    cuda.cache_clear()
    done = doctor(shared_bundle)
    assert done.exit_code == 0, done.output
    for package, (_, extra) in PACKAGES.items():
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"  {package} "))
        assert line.endswith(f'pip install "ddexport[{extra}]"')
    assert "no inference engine" in done.stdout and "auto takes      nothing" in done.stdout
    assert "no   onnxruntime, cpu, fp32: onnxruntime is not installed" in done.stdout


def test_what_a_bundle_runs_on_and_why(bundle: Path) -> None:
    """The list that `auto` chooses from, with its reasons, and what runs only by name. A bad bundle ends with
    one."""
    toy.add_precision(bundle, "int8")
    text = doctor(bundle).stdout
    assert "fp32, int8" in text and "auto takes      onnxruntime, cpu, fp32" in text
    assert "    yes  onnxruntime, cpu, fp32\n    yes  openvino, cpu, fp32\n" in text
    assert "    no   onnxruntime, cuda:0, fp32: " in text or not gpu_fault(0)
    assert "also possible   openvino, cpu, int8; onnxruntime, cpu, int8" in text
    _saved.save(bundle, read_manifest(bundle), {"openvino": 1.5})
    chosen = json.loads(doctor(bundle, "--json").stdout)["bundle"]
    assert (chosen["auto"], chosen["precisions"]) == ("openvino, cpu, fp32", ["fp32", "int8"])
    runs = {row["name"]: (row["runs"], row["reason"]) for row in chosen["configurations"]}
    assert runs["onnxruntime, cpu, fp32"] == (True, "") and "1.5 ms" in runs["openvino, cpu, fp32"][1]
    (bundle / "engines" / "some").mkdir(parents=True)
    (bundle / "engines" / "some" / "student_fp32.json").write_text("{}")
    for name in ("student_fp32.json", "student.onnx"):
        result = doctor(bundle)
        assert result.exit_code == 1 and name in result.stderr and len(result.stderr.splitlines()) == 2
        (bundle / "student.onnx").write_bytes(b"x" * (bundle / "student.onnx").stat().st_size)


def test_a_machine_with_a_gpu_and_broken_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError(f"lib{name}.so.11: cannot open shared object file")

    gpu = Gpu(0, "Toy GPU", (8, 9), 24 << 30)
    monkeypatch.setattr(machine, "cuda", lambda: Cuda((gpu,), (13, 0), ""))
    text = doctor().stdout
    assert "gpu 0           Toy GPU, sm89, 24.0 GiB" in text and "CUDA up to 13.0" in text
    (row,) = json.loads(doctor("--json").stdout)["gpus"]
    assert row == {"index": 0, "name": "Toy GPU", "capability": [8, 9], "memory": 24 << 30, "target": "sm89"}
    assert gpu_fault(0) == "" and "no GPU 1" in gpu_fault(1)
    monkeypatch.setattr(machine, "version_of", lambda name: "1.31")
    monkeypatch.setattr(machine, "import_module", broken)
    problems = diagnose()["problems"]
    assert len(problems) == 7 and "libopenvino.so.11" in problems[2]
    assert "onnxruntime and onnxruntime-gpu" in problems[-1]


# The machine


def test_missing_and_broken_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bindings without their libraries raise ImportError, and so does what a package needs and lacks."""
    rows: list[tuple[Exception, str]] = [
        (ModuleNotFoundError("No module named 'cuda'", name="cuda"), "not installed"),
        (ModuleNotFoundError("none", name="cuda.bindings"), "not installed"),
        (ModuleNotFoundError("none", name="x"), "broken (none)"),
        (ImportError("libcudart.so.13: cannot open"), "broken (libcudart.so.13: cannot open)"),
        (RuntimeError("what\never"), "broken (what)"),
        (OSError(), "broken (OSError)"),
    ]
    for error, fault in rows:

        def fail(name: str, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(machine, "import_module", fail)
        said = import_fault("cuda.bindings.runtime", "gpu")
        assert fault in said and 'pip install "ddexport[gpu]"' in said
        assert ("--force-reinstall" in said) == ("broken" in fault)
        cuda.cache_clear()
        assert cuda() == Cuda((), None, said) and gpu_fault(0) == said


def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name=b"Toy\0\0", major=9, minor=0, totalGlobalMem=5)
    driver = SimpleNamespace(
        cudaGetErrorString=lambda error: (0, b"it says so"),
        cudaGetDeviceProperties=lambda index: (0, gpu),
    )
    monkeypatch.setattr(machine, "import_module", lambda name: driver)

    def asked(version: int, *devices: Any) -> Cuda:
        driver.cudaDriverGetVersion, driver.cudaGetDeviceCount = lambda: (0, version), lambda: devices
        cuda.cache_clear()
        return cuda()

    none = asked(0, 35, None)
    assert none.version is None and "no NVIDIA driver" in none.fault
    old = asked(12040, 35, None)
    assert old.version == (12, 4) and "it says so" in old.fault
    assert [(gpu.index, gpu.name, gpu.target) for gpu in asked(12040, 0, 2).gpus] == [
        (0, "Toy", "sm90"),
        (1, "Toy", "sm90"),
    ]
    assert asked(12040, 0, 0).fault
    assert version_of("no-such-package") is None and version_of("onnxruntime")
    assert machine.cpu().name and machine.cpu().cores >= 1


# What PyTorch drew


def test_what_pytorch_drew_is_drawn_again_or_the_check_says_what_differs(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eight images a rounding may decide one token without a fault of anybody."""
    limits = {"tokens_differing": 0.01, "images_left_out": 0.0, "pixel_psnr": 50.0, "image_max": 2}
    toy.change(bundle, lambda content: content["parity"].update(fp32=limits))
    arrays: dict[str, Any] = {"steps": np.array(["1", "2"]), "labels": np.arange(8) % 3}
    arrays["seeds"] = np.arange(8, dtype=np.uint64)
    with runtime.load(bundle) as pipe:
        for steps in (1, 2):
            drawn = [pipe(n % 3, steps, seed=n, output="numpy") for n in range(8)]
            arrays[f"tokens_{steps}"] = np.concatenate([result.steps[-1].tokens for result in drawn])
            arrays[f"images_{steps}"] = np.concatenate([result.images for result in drawn])

    def write(name: str = "steps", spoil: Any = lambda array: array) -> None:
        arrays["manifest"] = np.array(sha256_of(bundle / "bundle.json"))
        changed = arrays | {name: spoil(arrays[name])}
        kept = {key: array for key, array in changed.items() if array is not None}
        np.savez(bundle / "parity" / "golden.npz", **kept)

    assert "golden.npz" in doctor(bundle, "--check").stderr
    (bundle / "parity").mkdir()
    write("tokens_2", lambda a: a + (np.arange(8)[:, None] == 3))
    result = doctor(bundle, "--check", "--backend", "onnxruntime", "--precision", "fp32")
    assert result.exit_code == 0 and "8 of 8 images" in result.stdout
    checks = json.loads(doctor(bundle, "--check", "--json").stdout)["checks"]
    assert [(row["steps"], row["left_out"], row["faults"]) for row in checks] == [("1", 0, []), ("2", 1, [])]
    rows: list[tuple[str, Any, int, str]] = [
        ("tokens_2", lambda a: a + (np.arange(8)[:, None] < 2), 3, "differ in 2 images"),
        ("tokens_2", lambda a: a + 1, 3, "no image"),
        ("images_1", lambda a: a ^ 8, 3, "difference 8, limit 2"),
        ("images_1", lambda a: a ^ 1, 3, "PSNR 48.1 dB, limit 50"),
        ("images_1", lambda a: a[:, :4], 3, "shapes"),
        ("labels", lambda a: a[:5], 1, "fit each other"),
        ("tokens_1", lambda a: None, 1, "damaged"),
        ("manifest", lambda a: np.array("0" * 64), 3, "another bundle.json"),
    ]
    for name, spoil, code, named in rows:
        write(name, spoil)
        result = doctor(bundle, "--check")
        assert result.exit_code == code and named in result.output
    toy.change(bundle, lambda content: content["parity"]["fp32"].pop("image_max"))
    write()
    assert "fp32" in doctor(bundle, "--check").stderr
    monkeypatch.chdir(tmp_path)  # has no build/
    assert doctor("--check").exit_code == doctor(bundle, "--backend", "openvino").exit_code == 2


@pytest.mark.parametrize(("steps", "limit", "differing"), [("teacher", 4, 5), ("3", 4, 5), ("1", 1, 2)])
def test_a_teachers_draws_have_a_limit_of_their_own(
    teacher_bundle: Path, steps: str, limit: int, differing: int
) -> None:
    """Rounding in fp16 changes a draw in three of eight images of digits-var on an H200, and no picture."""
    limits = {"tokens_differing": 0.01, "images_left_out": 0.1, "pixel_psnr": 50.0, "image_max": 2}
    limits["drawn_left_out"] = 0.5
    toy.change(teacher_bundle, lambda content: content["parity"].update(fp32=limits))
    labels, seeds = np.arange(8) % 3, np.arange(8, dtype=np.uint64)
    with runtime.load(teacher_bundle) as pipe:
        number = int(steps) if steps.isdecimal() else steps
        drawn = [pipe(n % 3, number, seed=n, output="numpy") for n in range(8)]
        images = np.concatenate([result.images for result in drawn])
        for count in (limit, differing):
            tokens = np.concatenate([result.steps[-1].tokens for result in drawn])
            tokens[:count] += 1
            arrays = {f"tokens_{steps}": tokens, f"images_{steps}": images}
            (row,) = check(pipe, Golden((steps,), seeds, labels, arrays))
            assert row.left_out == count and bool(row.faults) == (count == differing)
