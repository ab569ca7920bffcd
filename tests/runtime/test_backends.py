"""An engine is checked on the way in and on the way out, and says what to install if it is missing."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddexport import runtime
from ddexport.runtime.backends._base import Arrays, Backend
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import BackendError
from ddexport.runtime.options import Options
from ddexport.runtime.selection import Candidate


class Echo(Backend):
    """Computes nothing: returns what the test has put into `answer`."""

    answer: dict[str, Any]
    opened = closed = 0

    @classmethod
    def available(cls) -> str | None:
        return None

    @classmethod
    def candidates(cls, *arguments: Any) -> list[Candidate]:
        return []

    def _open_impl(self) -> None:
        self.opened += 1

    def _close_impl(self) -> None:
        self.closed += 1

    def _run_impl(self, role: str, feeds: Arrays) -> Arrays:
        return self.answer


def feeds(batch: int = 2) -> dict[str, Any]:
    return {
        "tokens": np.zeros((batch, 6, 4), np.float32),
        "label": np.zeros(batch, np.int64),
        "known": np.zeros(batch, np.int64),
    }


def answer(batch: int = 2) -> dict[str, Any]:
    return {"sequence": np.zeros((batch, 6, 4), np.float32), "logits": np.zeros((batch, 2, 5), np.float32)}


def graphs(bundle: Path) -> dict[str, Any]:
    manifest = read_manifest(bundle, verify=False)
    return {role: manifest.graph(role) for role in ("student", "decoder")}


@pytest.fixture
def echo(shared_bundle: Path) -> Echo:
    backend = Echo(shared_bundle, graphs(shared_bundle))
    backend.answer = answer()
    return backend


WRONG_FEEDS: list[tuple[dict[str, Any], str]] = [
    ({"extra": np.zeros(2)}, "inputs of student.onnx are tokens, label, known, but are given as"),
    ({"label": np.zeros(2, np.int32)}, "label must be int64, but is int32"),
    ({"tokens": np.zeros((2, 6, 4))}, "tokens must be float32, but is float64"),
    ({"tokens": np.zeros((2, 5, 4), np.float32)}, "shape ['batch', 6, 4], but has [2, 5, 4]"),
    ({"label": np.zeros((2, 1), np.int64)}, "label must have shape ['batch'], but has [2, 1]"),
    ({"known": np.zeros(3, np.int64)}, "but has [3] where batch is 2"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_FEEDS)
def test_inputs_are_checked(echo: Echo, change: dict[str, Any], message: str) -> None:
    with echo, pytest.raises(BackendError, match=re.escape(message)):
        echo.run("student", feeds() | change)


WRONG_ANSWERS: list[tuple[dict[str, Any], str]] = [
    ({"logits": np.zeros((2, 2, 5), np.float16)}, "outputs of student.onnx: logits must be float32"),
    ({"logits": np.zeros((3, 2, 5), np.float32)}, "but has [3, 2, 5] where batch is 2"),
    ({"more": np.zeros(1)}, "outputs of student.onnx are sequence, logits"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_ANSWERS)
def test_outputs_are_checked(echo: Echo, change: dict[str, Any], message: str) -> None:
    echo.answer |= change
    with echo, pytest.raises(BackendError, match=re.escape(message)):
        echo.run("student", feeds())


def test_it_opens_and_closes_once(echo: Echo) -> None:
    with echo:
        echo.open()
        assert echo.run("student", feeds())["logits"].shape == (2, 2, 5)
        with pytest.raises(BackendError, match="no graph for the role 'teacher'"):
            echo.run("teacher", {})
    echo.close()
    assert (echo.opened, echo.closed) == (1, 1)
    with pytest.raises(BackendError, match="is closed"):
        echo.run("student", feeds())


def test_threads_must_be_positive(shared_bundle: Path) -> None:
    with pytest.raises(BackendError, match="threads must be at least 1"):
        runtime.load(shared_bundle, threads=0)


def test_an_engine_that_is_not_installed_says_what_to_install(
    shared_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(BackendError) as caught:
        OnnxRuntime(shared_bundle, graphs(shared_bundle)).open()
    assert caught.value.message == "backend onnxruntime cannot be used"
    assert "pip install onnxruntime" in caught.value.hint


def test_an_unknown_engine_lists_those_there_are(shared_bundle: Path) -> None:
    with pytest.raises(BackendError, match="no backend called 'onnxruntme'") as caught:
        runtime.load(shared_bundle, backend="onnxruntme")
    assert "Did you mean onnxruntime?" in caught.value.hint


def test_a_graph_that_is_no_graph(bundle: Path, replace_file: Callable[[str, bytes], None]) -> None:
    replace_file("decoder.onnx", b"not a graph")
    with pytest.raises(BackendError, match=r"onnxruntime cannot load decoder\.onnx"):
        OnnxRuntime(bundle, graphs(bundle)).open()


def test_a_graph_that_is_not_the_one_in_the_manifest(lying_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"inputs of student\.onnx are not those that bundle\.json names"):
        OnnxRuntime(lying_bundle, graphs(lying_bundle)).open()


def test_a_failure_of_the_engine_is_a_short_message(shared_bundle: Path) -> None:
    """A label that the table of the graph lacks: the engine refuses it while it runs."""
    with OnnxRuntime(shared_bundle, graphs(shared_bundle), Options(threads=1)) as backend:
        with pytest.raises(BackendError, match=r"onnxruntime failed on student\.onnx") as caught:
            backend.run("student", feeds() | {"label": np.array([0, 99])})
        assert "\n" not in caught.value.message
