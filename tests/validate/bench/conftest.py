"""An embedded bundle with its teacher, and workers in the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddexport.runtime.backends import choose
from ddexport.runtime.bundle import Manifest, read_manifest
from ddexport.runtime.errors import DDError
from ddexport.validate.bench import run
from ddexport.validate.bench.plan import Entry
from ddexport.validate.bench.session import Session
from ddexport.validate.bench.worker import WorkerError


@pytest.fixture(scope="session")
def bundle(embedded_bundle: Callable[[str], Path]) -> Path:
    """In all precisions, with a teacher. Do not write into it."""
    return embedded_bundle("digits-var")


@pytest.fixture(scope="session")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.fixture
def entry_of(bundle: Path, manifest: Manifest) -> Callable[..., Entry]:
    """entry_of(batch, steps, precision): of ONNX Runtime, on one thread."""

    def entry(batch: int = 1, steps: int | str = 1, precision: str = "fp32") -> Entry:
        return Entry(choose(bundle, manifest, "onnxruntime", precision, "cpu"), 1, batch, steps)

    return entry


class InProcess:
    """A worker without a process: the same session, called directly."""

    def __init__(self, threads: int) -> None:
        self.backend, self._session = "", Session()

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "open":
            self.backend = arguments[0].configuration.backend
        try:
            return getattr(self._session, method)(*arguments)
        except DDError as error:
            raise WorkerError(error.message, error.hint) from error

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    """The class of all workers of this test."""
    monkeypatch.setattr(run, "Worker", InProcess)
    return InProcess
