"""The label lists: a name or an alias must always mean one class, and class n must be the n-th name."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "labels"
LISTS = sorted(path.stem for path in FOLDER.glob("*.json"))
SENSITIVE = [7, 403, 413, 445, 459, 465, 471, 491, 597, 652, 655, 657, 666, 680, 744, 763, 895]

# The thousand names as they were checked, one by one, against a second statement of the WordNet synsets. The
# class order is fixed for good: a change is a mistake unless only the wording of a name was meant to change.
IMAGENET_SHA256 = "e675a4d020f676b102b385c9f5058589ff6656c55362787131f074bfb29d3e95"


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_both_lists_are_here() -> None:
    """An empty glob would let every parametrised test below pass unseen."""
    assert {"digits", "imagenet"} <= set(LISTS)


@pytest.mark.parametrize("name", LISTS)
def test_each_word_means_one_class_and_can_be_typed(name: str) -> None:
    """The runtime reads `names` and `aliases`; a mistyped key would silently drop the aliases. Names and
    aliases are unique whatever their case, lower-case ASCII without stray spaces, and never a number, which
    is a class index."""
    data = load(name)
    assert {"source", "names"} <= set(data) <= {"source", "names", "aliases"}
    assert isinstance(data["source"], str) and data["source"]
    for index, words in data.get("aliases", {}).items():
        assert index == str(int(index)) and 0 <= int(index) < len(data["names"]) and words
    words = data["names"] + [word for words in data.get("aliases", {}).values() for word in words]
    assert [word for word, count in Counter(word.casefold() for word in words).items() if count > 1] == []
    tidy = re.compile(r"[a-z0-9][a-z0-9'.-]*( [a-z0-9'.-]+)*( \([a-z]+\))?")
    assert [word for word in words if not tidy.fullmatch(word) or word.isdigit()] == []


def test_digits() -> None:
    """Class n is the digit n."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert load("digits")["names"] == words


def test_imagenet_names_are_the_ones_that_were_checked() -> None:
    """A list that is shifted by one draws the wrong thing for every name after the slip."""
    names = load("imagenet")["names"]
    assert len(names) == 1000
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == IMAGENET_SHA256


def test_imagenet_words_that_name_two_classes() -> None:
    """`crane` alone must not quietly pick the bird or the machine; `panda` is a lemma of two classes."""
    aliases = {word for words in load("imagenet")["aliases"].values() for word in words}
    assert not {"crane", "cardigan", "maillot", "panda"} & aliases


def test_imagenet_aliases_belong_to_their_class() -> None:
    """The aliases are stored by class number: a shifted block would send a word to its neighbour."""
    aliases = load("imagenet")["aliases"]
    known = {2: "white shark", 281: "tabby cat", 487: "mobile phone", 817: "sport car", 895: "military plane",
             934: "hot dog", 999: "toilet paper"}  # fmt: skip
    assert all(word in aliases[str(index)] for index, word in known.items())
    assert not {"340", "675", "779"} & set(aliases)


@pytest.mark.parametrize("recipe", ["var-d16", "var-d20", "var-d24"])
def test_published_recipes_carry_the_note_on_sensitive_classes(recipe: str) -> None:
    """The authors' safety note must travel with every published model, whole."""
    yaml = pytest.importorskip("yaml")
    data = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    listed = re.search(r"\(([\d, ]+)\)", data["licence"]["notes"])
    assert listed and [int(number) for number in listed[1].split(",")] == SENSITIVE


def test_the_page_names_the_sensitive_classes_as_the_list_does() -> None:
    """The documentation repeats 17 names; they must not drift from the list."""
    names, heading = load("imagenet")["names"], "# Sensitive classes"
    (page,) = (text for path in (ROOT / "docs").glob("*.md") if heading in (text := path.read_text("utf-8")))
    section = " ".join(page.split(heading)[1].split("\n#")[0].replace(">", " ").split())
    assert [n for n in SENSITIVE if not re.search(rf"\b{n}\b[ |]+{re.escape(names[n])}\b", section)] == []
