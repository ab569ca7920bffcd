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
    for given, wanted in (("panda", [4]), (np.array([3, 1]), [3, 1]), (iter(["panda", 0]), [4, 0])):
        numbers = LABELS.indices(given)  # type: ignore[arg-type]
        assert (numbers.tolist(), numbers.dtype) == (wanted, np.int64)


def test_a_wrong_label_says_what_is_wrong_and_what_is_near() -> None:
    rows: list[tuple[Any, str, str]] = [
        ("golden retreiver", "'golden retreiver'", "'golden retriever' (class 1)"),
        ("roster", "'roster'", "'rooster' (class 5)"),
        ("xxxxxx", "'xxxxxx'", "--list-labels"),
        (6, "0 to 5", ""),
        ("-1", "-1", ""),
        ("crane", "2 (crane (bird)), 3 (crane (machine))", ""),
        (1.5, "1.5", ""),
        (True, "True", ""),
    ]
    for label, named, near in rows:
        with pytest.raises(LabelError) as caught:
            LABELS.index(label)
        assert named in caught.value.message and near in caught.value.hint
    with pytest.raises(LabelError, match=r"0 \(a\), 2 \(A\)"):
        Labels(["a", "b", "A"]).index("a")
    with pytest.raises(LabelError):
        LABELS.indices([])


def test_a_damaged_label_file_is_refused(bundle: Path) -> None:
    path = bundle / "labels.json"
    assert read_labels(path, 3).index("a pair") == 2
    for content, named in (
        (b'{"names": ["a"]}', "1 names for 3 classes"),
        (b'{"names": ["a", "b", 3]}', "`names[2]`"),
        (b'{"names": ["a", "b", "c"], "aliases": {"3": ["d"]}}', "above 2"),
        (b'{"names": ["a", "b", "c"], "aliases": {"-1": ["d"]}}', "`aliases`"),
    ):
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"labels\.json") as caught:
            read_labels(path, 3)
        assert named in caught.value.message
