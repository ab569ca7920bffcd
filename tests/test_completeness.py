"""Whatever registers itself by its name has a test that names it and a row in docs/plugins.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ddexport.recipe import recipe_names
from ddexport.runtime.registry import plugins
from ddexport.validate import metrics

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plugins.md"
PACKAGES = (
    "ddexport.families",
    "ddexport.runtime.backends",
    "ddexport.validate.metrics",
    "ddexport.validate.features",
    "ddexport.distill.data",
    "ddexport.distill.trainers",
)


def registered(package: str) -> list[str]:
    return recipe_names() if package == "recipes" else plugins(package)


def section(package: str) -> str:
    """The part of the page about the plug-ins of a package: its heading names the folder."""
    folder = package.replace(".", "/")
    folder = folder if (ROOT / folder).is_dir() else folder.removeprefix("ddexport/")
    parts = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    named = [part for part in parts if f"`{folder}/" in part.splitlines()[0]]
    assert len(named) == 1, f"docs/plugins.md needs one heading that names {folder}/"
    return named[0]


def rows(package: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|.*\w", section(package), flags=re.M)


def modules_that_name(package: str, name: str) -> list[Path]:
    """Test modules that import the plug-in, are named after it, or have its name as a text of its own."""
    quoted = rf"""["']{re.escape(name)}(\.yaml)?["']"""
    imported = rf"{re.escape(package)}(\.{name}\b| import .*\b{name}\b)"
    pattern = re.compile(f"{quoted}|{imported}")
    return [
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__)
        and (path.stem == f"test_{name}" or pattern.search(path.read_text(encoding="utf-8")))
    ]


CASES = [(package, name) for package in (*PACKAGES, "recipes") for name in registered(package)]


@pytest.mark.parametrize(("package", "name"), CASES)
def test_has_a_test(package: str, name: str) -> None:
    assert modules_that_name(package, name), f"no test names {name} of {package}"


@pytest.mark.parametrize(("package", "name"), CASES)
def test_has_a_row(package: str, name: str) -> None:
    assert name in rows(package), f"docs/plugins.md has no row `{name}`"


@pytest.mark.parametrize("package", [*PACKAGES, "recipes"])
def test_no_row_is_left_over(package: str) -> None:
    """Each once, and none of something that was removed."""
    assert sorted(rows(package)) == sorted(registered(package))


def test_a_new_one_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above find what is missing: a plug-in is a file, and nobody wrote about this one."""

    name = "brand" + "_new"
    (tmp_path / f"{name}.py").touch()
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    assert name in registered("ddexport.validate.metrics")
    assert name not in rows("ddexport.validate.metrics")
    assert modules_that_name("ddexport.validate.metrics", name) == []
    assert {"ddexport.families", "ddexport.runtime.backends", "ddexport.validate.metrics", "recipes"} <= {
        p for p, _ in CASES
    }
