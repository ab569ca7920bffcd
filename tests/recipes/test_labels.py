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
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"), key=lambda path: path.name)
SENSITIVE = [7, 403, 413, 445, 459, 465, 471, 491, 597, 652, 655, 657, 666, 680, 744, 763, 895]

# Spread over the whole range, so that a name lost or inserted anywhere shifts one of them.
ANCHORS = {
    0: "tench",
    7: "cock",
    65: "sea snake",
    151: "chihuahua",
    207: "golden retriever",
    281: "tabby",
    340: "zebra",
    388: "giant panda",
    417: "balloon",
    486: "cello",
    562: "fountain",
    620: "laptop",
    701: "parachute",
    779: "school bus",
    852: "tennis ball",
    919: "street sign",
    934: "hotdog",
    980: "volcano",
    985: "daisy",
    999: "toilet tissue",
}

# The thousand names as they were checked, one by one, against a second statement of the WordNet synsets. The
# class order is fixed for good: a change is a mistake unless only the wording of a name was meant to change.
IMAGENET_SHA256 = "e675a4d020f676b102b385c9f5058589ff6656c55362787131f074bfb29d3e95"


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_both_lists_are_here() -> None:
    """An empty glob would let every parametrised test below pass unseen."""
    assert {"digits", "imagenet"} <= set(LISTS)


@pytest.mark.parametrize("name", LISTS)
def test_shape_of_the_file(name: str) -> None:
    """The runtime reads `names` and `aliases`; a mistyped key would silently drop the aliases."""
    data = load(name)
    assert {"source", "names"} <= set(data) <= {"source", "names", "aliases"}
    assert isinstance(data["source"], str) and data["source"]
    aliases = data.get("aliases", {})
    for index, words in aliases.items():
        assert index == str(int(index)) and 0 <= int(index) < len(data["names"])
        assert words, f"class {index} has an empty list of aliases"


@pytest.mark.parametrize("name", LISTS)
def test_each_word_means_one_class(name: str) -> None:
    """Names and aliases together are unique whatever their case, else a label would mean two classes."""
    data = load(name)
    words = data["names"] + [word for words in data.get("aliases", {}).values() for word in words]
    twice = [word for word, count in Counter(word.casefold() for word in words).items() if count > 1]
    assert not twice


@pytest.mark.parametrize("name", LISTS)
def test_words_are_lower_case_and_tidy(name: str) -> None:
    """What a user can type: lower-case ASCII, no stray spaces or underscores."""
    data = load(name)
    words = data["names"] + [word for words in data.get("aliases", {}).values() for word in words]
    tidy = re.compile(r"[a-z0-9][a-z0-9'.-]*( [a-z0-9'.-]+)*( \([a-z]+\))?")
    assert [word for word in words if not tidy.fullmatch(word)] == []


@pytest.mark.parametrize("name", LISTS)
def test_no_word_is_a_number(name: str) -> None:
    """A number is a class index to the runtime, so a word that reads as one could never be asked for."""
    data = load(name)
    for word in data["names"] + [word for words in data.get("aliases", {}).values() for word in words]:
        with pytest.raises(ValueError, match="invalid literal"):
            int(word)


def test_digits() -> None:
    """Class n is the digit n."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert load("digits")["names"] == words


def test_imagenet_has_a_thousand_classes_in_order() -> None:
    """A list that is shifted by one draws the wrong thing for every name after the slip."""
    names = load("imagenet")["names"]
    assert len(names) == 1000
    assert {index: names[index] for index in ANCHORS} == ANCHORS


def test_imagenet_names_are_the_ones_that_were_checked() -> None:
    """Two names swapped between the anchors would pass every other test."""
    names = load("imagenet")["names"]
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == IMAGENET_SHA256


def test_imagenet_homonyms_are_qualified_and_the_bare_word_means_neither() -> None:
    """`crane` alone must not quietly pick the bird or the machine."""
    data = load("imagenet")
    names: list[str] = data["names"]
    aliases = {word for words in data["aliases"].values() for word in words}
    bare = Counter(name.split(" (")[0] for name in names if name.endswith(")"))
    assert bare == {"crane": 2, "cardigan": 2, "maillot": 2}
    assert not set(bare) & (set(names) | aliases)
    assert (names[134], names[517]) == ("crane (bird)", "crane (machine)")
    assert (names[264], names[474]) == ("cardigan (dog)", "cardigan (garment)")
    assert (names[638], names[639]) == ("maillot (tights)", "maillot (swimsuit)")


def test_imagenet_aliases_belong_to_their_class() -> None:
    """The aliases are stored by class number: a shifted block would send a word to its neighbour."""
    aliases = load("imagenet")["aliases"]
    known = {
        2: "white shark",
        281: "tabby cat",
        340: None,
        487: "mobile phone",
        675: None,
        779: None,
        817: "sport car",
    }
    known |= {895: "military plane", 934: "hot dog", 999: "toilet paper"}
    for index, word in known.items():
        assert (word in aliases[str(index)]) if word else (str(index) not in aliases)


def test_words_shared_by_two_classes_are_nobodys_alias() -> None:
    """`missile` is class 657 although it is a lemma of 744 too; `panda` is a lemma of two classes."""
    data = load("imagenet")
    aliases = {word for words in data["aliases"].values() for word in words}
    assert data["names"][657] == "missile" and "missile" not in aliases
    assert "panda" not in aliases and "panda" not in data["names"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_name_for_each_class(recipe: Path) -> None:
    """A recipe whose list is missing or too short would fail only at the end of an export."""
    yaml = pytest.importorskip("yaml")
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert len(load(data["labels"])["names"]) == data["classes"]


@pytest.mark.parametrize("recipe", ["var-d16", "var-d20", "var-d24"])
def test_published_recipes_carry_the_note_on_sensitive_classes(recipe: str) -> None:
    """The authors' safety note must travel with every published model, whole."""
    yaml = pytest.importorskip("yaml")
    data = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    listed = re.search(r"\(([\d, ]+)\)", data["licence"]["notes"])
    assert listed and [int(number) for number in listed[1].split(",")] == SENSITIVE


def test_the_page_names_the_sensitive_classes_as_the_list_does() -> None:
    """docs/labels.md repeats 17 names; it must not drift from the list."""
    names = load("imagenet")["names"]
    page = (ROOT / "docs" / "labels.md").read_text(encoding="utf-8")
    table = page.split("## Classes to look at twice")[1].split("##")[0]
    cells = {int(index): name for index, name in re.findall(r"(?<=\| )(\d+) \| ([a-z ]+?) \|", table)}
    assert cells == {index: names[index] for index in SENSITIVE}
