"""`ddexport doctor` tells the truth about the machine and the bundle, also where there is nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
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
from ddexport.runtime.doctor import command, diagnose
from ddexport.runtime.machine import Cuda, Gpu, cuda, gpu_fault, import_fault, version_of

ROOT = Path(__file__).parents[2]
BARE = """
import sys

class Blocker:
    allowed = {"numpy", "PIL", "click", "msgspec", "ddexport"}

    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in self.allowed and first not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {first!r}", name=first)

def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import importlib.metadata
importlib.metadata.version = missing
from ddexport.runtime.doctor import command
command()
"""


@pytest.fixture(autouse=True)
def asked_anew() -> Any:
    """What was looked up once on a made up machine is forgotten."""
    yield
    cuda.cache_clear()


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_with_nothing_installed(shared_bundle: Path) -> None:
    """No engine, no driver: it says so, in words, and ends well."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(shared_bundle)],
        env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {"onnxruntime": "cpu", "onnxruntime-gpu": "gpu", "openvino": "openvino", "cuda-bindings": "gpu"}
    for package, extra in (rows | {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}).items():
        assert f'  {package:<16}not installed: pip install "ddexport[{extra}]"' in done.stdout
    assert 'no inference engine is installed: pip install "ddexport[cpu]"' in done.stdout
    assert "auto takes      nothing: no engine can run it here" in done.stdout
    assert "no   onnxruntime, cpu, fp32: onnxruntime is not installed" in done.stdout


def test_what_a_bundle_runs_on_and_why(bundle: Path, toy: Any) -> None:
    """The list that `auto` chooses from, with its reasons, and what runs only by name."""
    toy.add_precision(bundle, "int8")
    manifest = read_manifest(bundle)
    text = doctor(bundle).stdout
    assert f"{bundle}: A toy\n  graphs          fp32, int8\n  auto takes      onnxruntime, cpu, fp32" in text
    assert "    yes  onnxruntime, cpu, fp32\n    yes  openvino, cpu, fp32\n" in text
    assert "    no   onnxruntime, cuda:0, fp32: " in text or not gpu_fault(0)
    assert "by name         onnxruntime, cpu, int8" in text
    _saved.save(bundle, manifest, {"openvino": 1.5})
    chosen = json.loads(doctor(bundle, "--json").stdout)["bundle"]
    assert (chosen["auto"], chosen["precisions"]) == ("openvino, cpu, fp32", ["fp32", "int8"])
    runs = {row["name"]: (row["runs"], row["reason"]) for row in chosen["configurations"]}
    assert runs["onnxruntime, cpu, fp32"] == (True, "")
    assert runs["openvino, cpu, fp32"][1].startswith("the fastest on this CPU: 1.5 ms per image")


def test_a_machine_with_a_gpu_and_broken_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError(f"lib{name}.so.11: cannot open shared object file")

    gpu = Gpu(0, "Toy GPU", (8, 9), 24 << 30)
    monkeypatch.setattr(machine, "cuda", lambda: Cuda((gpu,), (13, 0), ""))
    text = doctor().stdout
    assert "gpu 0           Toy GPU, sm89, 24.0 GiB" in text and "CUDA up to 13.0" in text
    (row,) = json.loads(doctor("--json").stdout)["gpus"]
    assert row == {"index": 0, "name": "Toy GPU", "capability": [8, 9], "memory": 24 << 30, "target": "sm89"}
    assert gpu_fault(0) == "" and "there is no GPU 1, but 1 in all" in gpu_fault(1)
    monkeypatch.setattr(machine, "version_of", lambda name: "1.31")
    monkeypatch.setattr(machine, "import_module", broken)
    problems = diagnose()["problems"]
    assert len(problems) == 7
    assert "openvino is broken (libopenvino.so.11: cannot open shared object file)" in problems[2]
    assert "onnxruntime and onnxruntime-gpu overwrite each other's files" in problems[-1]


def test_a_bad_bundle_ends_with_one(bundle: Path) -> None:
    (bundle / "engines" / "some").mkdir(parents=True)
    (bundle / "engines" / "some" / "student_fp32.json").write_text("{}")
    for message in ("student_fp32.json", "the SHA-256 of student.onnx"):
        result = doctor(bundle)
        assert result.exit_code == 1
        assert message in result.stderr and len(result.stderr.splitlines()) == 2
        (bundle / "student.onnx").write_bytes(b"x" * (bundle / "student.onnx").stat().st_size)


# The machine


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ModuleNotFoundError("No module named 'cuda'", name="cuda"), "cuda is not installed: "),
        (ModuleNotFoundError("none", name="cuda.bindings"), "cuda is not installed: "),
        (ModuleNotFoundError("none", name="x"), "cuda.bindings.runtime is broken (none): "),
        (ImportError("libcudart.so.13: cannot open"), "is broken (libcudart.so.13: cannot open): "),
        (RuntimeError("what\never"), "is broken (what): "),
        (OSError(), "is broken (OSError): "),
    ],
)
def test_missing_and_broken_are_told_apart(error: Exception, fault: str, monkeypatch: Any) -> None:
    """Bindings without their libraries raise ImportError, and so does what a package needs and lacks."""

    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(machine, "import_module", fail)
    said = import_fault("cuda.bindings.runtime", "gpu")
    assert f'{fault}pip install "ddexport[gpu]"' in said
    assert ("--force-reinstall" in said) == ("broken" in said)
    cuda.cache_clear()
    assert cuda() == Cuda((), None, said) and gpu_fault(0) == said


@pytest.mark.parametrize(("driver", "fault"), [(0, "no NVIDIA driver"), (12040, "it says so")])
def test_what_the_driver_says(driver: int, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name=b"Toy\0\0", major=9, minor=0, totalGlobalMem=5)
    driver_of = SimpleNamespace(
        cudaDriverGetVersion=lambda: (0, driver),
        cudaGetDeviceCount=lambda: (35, None),
        cudaGetErrorString=lambda error: (0, b"it says so"),
        cudaGetDeviceProperties=lambda index: (0, gpu),
    )
    monkeypatch.setattr(machine, "import_module", lambda name: driver_of)
    cuda.cache_clear()
    assert cuda() == Cuda((), (12, 4) if driver else None, f"no GPU can be used: {fault}")
    driver_of.cudaGetDeviceCount = lambda: (0, 2)
    cuda.cache_clear()
    assert [(gpu.index, gpu.name, gpu.target) for gpu in cuda().gpus] == [
        (0, "Toy", "sm90"),
        (1, "Toy", "sm90"),
    ]
    driver_of.cudaGetDeviceCount = lambda: (0, 0)
    cuda.cache_clear()
    assert cuda().fault == "the driver knows no GPU"


def test_versions_and_cores() -> None:
    assert version_of("no-such-package") is None and version_of("onnxruntime")
    assert machine.cpu().name and machine.cpu().cores >= 1


# What PyTorch drew


@pytest.fixture
def golden(bundle: Path, toy: Any) -> Callable[..., None]:
    """`golden(name=array)` writes what the bundle itself draws as parity/golden.npz, with changes."""
    limits = {"tokens_differing": 0.01, "images_left_out": 0.0, "pixel_psnr": 50.0, "image_max": 2}
    toy.change(bundle, lambda content: content["parity"].update(fp32=limits))
    arrays: dict[str, Any] = {"steps": np.array(["1", "2"]), "labels": np.arange(8) % 3}
    arrays["seeds"] = np.arange(8, dtype=np.uint64)
    with runtime.load(bundle) as pipe:
        for steps in (1, 2):
            drawn = [pipe(n % 3, steps, seed=n, output="numpy") for n in range(8)]
            arrays[f"tokens_{steps}"] = np.concatenate([result.steps[-1].tokens for result in drawn])
            arrays[f"images_{steps}"] = np.concatenate([result.images for result in drawn])
    (bundle / "parity").mkdir()

    def write(name: str = "steps", spoil: Any = lambda array: array) -> None:
        arrays["manifest"] = np.array(sha256_of(bundle / "bundle.json"))
        changed = arrays | {name: spoil(arrays[name])}
        kept = {key: array for key, array in changed.items() if array is not None}
        np.savez(bundle / "parity" / "golden.npz", **kept)

    return write


def test_a_bundle_that_draws_what_pytorch_drew(bundle: Path, golden: Callable[..., None], toy: Any) -> None:
    """In eight images a rounding may decide one token without a fault of anybody."""
    assert "has no parity/golden.npz" in doctor(bundle, "--check").stderr
    golden("tokens_2", lambda a: a + (np.arange(8)[:, None] == 3))
    result = doctor(bundle, "--check", "--backend", "onnxruntime", "--precision", "fp32")
    assert result.exit_code == 0
    assert "1 step    8 of 8 images with equal tokens, PSNR inf dB, 8-bit difference 0  ok" in result.stdout
    assert "onnxruntime in fp32 generates the images of PyTorch" in result.stdout
    checks = json.loads(doctor(bundle, "--check", "--json").stdout)["checks"]
    assert [(row["steps"], row["left_out"], row["faults"]) for row in checks] == [("1", 0, []), ("2", 1, [])]
    toy.change(bundle, lambda content: content["parity"]["fp32"].pop("image_max"))
    golden()
    assert "no parity limits for fp32" in doctor(bundle, "--check").stderr
    assert doctor("--check").exit_code == doctor(bundle, "--backend", "openvino").exit_code == 2


def test_a_bundle_that_draws_something_else(bundle: Path, golden: Callable[..., None]) -> None:
    rows: list[tuple[str, Any, int, str]] = [
        ("tokens_2", lambda a: a + (np.arange(8)[:, None] < 2), 3, "tokens differ in 2 images"),
        ("tokens_2", lambda a: a + 1, 3, "no image could be compared"),
        ("images_1", lambda a: a ^ 8, 3, "8-bit difference 8, limit 2"),
        ("images_1", lambda a: a ^ 1, 3, "PSNR 48.1 dB, limit 50"),
        ("images_1", lambda a: a[:, :4], 3, "the shapes are not those"),
        ("labels", lambda a: a[:5], 1, "do not fit each other"),
        ("tokens_1", lambda a: None, 1, "golden.npz is damaged"),
        ("manifest", lambda a: np.array("0" * 64), 3, "another bundle.json"),
    ]
    for name, spoil, code, message in rows:
        golden(name, spoil)
        result = doctor(bundle, "--check")
        assert result.exit_code == code and message in result.output
