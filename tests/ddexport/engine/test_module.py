"""Which TensorRT is taken, and what is said where none can be."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from ddexport.engine import module
from ddexport.engine.module import ModuleError, load_tensorrt
from ddexport.runtime.machine import Gpu

GOOD = SimpleNamespace(__version__="11.4.0.1", Builder=object)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(gpu, tensorrt=..., tensorrt_rtx=...)`: each a module, or the error of its import."""

    def prepare(gpu: Gpu | None, **packages: Any) -> None:
        def import_module(name: str) -> Any:
            found = packages.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
            if isinstance(found, BaseException):
                raise found
            return found

        gpus = () if gpu is None else (gpu,)
        monkeypatch.setattr(module, "Machine", lambda: SimpleNamespace(gpus=gpus))
        monkeypatch.setattr(module.importlib, "import_module", import_module)

    return prepare


def test_auto_takes_full_tensorrt_where_there_is_a_gpu(machine: Any, a_gpu: Gpu) -> None:
    """Protects the order: the full package is for the GPU at hand, and faster there."""
    machine(a_gpu, tensorrt=GOOD, tensorrt_rtx=GOOD)
    assert load_tensorrt("auto").backend == "tensorrt"


def test_auto_takes_rtx_without_a_gpu(machine: Any) -> None:
    """Protects the build on a machine without a GPU, although the full package is installed."""
    machine(None, tensorrt=GOOD, tensorrt_rtx=GOOD)
    assert load_tensorrt("auto").backend == "tensorrt-rtx"


def test_auto_passes_over_an_incomplete_package(machine: Any, a_gpu: Gpu) -> None:
    """Protects against bindings without libraries hiding the package that works."""
    machine(a_gpu, tensorrt=ImportError("libnvinfer.so.11: cannot open"), tensorrt_rtx=GOOD)
    assert load_tensorrt("auto").backend == "tensorrt-rtx"


def test_auto_says_all_reasons(machine: Any) -> None:
    """Protects whoever has nothing installed: one error, both ways to install."""
    machine(None)
    with pytest.raises(ModuleError, match="there is none here") as caught:
        load_tensorrt("auto")
    assert "tensorrt_rtx is not installed" in caught.value.message
    assert "ddexport[tensorrt-rtx]" in caught.value.hint and "ddexport[tensorrt]" in caught.value.hint


@pytest.mark.parametrize(("backend", "package"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_a_missing_package_and_missing_libraries_are_told_apart(
    machine: Any, backend: str, package: str
) -> None:
    """Protects the hint: whoever has the bindings must not be told to install them again."""
    machine(None)
    with pytest.raises(ModuleError, match="is not installed") as missing:
        load_tensorrt(backend)
    machine(None, **{package: ImportError("libnvonnxparser.so.11: cannot open shared object file")})
    with pytest.raises(ModuleError, match=r"lacks its libraries: libnvonnxparser\.so\.11") as partial:
        load_tensorrt(backend)
    machine(None, **{package: ModuleNotFoundError("No module named 'x_bindings'", name="x_bindings")})
    with pytest.raises(ModuleError, match="not complete") as torn:
        load_tensorrt(backend)
    machine(None, **{package: FileNotFoundError("Could not find: nvinfer_11.dll")})
    with pytest.raises(ModuleError, match="lacks its libraries"):
        load_tensorrt(backend)
    assert len({missing.value.hint, partial.value.hint, torn.value.hint}) == 3


def test_another_package_of_that_name_is_not_tensorrt(machine: Any) -> None:
    """Protects against an empty folder named tensorrt, which Python imports without complaint."""
    machine(None, tensorrt_rtx=SimpleNamespace())
    with pytest.raises(ModuleError, match="has no Builder"):
        load_tensorrt("tensorrt-rtx")


def test_importing_the_commands_imports_no_engine() -> None:
    """Protects --help where no TensorRT is installed, and its speed."""
    for name in ("ddexport.commands.trt", "ddexport.commands.cache"):
        source = importlib.import_module(name)
        assert not {"onnx", "tensorrt", "tensorrt_rtx", "filelock"} & set(vars(source))
