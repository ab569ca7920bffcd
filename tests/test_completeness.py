"""Whatever registers itself by its name has a test that names it and a row in a table of docs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ddexport.recipe import recipe_names
from ddexport.runtime.registry import plugins

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "ddexport.families",
    "ddexport.runtime.backends",
    "ddexport.validate.metrics",
    "ddexport.validate.features",
    "ddexport.distill.data",
    "ddexport.distill.trainers",
    "recipes",
)


def rows(package: str) -> list[str]:
    """The names in the table below the one heading of docs/ that names the folder of the package."""
    folder = package.replace(".", "/")
    folder = folder if (ROOT / folder).is_dir() else folder.removeprefix("ddexport/")
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))]
    parts = [part for page in pages for part in re.split(r"^##+ ", page, flags=re.M)[1:]]
    named = [part for part in parts if f"`{folder}/" in part.splitlines()[0]]
    assert len(named) == 1, f"docs/ need one heading that names {folder}/"
    return re.findall(r"^\| `([^`]+)` \|.*\w", named[0], flags=re.M)


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


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_has_a_test_and_one_row(package: str) -> None:
    names = recipe_names() if package == "recipes" else plugins(package)
    assert names and sorted(rows(package)) == sorted(names)
    assert [name for name in names if not modules_that_name(package, name)] == []
