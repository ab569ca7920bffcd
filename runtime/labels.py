"""From what people call a class to its number."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.errors import BundleError, LabelError
from ddexport.runtime.records import DAMAGED, Record, convert, read_json

Label: TypeAlias = int | str


class _LabelFile(Record, frozen=True, kw_only=True):
    names: tuple[str, ...]
    aliases: Mapping[Annotated[int, msgspec.Meta(ge=0)], tuple[str, ...]] = {}
    source: str = ""


class Labels:
    """The class names of a bundle, one a class, and their aliases.

    Names are compared without regard to case and blanks. A text that reads as an integer is a class number.
    """

    def __init__(self, names: Iterable[str], aliases: Mapping[int, Iterable[str]] | None = None) -> None:
        self.names = tuple(names)
        self.aliases = {number: tuple(words) for number, words in (aliases or {}).items()}

    def __len__(self) -> int:
        return len(self.names)

    def index(self, label: Label) -> int:
        """The class number of a number or a name. Raises LabelError, which suggests the nearest name."""
        if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
            return self._in_range(int(label))
        if not isinstance(label, str):
            raise LabelError(f"a label is a class number or a name, not {label!r}")
        try:
            number = int(label)
        except ValueError:
            return self._named(label)
        return self._in_range(number)

    def indices(self, labels: Label | Iterable[Label]) -> NDArray[np.int64]:
        """The class numbers (N,) of one label or several. Raises LabelError, also when there are none."""
        if isinstance(labels, str) or not isinstance(labels, Iterable):
            labels = [labels]
        numbers = [self.index(label) for label in labels]
        if not numbers:
            raise LabelError("no label is given", "Give a class number or a name.")
        return np.array(numbers, dtype=np.int64)

    def _in_range(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise LabelError(
                f"label {number} is out of range: the model has classes 0 to {len(self) - 1}",
                "`--list-labels` prints all of them.",
            )
        return number

    def _named(self, label: str) -> int:
        key = _key(label)
        owners = self._owners.get(key) or self._unqualified.get(key, [])
        if len(owners) == 1 and key in self._owners:
            return owners[0]
        if owners:
            choices = ", ".join(f"{number} ({self.names[number]})" for number in owners)
            raise LabelError(f"the label {label!r} is ambiguous: {choices}", "Give the number.")
        near = difflib.get_close_matches(key, self._owners, 1)
        hint = "`--list-labels` prints all names."
        if near:
            number = self._owners[near[0]][0]
            hint = f"Did you mean {near[0]!r} (class {number})?"
        raise LabelError(f"no class is called {label!r}", hint)

    @cached_property
    def _owners(self) -> Mapping[str, list[int]]:
        """The classes that bear a name or an alias."""
        owners = defaultdict(list)
        for number, name in enumerate(self.names):
            for word in dict.fromkeys(_key(word) for word in (name, *self.aliases.get(number, ()))):
                owners[word].append(number)
        return dict(owners)

    @cached_property
    def _unqualified(self) -> Mapping[str, list[int]]:
        """For `crane (bird)` and `crane (machine)`: the classes of the bare word, which means neither."""
        owners = defaultdict(list)
        for number, name in enumerate(self.names):
            if name.endswith(")") and " (" in name:
                owners[_key(name[: name.rindex(" (")])].append(number)
        return dict(owners)


def read_labels(path: Path, classes: int) -> Labels:
    """Reads labels.json: `names`, one a class, and optionally `aliases` and `source`. Raises BundleError."""
    data = convert(_LabelFile, read_json(path), path.name)
    if len(data.names) != classes:
        raise BundleError(f"{path.name} has {len(data.names)} names for {classes} classes", DAMAGED)
    if any(number >= classes for number in data.aliases):
        raise BundleError(f"{path.name} has aliases of a class above {classes - 1}", DAMAGED)
    return Labels(data.names, data.aliases)


def _key(text: str) -> str:
    return " ".join(text.casefold().split())
