"""Dropping a file into the package registers it, and nothing is imported before it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ddexport.runtime.errors import BackendError
from ddexport.runtime.registry import load_plugin, plugins


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "toy_plugins"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "_base.py").touch()
    (folder / "second.py").write_text("raise RuntimeError('imported')")
    (folder / "first.py").write_text("VALUE = 1")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("toy_plugins", "toy_plugins.first"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "toy_plugins"


def test_files_without_underscore_are_the_plugins(package: str) -> None:
    assert plugins(package) == ["first", "second"]


def test_only_the_one_asked_for_is_imported(package: str) -> None:
    assert load_plugin(package, "first").VALUE == 1  # importing `second` would raise


def test_an_unknown_name_lists_what_there_is(package: str) -> None:
    with pytest.raises(BackendError) as caught:
        load_plugin(package, "frist", kind="engine", error=BackendError)
    assert caught.value.message == "there is no engine called 'frist'"
    assert caught.value.hint == "Did you mean first? There is: first, second."


@pytest.mark.parametrize("name", ["_base", "../first", "os", ""])
def test_only_registered_names_are_imported(package: str, name: str) -> None:
    with pytest.raises(BackendError, match="there is no plug-in"):
        load_plugin(package, name, error=BackendError)


def test_the_backends_of_the_project() -> None:
    assert "onnxruntime" in plugins("ddexport.runtime.backends")
