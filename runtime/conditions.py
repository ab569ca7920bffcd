"""What images are drawn from: classes, or texts by what student and teacher see of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.backends import Backend
from ddexport.runtime.bundle import ENCODER, PREFIXES, Manifest, resolve
from ddexport.runtime.errors import BackendError, TextError
from ddexport.runtime.text import Features, PromptTokenizer, check_prompts, left_padded

BATCH = 16  # texts at once
CHUNK = 256  # texts whose tables are kept: those of a real model take half a GiB


@dataclass(frozen=True)
class Conditions:
    """What N images are drawn from. numbers: int64 (N,), of each its class, or its text.

    tables: of texts, the inputs of "student" or "teacher" for a chunk of them, with a row a text. They are
    computed when they are needed, and once for all images and steps.
    """

    numbers: NDArray[np.int64]
    tables: Callable[[str, int], Mapping[str, NDArray[Any]]] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, index: Any) -> Conditions:
        """Those of the images that `index` selects."""
        return replace(self, numbers=self.numbers[index])

    def feeds(self, role: str) -> dict[str, NDArray[Any]]:
        """The inputs of a student's or a teacher's graph, a row an image."""
        if self.tables is None:
            return {"label": self.numbers}
        chunks, rows = np.divmod(self.numbers, CHUNK)
        parts = [(chunks == chunk, self.tables(role, int(chunk))) for chunk in np.unique(chunks)]
        feeds = {name: np.empty((len(self), *t.shape[1:]), t.dtype) for name, t in parts[0][1].items()}
        for own, table in parts:
            for name, values in feeds.items():
                values[own] = table[name][rows[own]]
        return feeds


def joined(parts: Sequence[Conditions]) -> Conditions:
    """Those of several requests as one, in their order; parts: all of classes, or all of texts."""
    if parts[0].tables is None:
        return Conditions(np.concatenate([part.numbers for part in parts]))

    @cache
    def whole(role: str) -> dict[str, NDArray[Any]]:
        feeds = [part.feeds(role) for part in parts]
        return {name: np.concatenate([rows[name] for rows in feeds]) for name in feeds[0]}

    def tables(role: str, chunk: int) -> dict[str, NDArray[Any]]:
        return {name: rows[chunk * CHUNK : (chunk + 1) * CHUNK] for name, rows in whole(role).items()}

    return Conditions(np.arange(sum(map(len, parts)), dtype=np.int64), tables)


class Texts:
    """Turns prompts, or their features, into conditions, with the graphs of a bundle that run once a text."""

    def __init__(self, root: Any, manifest: Manifest, engine: Backend | None) -> None:
        """engine: ONNX Runtime, None where it cannot run here."""
        assert manifest.text is not None
        self.root, self.manifest, self.size, self.engine = root, manifest, manifest.text, engine

    @property
    def backend(self) -> Backend:
        """Raises BackendError where there is none."""
        if self.engine is None:
            raise BackendError(
                "texts need ONNX Runtime, which cannot run here", 'pip install "ddexport[cpu]"'
            )
        return self.engine

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """That of the text encoder in the bundle. Raises TextError where there is none."""
        if self.size.tokenizer is None:
            raise TextError(
                f"the bundle {self.manifest.name} has no text encoder",
                "Give features of the prompts (--features), or export it with --text-encoder.",
            )
        return PromptTokenizer(resolve(self.root, self.size.tokenizer.file), self.size.tokens)

    def conditions(self, prompts: str | Iterable[str] | Features) -> Conditions:
        """One for each prompt. Raises TextError for what is no text, BackendError."""
        if isinstance(prompts, Features):
            shape = prompts.features.shape[1:]
            if shape != (self.size.tokens, self.size.width):
                want = f"{self.size.tokens} rows of {self.size.width} numbers"
                raise TextError(
                    f"the features must have {want}, but have {shape[0]} of {shape[1]}",
                    "Take the text encoder that the model was trained with.",
                )
            read: Callable[[slice], Features] = prompts.rows
            count = len(prompts)
        else:
            several = isinstance(prompts, Iterable) and not isinstance(prompts, (str, bytes))
            words: list[Any] = [prompts]
            if several and getattr(prompts, "ndim", True):
                words = list(prompts)
            check_prompts(words)
            _ = self.tokenizer  # it is told before anything is drawn that there is none
            count = len(words)

            def read(rows: slice) -> Features:
                return self.features(words[rows])

        chunk = lru_cache(maxsize=2)(lambda number: read(slice(number * CHUNK, (number + 1) * CHUNK)))
        tables = lru_cache(maxsize=4)(lambda role, number: self._prefix(chunk(number), role))
        return Conditions(np.arange(count, dtype=np.int64), tables)

    def features(self, prompts: list[str]) -> Features:
        """What the text encoder of the bundle makes of prompts. Raises TextError where there is none."""
        check_prompts(prompts)
        ids, mask = self.tokenizer(prompts)
        graph = self.manifest.graph(ENCODER)
        parts = [
            self.backend.run(graph, {"input_ids": ids[rows], "attention_mask": mask[rows]})["hidden"]
            for rows in _batches(len(ids))
        ]
        return left_padded(np.concatenate(parts), mask, self.size.tokens)

    def _prefix(self, features: Features, role: str) -> dict[str, NDArray[Any]]:
        """What the graphs of a role see of each text."""
        graph = self.manifest.graph(PREFIXES[role])
        feeds: dict[str, NDArray[Any]] = {"features": features.features, "features_mask": features.mask}
        parts: list[dict[str, NDArray[Any]]] = [
            self.backend.run(graph, {name: array[rows] for name, array in feeds.items()})
            for rows in _batches(len(features))
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batches(count: int) -> list[slice]:
    return [slice(start, start + BATCH) for start in range(0, count, BATCH)]
