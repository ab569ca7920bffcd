"""Alternatives in turn, round after round, so that a noisy machine is as noisy for all of them."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ddexport.validate.bench.case import Times

LEAST_ROUNDS = 5
MOST_ROUNDS = 1000
LONG = 60.0  # seconds; a teacher's image that takes longer is drawn once
PAUSE = 0.005  # seconds between two runs: thread pools spin for some milliseconds after their work


@dataclass(frozen=True)
class Sample:
    """One run of a contender: its times, and the seconds that all its images together took."""

    times: Times
    wall: float


@dataclass(kw_only=True)
class Contender(ABC):
    """One row of the benchmark while it is timed.

    least: how many rounds it takes at least. error: why it takes part no longer.
    """

    least: int = LEAST_ROUNDS
    samples: dict[int, Sample] = field(default_factory=dict)
    error: str | None = None

    @abstractmethod
    def draw(self) -> Sample:
        """One run."""

    @property
    def spent(self) -> float:
        return sum(sample.wall for sample in self.samples.values())

    def wants(self, duration: float) -> bool:
        """Whether it needs another round."""
        count = len(self.samples)
        return self.error is None and (count < self.least or (self.spent < duration and count < MOST_ROUNDS))


def least_rounds(by_teacher: bool, seconds: float) -> int:
    """How many rounds a row needs whose first run took so long."""
    return 1 if by_teacher and seconds > LONG else LEAST_ROUNDS


def interleave(
    contenders: Sequence[Contender],
    duration: float,
    seed: int = 0,
    on_run: Callable[[], None] = lambda: None,
    errors: type[Exception] | tuple[type[Exception], ...] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Runs rounds until every contender has its time; in each, all that still want take one turn.

    duration: seconds of each contender. seed: of the order, which is another one in every round, so that
    none always follows the same. errors: what ends a contender, and not the benchmark.
    """
    shuffle, number = random.Random(seed), 0
    while pending := [one for one in contenders if one.wants(duration)]:
        shuffle.shuffle(pending)
        for one in pending:
            sleep(PAUSE)
            try:
                one.samples[number] = one.draw()
            except errors as error:
                one.error = str(error)
            on_run()
        number += 1
