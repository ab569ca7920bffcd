"""Draws the images of many requests together: what came while the engine ran is the next batch.

Nobody waits for company, and no image depends on it: every request has the noise of its own seed, and an
engine that rounds differently in a batch is given one image at a time.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.bundle import FULL
from ddexport.runtime.company import PROBE, same_in_company
from ddexport.runtime.conditions import joined
from ddexport.runtime.errors import BackendError, DDError, LabelError, NoiseError, ScheduleError, TextError
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.pipeline import CPU_BATCH, Pipeline, default_batch_size
from ddexport.runtime.server.metrics import Metrics

OWN_FAULTS = (LabelError, NoiseError, ScheduleError, TextError)  # of a request, whatever the engine does
LONGEST_RETRY = 60  # seconds

logger = logging.getLogger(__name__)


class QueueFullError(DDError):
    """As many images wait as may."""

    def __init__(self, retry_after: int) -> None:
        """retry_after: seconds until there may be room."""
        super().__init__("too many images wait to be drawn", f"Try again in {retry_after} s.")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Drawn:
    """What a request gets: images uint8 (N, H, W, C), and the seconds until their batch began."""

    images: NDArray[np.uint8]
    waited: float


@dataclass(frozen=True, eq=False)
class Job:
    """A request: `count` images of a prompt, which is a label, its number or a sentence.

    steps: None for the fewest. made: when it came.
    """

    prompt: str
    count: int
    seed: int
    steps: int | str | None = None
    decoder: str = FULL
    future: Future[Drawn] = field(default_factory=Future)
    made: float = field(default_factory=time.monotonic)


class Batcher:
    """The queue of a bundle and the thread that draws what is in it; its other methods may be called from any
    thread."""

    def __init__(
        self,
        pipe: Pipeline,
        max_batch: int | None,
        max_queue: int,
        metrics: Metrics,
        on_fault: Callable[[DDError], None] = lambda error: None,
    ) -> None:
        """max_batch: images drawn at once, None for as many as are useful and fit. max_queue: images that may
        wait. on_fault: told when the engine has failed for good. Draws some images first, and raises
        BackendError if that is impossible, TextError for a bundle without its text encoder."""
        self.pipe, self.name, self.max_queue = pipe, pipe.manifest.name, max_queue
        self._metrics, self._on_fault = metrics, on_fault
        max_batch = max_batch or min(CPU_BATCH, default_batch_size(pipe.manifest, pipe.schedule()))
        self.max_batch = min(max_batch, pipe.backend.max_batch or max_batch)
        if self.max_batch > 1 and not same_in_company(pipe, self.max_batch):
            logger.warning(
                "%s: %s rounds differently in batches, so images are drawn one by one",
                self.name,
                pipe.backend.configuration,
            )
            self.max_batch = 1
        self.fault: DDError | None = None
        self.waiting = 0  # images
        self._jobs: list[Job] = []
        self._closed = False
        self._changed = threading.Condition()
        self._seconds = 0.1  # of an image, lately
        metrics.watch_queue(self.name, lambda: self.waiting)
        self._draw([Job(PROBE, 1, 0)])
        self._thread = threading.Thread(target=self._run, name=f"draws {self.name}", daemon=True)
        self._thread.start()

    def check(self, job: Job) -> None:
        """Raises LabelError, ScheduleError, BundleError for a request that cannot be drawn."""
        self.pipe.schedule(job.steps)
        self.pipe.manifest.decoder(job.decoder, self.pipe.backend.configuration.graphs)
        if self.pipe.texts is None:
            self.pipe.conditions(job.prompt)

    def submit(self, job: Job) -> None:
        """Queues a request, whose `future` gets what is drawn or the error. Raises QueueFullError, and
        BackendError when the engine has failed for good."""
        with self._changed:
            if self.fault is not None:
                raise self.fault
            if self.waiting + job.count > self.max_queue:
                seconds = math.ceil(self.waiting * self._seconds)
                raise QueueFullError(min(max(seconds, 1), LONGEST_RETRY))
            job.future.set_running_or_notify_cancel()  # from here on only the thread ends it
            self._jobs.append(job)
            self.waiting += job.count
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """Frees the place of a request that nobody waits for; nothing if it is not queued."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self.waiting -= job.count

    def close(self) -> None:
        """Draws what is queued, then ends the thread and frees the engine."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self.pipe.close()

    def _run(self) -> None:
        while batch := self._next():
            self._serve(batch)

    def _next(self) -> list[Job]:
        """The oldest request and what can be drawn with it; waits for one, empty when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            taken: list[Job] = []
            images = 0
            for job in self._jobs:
                fits = not taken or images + job.count <= self.max_batch
                if fits and (job.steps, job.decoder) == (self._jobs[0].steps, self._jobs[0].decoder):
                    taken.append(job)
                    images += job.count
            self._jobs = [job for job in self._jobs if job not in taken]
            self.waiting -= images
        return taken

    def _serve(self, batch: list[Job]) -> None:
        """Answers every request of a batch. One that fails does not harm the others: all are drawn again
        alone."""
        began = time.monotonic()
        try:
            images = self._draw(batch)
        except Exception as error:
            if len(batch) > 1:
                logger.warning("%s: a batch failed, its requests are drawn alone: %s", self.name, error)
                for job in batch:
                    self._serve([job])
                return
            batch[0].future.set_exception(error)
            if not isinstance(error, OWN_FAULTS) and self.fault is None:
                logger.error("%s: a request failed", self.name, exc_info=error)
                self._probe()
            return
        start = 0
        for job in batch:
            job.future.set_result(Drawn(images[start : start + job.count], began - job.made))
            start += job.count
        self._seconds += 0.2 * ((time.monotonic() - began) / len(images) - self._seconds)

    def _draw(self, batch: list[Job]) -> NDArray[np.uint8]:
        """The images of requests of one schedule and decoder, in their order. Raises DDError."""
        if self.fault is not None:
            raise self.fault
        size, schedule = self.pipe.manifest.sequence, self.pipe.schedule(batch[0].steps)
        parts = [self.pipe.conditions(job.prompt).rows(np.zeros(job.count, np.int64)) for job in batch]
        noise = [gaussian_noise(job.seed, range(job.count), size.length, size.width) for job in batch]
        uniforms = None
        if schedule.teacher is not None:
            numbers = [uniform_numbers(job.seed, range(job.count), size.length) for job in batch]
            uniforms = np.concatenate(numbers)
        most = self.max_batch
        if schedule.teacher is not None:  # its caches need room
            most = min(most, default_batch_size(self.pipe.manifest, schedule))
        result = self.pipe(
            joined(parts),
            batch[0].steps,
            noise=np.concatenate(noise),
            output="numpy",
            batch_size=most,
            decoder=batch[0].decoder,
            uniforms=uniforms,
        )
        self._metrics.drew(self.name, len(result), most, result.seconds)
        assert isinstance(result.images, np.ndarray)
        return result.images

    def _probe(self) -> None:
        """Tells whether the engine still draws what it drew at the start; if not, fails for good."""
        try:
            self._draw([Job(PROBE, 1, 0)])
        except Exception as error:
            logger.error("%s: the engine has failed for good", self.name, exc_info=error)
            with self._changed:
                self.fault = BackendError(
                    f"the engine of {self.name} has failed for good: {error}", "Start the server again."
                )
                left, self._jobs, self.waiting = self._jobs, [], 0
            for job in left:
                job.future.set_exception(self.fault)
            self._on_fault(self.fault)
