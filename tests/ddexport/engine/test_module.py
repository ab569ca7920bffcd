"""Which TensorRT is taken, and what is said where none can be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ddexport.engine import module
from ddexport.engine.module import SWITCH, ModuleError, TensorRT, load_tensorrt
from ddexport.runtime import machine
from ddexport.runtime.machine import Cuda, Gpu


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`has(gpu, fault=...)`: the GPU, and why a package cannot be imported."""

    def prepare(gpu: Gpu | None, **faults: str) -> None:
        monkeypatch.setenv(SWITCH, "1")
        monkeypatch.setattr(machine, "cuda", lambda: Cuda((gpu,) if gpu else (), (13, 0), ""))
        monkeypatch.setattr(machine, "import_fault", lambda name, extra: faults.get(name, ""))

    return prepare


@pytest.mark.tensorrt
def test_auto_takes_the_package_that_can_build_here(has: Any, rtx: TensorRT, a_gpu: Gpu) -> None:
    """The full package is for the GPU at hand, and faster there. Polygraphy takes one package a process, and
    would build with the first without a word."""
    has(a_gpu)
    with pytest.raises(ModuleError, match="cannot use tensorrt"):
        load_tensorrt("auto")
    has(None)
    assert load_tensorrt("auto").is_rtx and load_tensorrt("auto").gpu is None
    has(a_gpu, tensorrt="tensorrt is broken (libnvinfer.so.11: cannot open)")
    assert load_tensorrt("auto").is_rtx and load_tensorrt("auto").gpu == a_gpu


def test_what_is_missing_is_named(has: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the bindings without the libraries, and a folder of the package's name."""
    for name in ("tensorrt_rtx", "polygraphy", "onnx", "filelock"):
        has(None, **{name: f"{name} is not installed"})
        with pytest.raises(ModuleError, match=name):
            load_tensorrt("auto")
    has(None)
    package = SimpleNamespace(USE_TENSORRT_RTX=True, __path__=["tensorrt_rtx"])
    monkeypatch.setattr(module, "import_module", lambda name: package)
    with pytest.raises(ModuleError):
        load_tensorrt("tensorrt-rtx")
