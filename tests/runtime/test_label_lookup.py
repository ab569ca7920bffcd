"""From names to class numbers, and what is said when that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddexport.runtime.errors import BundleError, LabelError
from ddexport.runtime.labels import Labels, read_labels

NAMES = ("tench", "Golden Retriever", "crane (bird)", "crane (machine)", "panda", "cock")
LABELS = Labels(NAMES, {1: ["yellow dog"], 5: ["rooster"], 0: ["Tench"]})


def test_numbers_names_and_aliases() -> None:
    rows = [(0, 0), (np.int64(5), 5), ("4", 4), (" 4 ", 4), ("tench", 0), ("rooster", 5), ("yellow dog", 1),
            ("golden retriever", 1), ("  GOLDEN   retriever ", 1), ("Crane (Machine)", 3)]  # fmt: skip
    assert [(label, LABELS.index(label)) for label, _ in rows] == rows


@pytest.mark.parametrize(
    ("label", "message", "hint"),
    [
        ("golden retreiver", "'golden retreiver'", "'golden retriever' (class 1)"),
        ("roster", "'roster'", "'rooster' (class 5)"),
        ("xxxxxx", "'xxxxxx'", "--list-labels"),
        (6, "label 6 is out of range: the model has classes 0 to 5", "--list-labels"),
        ("-1", "label -1 is out of range", "--list-labels"),
        ("crane", "ambiguous: 2 (crane (bird)), 3 (crane (machine))", "number"),
        (1.5, "not 1.5", ""),
        (True, "not True", ""),
        (None, "not None", ""),
    ],
)
def test_a_wrong_label_says_what_is_wrong_and_what_is_near(label: Any, message: str, hint: str) -> None:
    with pytest.raises(LabelError) as caught:
        LABELS.index(label)
    assert message in caught.value.message and hint in caught.value.hint


def test_a_name_of_two_classes_is_ambiguous() -> None:
    with pytest.raises(LabelError, match=r"ambiguous: 0 \(a\), 2 \(A\)"):
        Labels(["a", "b", "A"]).index("a")


def test_one_label_or_several() -> None:
    assert LABELS.indices("panda").tolist() == [4]
    assert LABELS.indices(np.array([3, 1])).tolist() == [3, 1]
    assert LABELS.indices(iter(["panda", 0])).tolist() == [4, 0]
    assert LABELS.indices(2).dtype == np.int64
    with pytest.raises(LabelError, match="no label"):
        LABELS.indices([])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"names": ["a"]}', "1 names for 3 classes"),
        (b'{"nmaes": ["a", "b", "c"]}', "`nmaes`"),
        (b'{"names": ["a", "b", "c"], "alias": {}}', "`alias`"),
        (b'{"names": ["a", "b", 3]}', "at `names[2]`"),
        (b'{"names": ["a", "b", "c"], "aliases": {"3": ["d"]}}', "aliases of a class above 2"),
        (b'{"names": ["a", "b", "c"], "aliases": {"x": ["d"]}}', "`key` in `aliases`"),
        (b'{"names": ["a", "b", "c"], "aliases": {"-1": ["d"]}}', "`key` in `aliases`"),
        (b"[]", "Expected `object`"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"names": [], "names": []}', "stands twice"),
    ],
)
def test_a_damaged_label_file_is_refused(content: bytes, named: str, bundle: Path) -> None:
    assert read_labels(bundle / "labels.json", 3).index("a pair") == 2
    (bundle / "labels.json").write_bytes(content)
    with pytest.raises(BundleError) as caught:
        read_labels(bundle / "labels.json", 3)
    assert "labels.json" in caught.value.message and named in caught.value.message
