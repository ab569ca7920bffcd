"""`ddexport sample --shards`: draws what is missing of a set of images."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime import console
from ddexport.runtime.backends import Configuration
from ddexport.runtime.bundle import FILE_NAME, Manifest, sha256_of
from ddexport.runtime.files import make_directory
from ddexport.runtime.shards import local, on_ray
from ddexport.runtime.shards.image_set import ImageSet, ShardError, digest, open_set, read_shard, shard_name
from ddexport.runtime.shards.worker import Task, configuration
from ddexport.runtime.teacher import sampling_of

logger = logging.getLogger(__name__)


def draw_set(
    task: Task,
    manifest: Manifest,
    numbers: NDArray[np.int64],
    shard_size: int,
    workers: int | None,
    address: str | None,
) -> dict[str, Any]:
    """Draws the shards that are not there, and returns the report.

    numbers: (N,) the class or prompt of each image. workers: None for as many as CPUs, or cluster, have room
    for. address: of a Ray cluster, "local" for one of this machine; None for processes of this machine.
    Raises DDError; what is drawn by then stays, and the same call goes on.
    """
    began = time.perf_counter()
    task = replace(task, manifest=sha256_of(task.bundle / FILE_NAME))
    with ExitStack() as closing:
        ray = closing.enter_context(on_ray.cluster(address)) if address else None
        chosen = on_ray.configured(ray, task) if ray else configuration(task)
        how = {"backend": chosen.backend, "precision": chosen.precision, "device": chosen.device}
        task = replace(task, engine={**task.engine, **how})
        whole, steps = _described(task, manifest, chosen, numbers, shard_size)
        closing.enter_context(_owned(task))
        open_set(task.folder, whole)
        shards = [(images, numbers[images.start : images.stop]) for images in whole.ranges]
        with console.stage("checking what is there", keep=False):
            shards = [shard for shard in shards if not _is_there(task, *shard)]
        to_draw = sum(len(images) for images, _ in shards)
        if not (ray or workers):
            room = len(os.sched_getaffinity(0)) // task.engine["threads"]
            workers = max(1, room) if whole.device == "cpu" else 1
        first, loaded = 0, began  # the first batch, until which the bundle is loaded
        with console.progress(to_draw, "drawing", "images") as bar:
            drawn = on_ray.draw(ray, task, shards, workers) if ray else local.draw(task, shards, workers or 1)
            for count in drawn if shards else ():
                bar.advance(count)
                if not first:
                    first, loaded = count, time.perf_counter()
        ended = time.perf_counter()
        with console.stage("reading the shards", keep=False):
            total = digest(task.folder, whole)
    return {
        "bundle": manifest.name,
        "shards": str(task.folder),
        "images": len(numbers),
        "drawn": to_draw,
        "sha256": total,
        "steps": steps,
        "seed": whole.seed,
        **how,
        "decoder": whole.decoder,
        "random_weights": manifest.weights.kind == "random",
        "seconds": round(ended - began, 3),
        "images_per_second": round((to_draw - first) / (ended - loaded), 2) if to_draw > first else None,
    }


def _described(
    task: Task, manifest: Manifest, chosen: Configuration, numbers: NDArray[np.int64], shard_size: int
) -> tuple[ImageSet, int]:
    """The set that is asked for, and its passes through the network. Raises ScheduleError, BundleError."""
    request = dict(task.request)
    steps, seed, decoder = (request.pop(name) for name in ("steps", "seed", "decoder"))
    sampling = {name: value for name, value in request.items() if value is not None}
    schedule = manifest.schedule(steps)
    sampling_of(schedule, manifest.teacher, sampling)
    if (start := sampling.get("teacher_start")) is not None:
        schedule = schedule.with_teacher_start(manifest.teacher, start)
    manifest.decoder(decoder, chosen.graphs)
    conditions = hashlib.sha256(numbers.astype("<i8").tobytes() + json.dumps(task.prompts).encode())
    return ImageSet(
        bundle=manifest.name,
        manifest=task.manifest,
        backend=chosen.backend,
        device=chosen.device.partition(":")[0],
        precision=chosen.precision,
        decoder=decoder,
        steps=steps or min(manifest.schedules, default="teacher"),
        sampling=sampling,
        seed=seed,
        conditions=conditions.hexdigest(),
        count=len(numbers),
        shard_size=shard_size,
    ), manifest.number_of_steps(schedule)


@contextmanager
def _owned(task: Task) -> Iterator[None]:
    """The directory for this process alone; what killed workers left half written is removed, before and
    after. Raises ShardError while another process draws into it."""
    make_directory(task.folder)
    lock = os.open(task.folder, os.O_RDONLY)  # a lock goes with its process, however that ends
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = f"another process draws into {task.folder}"
            raise ShardError(text, "Wait for it, or name another directory.") from error
        _sweep(task)
        try:
            yield
        finally:
            _sweep(task)
    finally:
        os.close(lock)


def _sweep(task: Task) -> None:
    for path in task.folder.glob(".ddexport-*.part"):
        path.unlink(missing_ok=True)


def _is_there(task: Task, images: range, numbers: NDArray[np.int64]) -> bool:
    """Whether the shard was drawn, and is as it was drawn."""
    path = task.folder / shard_name(images)
    if not path.exists():
        return False
    try:
        facts, _ = read_shard(path, images)
        said = [(one["index"], one["label"], one["seed"]) for one in facts]
        if said != [
            (index, label, task.request["seed"]) for index, label in zip(images, numbers, strict=True)
        ]:
            raise ShardError(f"{path} is damaged: it has other labels")
    except (ShardError, KeyError) as error:
        logger.warning("%s; it is drawn again", error)
        return False
    return True
