"""The bundles of `toy.py`, and spies on what the runtime opens and runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from ddexport.runtime.backends import Backend
from tests.runtime import fake_tensorrt, toy


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle, not to be changed."""
    return toy.write_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the toy bundle to change."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def shared_teacher_bundle(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle with a teacher, not to be changed."""
    return toy.add_teacher(shutil.copytree(shared_bundle, tmp_path_factory.mktemp("teacher") / "bundle"))


@pytest.fixture
def teacher_bundle(shared_teacher_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the toy bundle with a teacher."""
    return Path(shutil.copytree(shared_teacher_bundle, tmp_path / "teacher"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that ONNX Runtime opens from now on."""
    files: list[str] = []
    session = onnxruntime.InferenceSession

    def open_session(path: Path, *arguments: Any, **named: Any) -> Any:
        files.append(path.name)
        return session(path, *arguments, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    return files


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], tuple[str, ...] | None]]:
    """Every run of a graph from now on: its file, its inputs and the outputs asked for."""
    seen: list[tuple[str, dict[str, Any], tuple[str, ...] | None]] = []
    original = Backend.run

    def run(self: Any, graph: Any, feeds: Any, names: Any = None) -> Any:
        seen.append((graph.file, {name: array.copy() for name, array in feeds.items()}, names))
        return original(self, graph, feeds, names)

    monkeypatch.setattr(Backend, "run", run)
    return seen


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fake_tensorrt.FakeGpu:
    """A GPU made of plain memory, and both TensorRT packages."""
    return fake_tensorrt.install(monkeypatch, tmp_path / "cache")
