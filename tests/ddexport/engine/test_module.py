"""Which TensorRT is taken, what is said where none can be, and what a build says while it works."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from ddexport.engine import module
from ddexport.engine.callbacks import Tracker, monitor_to
from ddexport.engine.module import ModuleError, load_tensorrt
from ddexport.runtime import machine
from ddexport.runtime.backends.tensorrt import logger_to
from ddexport.runtime.machine import Cuda, Gpu

GOOD = SimpleNamespace(__version__="11.4.0.1", Builder=object)


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`has(gpu, tensorrt=..., tensorrt_rtx=...)`: each a module, or the error of its import."""

    def prepare(gpu: Gpu | None, **packages: Any) -> None:
        def import_module(name: str) -> Any:
            package = packages.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
            if isinstance(package, BaseException):
                raise package
            return package

        monkeypatch.setattr(machine, "cuda", lambda: Cuda((gpu,) if gpu else (), (13, 0), ""))
        monkeypatch.setattr(module.importlib, "import_module", import_module)

    return prepare


def test_auto_takes_the_package_that_can_build_here(has: Any, a_gpu: Gpu) -> None:
    """Protects the order: the full package is for the GPU at hand, and faster there."""
    has(a_gpu, tensorrt=GOOD, tensorrt_rtx=GOOD)
    assert load_tensorrt("auto").backend == "tensorrt"
    has(None, tensorrt=GOOD, tensorrt_rtx=GOOD)
    assert load_tensorrt("auto").backend == "tensorrt-rtx"
    has(a_gpu, tensorrt=ImportError("libnvinfer.so.11: cannot open"), tensorrt_rtx=GOOD)
    assert load_tensorrt("auto").backend == "tensorrt-rtx"
    has(None)
    with pytest.raises(ModuleError, match="there is none here") as caught:
        load_tensorrt("auto")
    assert "tensorrt_rtx is not installed" in caught.value.message
    assert "ddexport[tensorrt-rtx]" in caught.value.hint and "ddexport[tensorrt]" in caught.value.hint


@pytest.mark.parametrize(("backend", "package"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_a_missing_package_and_missing_libraries_are_told_apart(has: Any, backend: str, package: str) -> None:
    """Protects the hint: whoever has the bindings must not be told to install them again."""
    hints = set()
    for error, message in (
        (ModuleNotFoundError(f"No module named {package!r}", name=package), "is not installed"),
        (ImportError("libnvonnxparser.so.11: cannot open"), r"lacks its libraries: libnvonnxparser\.so\.11"),
        (ModuleNotFoundError("No module named 'x_bindings'", name="x_bindings"), "not complete"),
        (FileNotFoundError("Could not find: nvinfer_11.dll"), "lacks its libraries"),
    ):
        has(None, **{package: error})
        with pytest.raises(ModuleError, match=message) as caught:
            load_tensorrt(backend)
        hints.add(caught.value.hint)
    assert len(hints) == 3
    has(None, **{package: SimpleNamespace()})  # a folder of that name
    with pytest.raises(ModuleError, match="has no Builder"):
        load_tensorrt(backend)


def test_importing_the_command_imports_no_engine() -> None:
    """Protects --help where no TensorRT is installed, and its speed."""
    source = importlib.import_module("ddexport.commands.trt")
    assert not {"onnx", "tensorrt", "tensorrt_rtx", "filelock"} & set(vars(source))


def test_steps_are_counted_and_answered() -> None:
    """Protects Ctrl-C, which reaches TensorRT through the answer to a step, and the sign of life."""
    tracker = Tracker()
    monitor: Any = monitor_to(SimpleNamespace(IProgressMonitor=type("IProgressMonitor", (), {})), tracker)
    monitor.phase_start("build", None, 3)
    assert monitor.step_complete("build", 0) is True
    monitor.phase_finish("build")
    assert tracker.steps == 1
    tracker.cancelled = True
    assert monitor.step_complete("build", 1) is False


def test_errors_are_kept_and_the_rest_is_not(caplog: pytest.LogCaptureFixture) -> None:
    """Protects the rule that a logged error is a failure, and a warning is not."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    errors: list[str] = []
    logger: Any = logger_to(SimpleNamespace(ILogger=ILogger), errors)
    with caplog.at_level("DEBUG"):
        for level, text in enumerate(("internal", "error", "warning", "info", "verbose")):
            logger.log(level, text)
    assert errors == ["internal", "error"]
    assert [entry.message for entry in caplog.records] == ["internal", "error", "warning", "info"]
