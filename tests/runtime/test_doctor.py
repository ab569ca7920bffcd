"""`ddexport doctor` tells the truth about the machine and the bundle, also where there is nothing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from ddexport.runtime import machine as machine_module
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.doctor import command, diagnose, lines
from ddexport.runtime.machine import (
    Cpu,
    Gpu,
    Machine,
    Package,
    ask_cuda,
    ask_nvidia_smi,
    driver_version,
    installed,
    package,
    read_cpu,
)
from ddexport.runtime.measured import Measured, write_measured

Builder = Callable[..., Path]
BARE = """
import sys

class Blocker:
    allowed = {"numpy", "PIL", "click", "runtime"}

    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in self.allowed and first not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {first!r}", name=first)

sys.meta_path.insert(0, Blocker())
import importlib.metadata
importlib.metadata.distributions = lambda **context: []
sys.argv = ["doctor", *sys.argv[1:]]
from ddexport.runtime.doctor import command
command()
"""


@pytest.fixture(autouse=True)
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say which engines there are: a machine made up with OpenVINO has it nevertheless."""
    missing = Package("openvino", None, "openvino is not installed: pip install openvino", missing=True)
    fact = cached_property(lambda machine: missing)
    fact.__set_name__(Machine, "openvino")
    monkeypatch.setattr(Machine, "openvino", fact)


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_with_nothing_installed(shared_bundle: Path) -> None:
    """No engine, no driver, no nvidia-smi, not even ONNX Runtime: it says so, in words, and ends well."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(shared_bundle)],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for what in ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "cuda-bindings"):
        assert f"  {what:<16}missing" in done.stdout
    assert "auto takes      nothing: no engine can run it here" in done.stdout
    assert "pip install onnxruntime" in done.stdout


def test_it_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom runtime.doctor import diagnose\nfrom runtime.machine import Machine\n"
        "diagnose(Machine())\n"
        "print([n for n in ('torch', 'onnx', 'ddexport', 'validate') if n in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_machine_with_everything(gpu: Any, bundle: Path, build: Builder) -> None:
    build()
    text = doctor(bundle).stdout
    assert "gpu 0           Toy GPU, sm89, 24.0 GiB" in text
    assert "CUDA up to 13.0" in text
    assert "tensorrt        11.4.0.106" in text
    assert "tensorrt-rtx-1.7.1.116-default, fp32, decoder 1/4/8; student 1/4/8: runs here" in text
    assert "auto takes      tensorrt, fp32" in text
    assert "the installed onnxruntime leaves the GPU idle" in text


def test_why_an_engine_does_not_run_and_the_command_that_rebuilds(
    gpu: Any, bundle: Path, build: Builder
) -> None:
    build(version="1.6.0.1")
    result = doctor(bundle)
    assert result.exit_code == 0
    assert "does not run here" in result.stdout
    assert "- it was built with tensorrt-rtx 1.6.0.1, and here is 1.7.1.116" in result.stdout
    assert f"rebuild: ddexport trt {bundle} --backend tensorrt-rtx" in result.stdout
    assert "auto takes      onnxruntime, cpu, fp32" in result.stdout


def test_json_has_all_of_it(gpu: Any, bundle: Path, build: Builder) -> None:
    build("tensorrt")
    found = json.loads(doctor(bundle, "--json").stdout)
    assert found["gpus"] == [{"index": 0, "name": "Toy GPU", "capability": [8, 9], "memory": 24 << 30}]
    assert [each["name"] for each in found["packages"]] == [
        "onnxruntime",
        "openvino",
        "tensorrt",
        "tensorrt-rtx",
        "cuda-bindings",
    ]
    assert found["bundle"]["auto"] == "tensorrt, fp32"
    assert found["bundle"]["engines"][0]["roles"] == {"decoder": ["1/4/8"], "student": ["1/4/8"]}
    assert {way["name"]: way["usable"] for way in found["bundle"]["ways"]} == {
        "tensorrt, fp32": True,
        "onnxruntime, cuda, fp32": False,
        "openvino, fp32": False,
        "onnxruntime, cpu, fp32": True,
    }


def with_openvino() -> Machine:
    return Machine(
        cpu=Cpu("Toy Xeon", 8, ("AVX-512", "VNNI", "BF16", "AMX-BF16", "AMX-INT8")),
        gpus=(),
        cuda_problem="no driver",
        driver=None,
        cuda=None,
        providers=("CPUExecutionProvider",),
        onnxruntime=Package("onnxruntime", "1.31.0", None),
        openvino=Package("openvino", "2026.4.1", None),
        openvino_capabilities=("BF16", "WINOGRAD", "FP32", "INT8", "EXPORT_IMPORT"),
        engine_packages={},
        bindings=Package("cuda-bindings", None, "cuda-bindings is not installed: pip", missing=True),
        distributions={},
    )


def test_the_engines_of_a_cpu_with_times_and_verdicts(bundle: Path) -> None:
    """What auto takes and why, what was measured of each way, and what only runs when it is named."""
    machine, manifest = with_openvino(), read_manifest(bundle, verify=False)
    text = click.unstyle("\n".join(lines(diagnose(machine, bundle))))
    assert "Toy Xeon, 8 cores, AVX-512 VNNI BF16 AMX-BF16 AMX-INT8" in text
    assert "openvino        2026.4.1  computes in: fp32, bf16, int8" in text
    assert "auto takes      openvino, fp32\n                  because it is the first that needs no" in text
    assert "ask  openvino, bf16: the bundle states no limits for bf16" in text
    common: dict[str, Any] = {"threads": None, "steps": 1, "batch": 1, "precision": "fp32"}
    slow = Measured("openvino", "2026.4.1", mode="latency", total_ms=14.25, passed=True, **common)
    bad = Measured(
        "onnxruntime", "1.31.0", mode=None, total_ms=9.5, passed=False, why="2 tokens differ", **common
    )
    write_measured(bundle, manifest, machine, [slow, bad])
    found = diagnose(machine, bundle)
    text = click.unstyle("\n".join(lines(found)))
    assert "because it is the fastest that met the bundle's limits here: 14.2 ms" in text
    assert "yes  openvino, fp32: 14.25 ms, passed" in text
    assert "ask  onnxruntime, cpu, fp32: 9.5 ms, failed; measured here: 2 tokens differ" in text
    assert found.bundle
    assert {way.name: (way.total_ms, way.verdict) for way in found.bundle.ways if "cuda" not in way.name} == {
        "tensorrt": (None, "not measured"),
        "openvino, fp32": (14.25, "passed"),
        "openvino, bf16": (None, "not measured"),
        "onnxruntime, cpu, fp32": (9.5, "failed"),
    }


def test_a_broken_openvino_is_a_problem_and_no_way(bundle: Path) -> None:
    machine = with_openvino()
    machine.__dict__["openvino"] = Package("openvino", "2026.4.1", "openvino is broken: libtbb.so.12")
    found = diagnose(machine, bundle)
    assert "openvino is broken: libtbb.so.12" in found.problems
    assert found.bundle
    assert found.bundle.auto == "onnxruntime, cpu, fp32"
    assert [way.reasons for way in found.bundle.ways if way.name == "openvino, fp32"] == found.problems[:1]


def damage_graph(bundle: Path, folder: Path) -> str:
    (bundle / "student.onnx").write_bytes(b"x" * (bundle / "student.onnx").stat().st_size)
    return "the SHA-256 of student.onnx"


def damage_plan(bundle: Path, folder: Path) -> str:
    (folder / "student_fp32.plan").write_bytes(b"x" * (folder / "student_fp32.plan").stat().st_size)
    return "student_fp32.plan is not the file its sidecar describes"


def damage_sidecar(bundle: Path, folder: Path) -> str:
    (folder / "student_fp32.json").write_text("{}")
    return "student_fp32.json lacks the key role"


def lose_plan(bundle: Path, folder: Path) -> str:
    (folder / "decoder_fp32.plan").unlink()
    return "decoder_fp32.plan"


@pytest.mark.parametrize("damage", [damage_graph, damage_plan, damage_sidecar, lose_plan])
def test_a_bad_bundle_ends_with_one(
    gpu: Any, bundle: Path, build: Builder, damage: Callable[[Path, Path], str]
) -> None:
    message = damage(bundle, build())
    result = doctor(bundle)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 2


def test_both_onnxruntimes_are_a_problem(gpu: Any) -> None:
    both = {"onnxruntime": "1.31", "onnxruntime-gpu": "1.31"}
    (problem,) = [p for p in diagnose(Machine(distributions=both)).problems if "both installed" in p]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in problem
    assert not Machine(distributions={"onnxruntime-gpu": "1.31"}).both_onnxruntimes


@pytest.mark.parametrize(
    ("error", "missing", "problem"),
    [
        (ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt"), True, "is not installed: pip"),
        (
            ModuleNotFoundError("No module named 'tensorrt_bindings'", name="tensorrt_bindings"),
            False,
            "is broken: No module named 'tensorrt_bindings'",
        ),
        (
            ImportError("libnvonnxparser.so.11: cannot open shared object file"),
            False,
            "is broken: libnvonnxparser.so.11: cannot open",
        ),
        (RuntimeError("what\never"), False, "is broken: what; reinstall it: pip install --force-reinstall"),
    ],
)
def test_missing_and_broken_are_told_apart(
    error: Exception, missing: bool, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bindings without their libraries raise ImportError, and so does what a package needs and lacks."""

    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(machine_module.importlib, "import_module", fail)
    found = package("tensorrt", "tensorrt")
    assert found.missing == missing
    assert found.problem
    assert problem in found.problem


@pytest.mark.parametrize(
    ("code", "version", "problem"),
    [
        ("__version__ = '11.4'", "11.4", None),
        ("raise ImportError('libnvinfer.so.11: cannot open')", None, "is broken: ImportError: libnvinfer.so"),
        ("import os; os.abort()", None, "is broken: its import ends with -6"),
    ],
)
def test_two_packages_for_engines_are_tried_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, version: str | None, problem: str | None
) -> None:
    """They register types of the same names, and one that crashes must not take doctor along."""
    (tmp_path / "tensorrt.py").write_text(code)
    (tmp_path / "tensorrt_rtx.py").write_text("__version__ = '1.7'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    found = Machine().engine_packages
    assert found["tensorrt-rtx"] == Package("tensorrt-rtx", "1.7", None)
    assert found["tensorrt"].version == version
    assert (found["tensorrt"].problem is None) == (problem is None)
    assert (problem or "") in (found["tensorrt"].problem or "")
    assert not {"tensorrt", "tensorrt_rtx"} & set(sys.modules)


def test_a_namespace_without_its_module_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some other package may bring the folder `cuda`."""

    def fail(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'cuda.bindings'", name="cuda.bindings")

    monkeypatch.setattr(machine_module.importlib, "import_module", fail)
    assert package("cuda-bindings", "cuda.bindings.runtime").missing


@pytest.mark.parametrize(
    ("known", "problem"),
    [
        ({"onnxruntime": Package("onnxruntime", "1", "it is broken")}, "it is broken"),
        (
            {"bindings": Package("cuda-bindings", None, "cuda-bindings is not installed", missing=True)},
            "tensorrt cannot run engines alone: cuda-bindings is not installed",
        ),
        (
            {"bindings": Package("cuda-bindings", "12.9", None)},
            "tensorrt is made for CUDA 13, and cuda-bindings for CUDA 12: pip install 'cuda-bindings==13.*'",
        ),
        ({"cuda": (12, 4)}, "the driver supports CUDA 12.4: install a newer driver"),
    ],
)
def test_what_does_not_go_together(gpu: Any, known: dict[str, Any], problem: str) -> None:
    assert any(problem in text for text in diagnose(Machine(**known)).problems)


def test_without_a_driver_the_error_is_cudas(gpu: Any) -> None:
    gpu.cuda.driver = 0
    gpu.cuda.fail("cudaGetDeviceCount", type(gpu.cuda.cudaGetLastError()[0]).cudaErrorInsufficientDriver)
    found = ask_cuda()
    assert found.problem == (
        "no GPU can be used: no NVIDIA driver is loaded (cudaGetDeviceCount: cudaErrorInsufficientDriver)"
    )
    assert (found.gpus, found.cuda) == ((), None)


def test_nvidia_smi_stands_in_for_missing_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the GPU is seen before anything is installed for it."""
    text = "0, NVIDIA L4, 8.9, 23034\n1, NVIDIA GeForce RTX 5090, 12.0, 32607\nsomething else\n"
    monkeypatch.setattr(
        machine_module.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=text, returncode=0)
    )
    assert ask_nvidia_smi() == (
        Gpu(0, "NVIDIA L4", (8, 9), 23034 << 20),
        Gpu(1, "NVIDIA GeForce RTX 5090", (12, 0), 32607 << 20),
    )

    def fail(*arguments: Any, **named: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(machine_module.subprocess, "run", fail)
    assert ask_nvidia_smi() == ()


def test_the_drivers_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n",
    ):
        file.write_text(text)
        assert driver_version(file) == "580.95.05"
    assert driver_version(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        (
            "model name\t: Toy Xeon\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_bf16 avx_vnni\n",
            "Toy Xeon",
            ("AVX2", "AVX-512", "VNNI", "AMX-BF16"),
        ),
        ("model name\t: Old\nflags\t\t: fpu sse2\n", "Old", ()),
        ("Features\t: fp asimd asimddp bf16 i8mm\n", None, ("DOTPROD", "I8MM", "BF16")),
        ("nothing of use", None, None),
    ],
)
def test_the_features_of_the_cpu(
    tmp_path: Path, text: str, name: str | None, features: tuple[str, ...] | None
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    cpu = read_cpu(file)
    assert cpu.features == features
    assert cpu.cores >= 1
    assert name is None or cpu.name == name


def test_an_openvino_without_its_part_for_cpus_can_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, *arguments: str) -> Any:
            raise RuntimeError("Device with CPU name is not registered")

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    assert Machine(openvino=Package("openvino", "2026.4.1", None)).openvino_capabilities == ()
    assert Machine(openvino=Package("openvino", None, "missing", True)).openvino_capabilities == ()


def test_installed_names_are_normal() -> None:
    assert importlib.metadata.version("onnxruntime") == installed()["onnxruntime"]
    assert all(name == name.lower() and "_" not in name for name in installed())
