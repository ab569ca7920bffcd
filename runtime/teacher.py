"""Generates tokens with the auto-regressive teacher: one loop for every family, with the caches held here.

Shapes: N batch, L positions, V codebook, n positions of one pass. docs/teacher.md has the rules in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.bundle import DAMAGED, Manifest, Teacher, resolve
from ddexport.runtime.errors import BackendError, BundleError, NoiseError, ScheduleError
from ddexport.runtime.schedule import Schedule, Span

Arrays = Mapping[str, Any]
Run = Callable[[Arrays], Arrays]
# Guided logits (N, n, V) of an AR step and its positions -> their tokens (N, n).
Pick = Callable[[NDArray[np.float32], slice], NDArray[np.int64]]
ONLY_TEACHER = ("teacher_start", "uniforms")
SAMPLING = ("guidance_scale", "top_k", "top_p", "temperature")
CHUNK = 1 << 21  # logits whose tokens are chosen at once: the float64 copies stay below 100 MB


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from logits: guidance, and which of them can be drawn.

    guidance_scale: the `cfg` of the published code. top_k: the number of tokens that can be drawn, 1 is
    greedy. top_p: their mass. temperature: divides the logits. Raises ScheduleError for a value out of range.
    """

    guidance_scale: float
    top_k: int
    top_p: float
    temperature: float

    def __post_init__(self) -> None:
        whole = isinstance(self.top_k, (int, np.integer)) and not isinstance(self.top_k, bool)
        rules = (
            ("guidance_scale", 0.0 <= self.guidance_scale < np.inf, "a finite number of at least 0"),
            ("top_k", whole and self.top_k >= 1, "an integer of at least 1"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("temperature", 0.0 < self.temperature < np.inf, "a finite number above 0"),
        )
        for name, holds, rule in rules:
            if not holds:
                fault = f"{name} must be {rule}, but is {getattr(self, name)}"
                raise ScheduleError(fault, "Leave it out to take the bundle's own.")

    @property
    def greedy(self) -> bool:
        return self.top_k == 1


def sampling_of(schedule: Schedule, teacher: Teacher | None, arguments: Mapping[str, Any]) -> Sampling | None:
    """How a schedule's teacher chooses, in the bundle's own manner where nothing is given; None without one.

    arguments: some of `SAMPLING` and `ONLY_TEACHER`. Raises ScheduleError for a value out of range, and for
    one that would have no effect; TypeError for another name.
    """
    if unknown := set(arguments) - {*SAMPLING, *ONLY_TEACHER}:
        raise TypeError(f"a pipeline takes no argument called {', '.join(sorted(unknown))}")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if teacher is None or schedule.teacher is None:
        if arguments:
            raise ScheduleError(
                f"{', '.join(arguments)} can only be given for steps that use the teacher",
                "Choose such steps, or leave it out.",
            )
        return None
    own = (teacher.cfg, teacher.top_k, teacher.top_p, teacher.temperature)
    return Sampling(*(arguments.get(name, value) for name, value in zip(SAMPLING, own, strict=True)))


class Cache(Protocol):
    """Keys and values of the positions so far; `feeds` are inputs of the teacher's graph."""

    feeds: Mapping[str, Any]

    def append(self, outputs: Arrays, start: int, end: int) -> None:
        """Takes the new rows of a pass, which belong to the positions from start to end."""


class HostCache:
    """A cache in the memory of the host: float32 (2, N, heads, capacity, width) each.

    The graph gives back the new rows only, which are written into buffers that are fed as they are: nothing
    is copied but what is new.
    """

    def __init__(self, teacher: Teacher, count: int, capacity: int) -> None:
        shape = (2, count, teacher.heads, capacity, teacher.head_width)
        names = [f"{what}_{layer}" for layer in range(teacher.layers) for what in ("key", "value")]
        self.feeds: Mapping[str, Any] = {name: np.zeros(shape, np.float32) for name in names}

    def append(self, outputs: Arrays, start: int, end: int) -> None:
        for name, rows in self.feeds.items():
            rows[:, :, :, start:end] = outputs[f"new_{name}"]


def generate(
    run: Run,
    teacher: Teacher,
    span: Span,
    prefix: NDArray[np.int64],
    condition: Arrays,
    cfg: float,
    pick: Pick,
    on_pass: Callable[[int], None] | None = None,
    new_cache: Callable[[Teacher, int, int], Cache] = HostCache,
) -> NDArray[np.int64]:
    """The tokens (N, end) of a span behind a prefix.

    run: the graph, with the inputs and outputs that the contract has for the teacher. prefix: int64
    (N, start). condition: its inputs that are the same in all passes, such as label (N,). cfg: guidance.
    pick: chooses the tokens of an AR step, as `by_uniforms` does. on_pass: told N after each pass, the first
    of which also carries the prefix. new_cache: makes the cache for N images and so many positions.
    """
    count, length = len(prefix), teacher.starts[-1]
    tokens = np.zeros((count, length), np.int64)
    tokens[:, : span.start] = prefix
    cache, filled = new_cache(teacher, count, span.end), 0
    for start, end in teacher.steps(span):
        outputs = run(
            {
                "tokens": tokens,
                **condition,
                "positions": np.arange(filled, end),
                "guidance": np.full(count, teacher.guidance_scale(start, cfg), np.float32),
                "filled": np.array([filled]),
                **cache.feeds,
            }
        )
        cache.append(outputs, filled, end)
        filled = end
        tokens[:, start:end] = pick(outputs["logits"][:, start - end :], slice(start, end))
        if on_pass is not None:
            on_pass(count)
    return tokens[:, : span.end]


def by_uniforms(uniforms: NDArray[np.float64], sampling: Sampling) -> Pick:
    """Chooses by the numbers (N, L) of the positions; see `choose`."""
    return lambda logits, positions: choose(logits, uniforms[:, positions], sampling)


def choose(
    logits: NDArray[np.float32], uniforms: NDArray[np.float64], sampling: Sampling
) -> NDArray[np.int64]:
    """One token a position: logits (..., V) and uniform numbers (...) between 0 and 1 -> int64 (...).

    Greedy takes the largest logit, the first of equal ones. Otherwise the cumulated weights of `weights` are
    inverted in index order. Raises BackendError for logits that are not finite.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if not np.isfinite(rows.max(axis=-1)).all():
        raise BackendError("the teacher's logits are not finite", "Try another precision of the bundle.")
    if sampling.greedy:
        return np.asarray(logits.argmax(axis=-1), dtype=np.int64)
    numbers, size = uniforms.reshape(-1), max(1, CHUNK // rows.shape[1])
    chosen = [
        _inverted(weights(rows[i : i + size], sampling), numbers[i : i + size])
        for i in range(0, len(rows), size)
    ]
    return np.concatenate(chosen).reshape(uniforms.shape)


def weights(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """What `choose` draws from: logits (R, V) -> float64 (R, V), proportional to the filtered probabilities.

    The largest is 1, those filtered out are 0. Top-k keeps what is at least the k-th largest logit; of that,
    top-p keeps what has less than p of the mass strictly above it. Both are one threshold a row, so equal
    logits share their fate and no order among them is needed.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    if sampling.top_k < scaled.shape[-1]:
        kth = np.partition(scaled, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scaled[scaled < kth] = -np.inf
    mass = np.exp(scaled)
    if sampling.top_p < 1.0:
        falling = np.sort(mass, axis=-1)[:, ::-1]
        above = np.zeros_like(falling)
        np.cumsum(falling[:, :-1], axis=-1, out=above[:, 1:])
        last = (above < sampling.top_p * falling.sum(axis=-1, keepdims=True)).sum(axis=-1) - 1
        mass[mass < np.take_along_axis(falling, last[:, None], axis=-1)] = 0.0
    return mass


def _inverted(mass: NDArray[np.float64], numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """The first index at which the cumulated mass (R, V) exceeds the share `numbers` (R,) of the whole."""
    cumulated = np.cumsum(mass, axis=-1)
    target = numbers[:, None] * cumulated[:, -1:]
    return np.asarray((cumulated > target).argmax(axis=-1), dtype=np.int64)


def check_uniforms(uniforms: Any, count: int, length: int) -> None:
    """Raises NoiseError unless `uniforms` is float64 (count, L), every number from 0 to below 1."""
    want = (count, length)
    if not isinstance(uniforms, np.ndarray) or uniforms.dtype != np.float64 or uniforms.shape != want:
        actual = f"{uniforms.dtype} {uniforms.shape}" if isinstance(uniforms, np.ndarray) else type(uniforms)
        fault = f"the uniform numbers must be a float64 array of shape {want}, but are {actual}"
        raise NoiseError(fault, "Give one for each image and position, or leave them out.")
    if not ((uniforms >= 0) & (uniforms < 1)).all():
        raise NoiseError("the uniform numbers must be from 0 to below 1", "Correct them, or leave them out.")


def read_codebook(root: Path, manifest: Manifest) -> NDArray[np.float32]:
    """The codebook (V, Cv) of a bundle with a teacher. Raises BundleError if it is another array."""
    teacher, size = manifest.teacher, manifest.sequence
    assert teacher is not None
    try:
        codebook: Any = np.load(resolve(root, teacher.codebook.file), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BundleError(f"{teacher.codebook.file} is not an npy file: {error}", DAMAGED) from error
    want = (size.codebook, size.width)
    if not isinstance(codebook, np.ndarray) or codebook.dtype != np.float32 or codebook.shape != want:
        raise BundleError(f"{teacher.codebook.file} is not float32 of shape {want}", DAMAGED)
    return codebook


def nearest_codes(vectors: NDArray[np.float32], codebook: NDArray[np.float32]) -> NDArray[np.int64]:
    """The index of the nearest codebook entry: vectors (N, P, Cv), codebook (V, Cv) -> int64 (N, P).

    By squared distance without its first term, which is the same for every entry; the first of equal ones.
    """
    squares = 0.5 * np.square(codebook).sum(axis=1)
    flat = vectors.reshape(-1, vectors.shape[-1])
    size = max(1, CHUNK // len(codebook))
    near = [(squares - flat[i : i + size] @ codebook.T).argmin(axis=-1) for i in range(0, len(flat), size)]
    return np.concatenate([np.empty(0, np.int64), *near]).reshape(vectors.shape[:-1])
