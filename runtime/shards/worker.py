"""What a process does that draws shards: the same on this machine and on a cluster."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.backends import Configuration, choose
from ddexport.runtime.bundle import FILE_NAME, read_manifest, sha256_of
from ddexport.runtime.company import same_in_company
from ddexport.runtime.conditions import Conditions
from ddexport.runtime.errors import BundleError
from ddexport.runtime.files import atomic_write
from ddexport.runtime.images import to_pil
from ddexport.runtime.pipeline import CPU_BATCH, default_batch_size, load
from ddexport.runtime.shards.image_set import shard_name, write_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What all workers need to know. bundle, folder: absolute paths. engine: backend, device, precision and
    threads, as `load` takes them. request: steps, seed, decoder and sampling, as a pipeline does. prompts: of
    a text model. batch_size: None for the worker's choice. manifest: the SHA-256 of the bundle's."""

    bundle: Path
    folder: Path
    engine: Mapping[str, Any]
    request: Mapping[str, Any]
    prompts: tuple[str, ...] = ()
    batch_size: int | None = None
    manifest: str = ""


def configuration(task: Task) -> Configuration:
    """The engine that would run here. Raises BackendError, BundleError."""
    how = (task.engine[name] for name in ("backend", "precision", "device"))
    return choose(task.bundle, read_manifest(task.bundle, verify=False), *how)


class Worker:
    """A bundle, from which shards are drawn once it is open."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def open(self) -> None:
        """Raises BackendError, and BundleError where another bundle lies at this place."""
        task, request = self.task, self.task.request
        if sha256_of(task.bundle / FILE_NAME) != task.manifest:
            raise BundleError(f"{task.bundle} is another bundle here", "Copy the same one to all machines.")
        how = {"steps": request["steps"], "decoder": request["decoder"]}
        self.pipe = load(task.bundle, verify=False, **task.engine, **how)
        self.texts = self.pipe.conditions(task.prompts) if task.prompts else None
        schedule = self.pipe.schedule(request["steps"], request.get("teacher_start"))
        engine, fit = self.pipe.backend, default_batch_size(self.pipe.manifest, schedule)
        wanted = task.batch_size or (min(CPU_BATCH, fit) if engine.configuration.device == "cpu" else fit)
        self.batch = min(wanted, engine.max_batch or wanted)
        if self.batch > 1 and not same_in_company(self.pipe, self.batch):
            note = "images depend on the batch size" if task.batch_size else "images are drawn one by one"
            logger.warning("%s rounds differently in batches: %s", engine.configuration, note)
            self.batch = task.batch_size or 1

    def draw(self, images: range, numbers: NDArray[np.int64]) -> Iterator[int]:
        """Writes the shard of a range of images, numbers (N,) their classes or prompts. Yields the size of
        every batch that is drawn; the shard is there at the end. Raises DDError."""
        named = self.task.prompts or self.pipe.labels.names
        kind = "prompt" if self.task.prompts else "class"
        given = self.texts.rows(numbers) if self.texts else Conditions(numbers)
        how: dict[str, Any] = {"first_image": images.start, "batch_size": self.batch, "output": "numpy"}
        index = images.start
        with atomic_write(self.task.folder / shard_name(images)) as stream:
            with tarfile.open(fileobj=stream, mode="w") as archive:
                for result in self.pipe.stream(given, **self.task.request, **how):
                    for image, label in zip(to_pil(result.images), result.labels.tolist(), strict=True):  # type: ignore[arg-type]
                        facts = {"index": index, "label": label, kind: named[label]}
                        write_image(archive, image, {**facts, "seed": self.task.request["seed"]})
                        index += 1
                    yield len(result)
            stream.flush()
            os.fsync(stream.fileno())  # else a machine that dies may keep the name without the content

    def draw_whole(self, images: range, numbers: NDArray[np.int64]) -> int:
        """As `draw`, all at once; returns the number of images."""
        return sum(self.draw(images, numbers))
