"""Labels in, images out: the Python interface of a bundle."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from ddexport.runtime.backends._base import Backend
from ddexport.runtime.errors import DDError, NoiseError
from ddexport.runtime.graphs import Graphs, keys_of, student_key
from ddexport.runtime.images import to_pil, to_uint8
from ddexport.runtime.labels import Label, Labels, read_labels
from ddexport.runtime.machine import Machine
from ddexport.runtime.manifest import Graph, Manifest, Schedule, read_manifest, resolve
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.options import Options
from ddexport.runtime.result import Result, Timings, joined
from ddexport.runtime.sampler import TeacherRun, sample
from ddexport.runtime.schedules import moved
from ddexport.runtime.selection import (
    AUTO,
    Candidate,
    backend_class,
    candidates,
    choose,
    no_such_precision,
    nothing_fits,
)
from ddexport.runtime.teacher import Choice, Sampling, by_stream, check_uniforms, choice_of, read_codebook
from numpy.typing import NDArray

OUTPUTS = ("pil", "numpy", "sequence")
MEMORY_TARGET = 2 << 30  # bytes; a CPU is no faster with more images at once
MAX_BATCH = 64
BEHIND = {"int8": "fp32"}
"""The precision that a role is taken from where a precision lacks it: int8 has no teacher."""

Output: TypeAlias = Literal["pil", "numpy", "sequence"]

logger = logging.getLogger(__name__)


class Pipeline:
    """Draws images from an open bundle; a context manager. Made by `load`."""

    def __init__(
        self,
        manifest: Manifest,
        labels: Labels,
        backend: Graphs,
        precision: str,
        codebook: NDArray[np.float32] | None = None,
    ) -> None:
        """codebook: (V, Cv), of a bundle with a teacher."""
        self.manifest, self.labels, self.backend, self.precision = manifest, labels, backend, precision
        self.codebook = codebook

    def __call__(
        self,
        labels: Label | Iterable[Label],
        steps: int | str | None = None,
        *,
        seed: int = 0,
        num_images: int = 1,
        noise: NDArray[np.float32] | None = None,
        output: Output = "pil",
        batch_size: int | None = None,
        **sampling: Any,
    ) -> Result:
        """Draws `num_images` images of each label, in the order of the labels, and returns all at once.

        labels: a class number, a name, or several. steps: of one of the manifest's schedules, the shortest if
        None, "teacher" for the whole auto-regressive model. seed: 0 to 2**64 - 1; image i of the request gets
        noise i of the seed. noise: float32 (N, L, Cv) to use in place of the seed's. output: "pil", "numpy"
        (uint8 N, H, W, C) or "sequence" (not decoded). batch_size: how many images the engine gets at once,
        chosen by their size if None. sampling: the fields of `Sampling`, for steps that involve a teacher.
        Raises LabelError, ScheduleError, NoiseError, BackendError.
        """
        parts = self.stream(
            labels,
            steps,
            seed=seed,
            num_images=num_images,
            batch_size=batch_size,
            output=output,
            noise=noise,
            **sampling,
        )
        return joined(list(parts))

    def stream(
        self,
        labels: Label | Iterable[Label],
        steps: int | str | None = None,
        *,
        seed: int = 0,
        num_images: int = 1,
        batch_size: int | None = None,
        output: Output = "pil",
        noise: NDArray[np.float32] | None = None,
        on_pass: Callable[[int], None] | None = None,
        **sampling: Any,
    ) -> Iterator[Result]:
        """As a call, but yields the result batch by batch and keeps none of it, for any number of images.

        on_pass: told the number of images after each pass through student or teacher. The request is checked
        at once, not when the first batch is asked for.
        """
        if output not in OUTPUTS:
            raise DDError(f"unknown output {output!r}", f"There is: {', '.join(OUTPUTS)}.")
        _at_least_one("num_images", num_images)
        given = Sampling(**sampling)
        schedule = self.schedule(steps, given.teacher_start)
        choice = choice_of(schedule, self.manifest.teacher, given)
        if batch_size is None:
            batch_size = self.backend.batch_size or default_batch_size(self.manifest, schedule)
        _at_least_one("batch_size", batch_size)
        each = np.repeat(self.labels.indices(labels), num_images)
        if noise is None:
            noise_of = partial(self._seeded, seed)
            noise_of(range(0))  # to complain about the seed now
        else:
            check_noise(noise, len(each), self.manifest)
            noise_of = partial(_rows, noise)
        uniforms_of = partial(uniform_numbers, seed, length=self.manifest.sequence.length)
        if given.uniforms is not None:
            check_uniforms(given.uniforms, len(each), self.manifest.sequence.length)
            uniforms_of = partial(_rows, given.uniforms)
        draw = partial(self._batch, schedule=schedule, choice=choice, output=output, on_pass=on_pass)
        return _batches(each, noise_of, uniforms_of if choice else None, batch_size, draw)

    def schedule(self, steps: int | str | None = None, teacher_start: int | None = None) -> Schedule:
        """The schedule that a request gets. Raises ScheduleError."""
        schedule = self.manifest.schedule(steps)
        return schedule if teacher_start is None else moved(schedule, self.manifest.teacher, teacher_start)

    def close(self) -> None:
        """Frees the engine. The pipeline cannot be used afterwards."""
        self.backend.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batch(
        self,
        labels: NDArray[np.int64],
        noise: NDArray[np.float32],
        uniforms: NDArray[np.float64] | None,
        schedule: Schedule,
        choice: Choice | None,
        output: Output,
        on_pass: Callable[[int], None] | None,
    ) -> Result:
        manifest, teacher = self.manifest, None
        if choice is not None:
            assert manifest.teacher is not None  # or there would be no choice
            assert self.codebook is not None
            assert uniforms is not None
            run, pick = partial(self.backend.run, "teacher"), by_stream(uniforms, choice)
            teacher = TeacherRun(run, manifest.teacher, self.codebook, choice.cfg, pick)
        student = partial(self.backend.run, student_key(manifest, schedule))
        steps = sample(student, noise, labels, schedule, teacher, on_pass)
        by_teacher = sum(step.seconds for step in steps if step.role == "teacher")
        by_student = sum(step.seconds for step in steps) - by_teacher
        if output == "sequence":
            timings = Timings(by_student, 0.0, by_teacher)
            return Result(steps[-1].sequence, labels, noise, steps, timings, uniforms)
        drawn = time.perf_counter()
        image = self.backend.run("decoder", {"sequence": steps[-1].sequence})["image"]
        timings = Timings(by_student, time.perf_counter() - drawn, by_teacher)
        pixels = to_uint8(image)
        images = to_pil(pixels) if output == "pil" else pixels
        return Result(images, labels, noise, steps, timings, uniforms)

    def _seeded(self, seed: int, indices: range) -> NDArray[np.float32]:
        return gaussian_noise(seed, indices, self.manifest.sequence.length, self.manifest.sequence.width)


def load(
    path: str | Path,
    backend: str = AUTO,
    threads: int | None = None,
    precision: str | None = None,
    verify: bool = True,
    *,
    steps: int | str | None = None,
    provider: str | None = None,
    device: int | None = None,
    cuda_graphs: bool | None = None,
    mode: str | None = None,
    cache: str | Path | None = None,
) -> Pipeline:
    """Opens a bundle directory.

    backend: the name of a file in runtime/backends, or "auto": a TensorRT engine that fits this machine, then
    ONNX Runtime on a GPU, then the fastest on the CPU that meets the bundle's limits there, as far as that
    was measured (docs/runtime-cpu.md). precision: of the graphs, or one that an engine computes in from
    others; None leaves it to the same choice. verify: compare every SHA-256. steps: those whose graphs are
    opened now, as for a call; others are opened when they are first run. threads, provider, device,
    cuda_graphs, mode, cache: as in `ddexport.runtime.options.Options`.
    Raises BundleError, BackendError, ScheduleError, OutputError for a cache that cannot be written.
    """
    root = Path(path)
    options = Options(threads, provider, device, cuda_graphs, mode, cache)
    manifest = read_manifest(root, verify)
    labels = read_labels(resolve(root, manifest.labels.file), manifest.classes)
    machine = Machine()
    chosen = _chosen(root, manifest, machine, backend, precision, options)
    graphs = _graphs(root, manifest, machine, chosen)
    graphs.open(keys_of(manifest, manifest.schedule(steps)))
    codebook = None if manifest.teacher is None else read_codebook(root, manifest)
    if manifest.weights.kind == "random":
        logger.warning(
            "%s holds random weights (seed %s): its images show nothing", manifest.name, manifest.weights.seed
        )
    return Pipeline(manifest, labels, graphs, chosen.precision, codebook)


def _chosen(
    root: Path, manifest: Manifest, machine: Machine, backend: str, precision: str | None, options: Options
) -> Candidate:
    ways = partial(candidates, root, manifest, machine, backend=backend, options=options)
    found = ways(precision=precision)
    if precision not in (None, *manifest.precisions) and not any(each.computes for each in found):
        raise no_such_precision(manifest, str(precision), found, ways())
    chosen = choose(found, explicit=backend != AUTO, named=precision is not None)
    if chosen is None:
        raise nothing_fits(found, backend, manifest)
    for doubt in chosen.unproven:
        logger.warning("%s: %s", chosen.name, doubt)
    return chosen


def _graphs(root: Path, manifest: Manifest, machine: Machine, chosen: Candidate) -> Graphs:
    def engine(some: Mapping[str, Graph]) -> Backend:
        return backend_class(chosen.backend)(root, some, chosen.options, machine)

    graphs = {graph.key: graph for graph in manifest.graphs if graph.precision == chosen.reads}
    behind = [graph for graph in manifest.graphs if graph.precision == BEHIND.get(chosen.reads)]
    return Graphs({**graphs, **{g.key: g for g in behind if g.key not in graphs}}, engine)


def default_batch_size(manifest: Manifest, schedule: Schedule | None = None) -> int:
    """How many images fit the memory target, by a rough count of the float32 arrays alive at once.

    The student holds attention scores for some 16 heads twice, and the logits twice; the decoder about three
    maps of some 160 channels at full resolution; engines keep about as much again in free blocks. For 680
    positions and 256 x 256 pixels that is 370 MB an image, and 400 MB were measured with ONNX Runtime. A
    teacher's caches come on top: keys and values of both halves of guidance.
    """
    sequence, image, teacher = manifest.sequence, manifest.image, manifest.teacher
    student = 2 * 16 * sequence.length**2 + 2 * sequence.split * sequence.codebook
    decoder = 3 * 160 * image.height * image.width
    caches = 0
    if schedule is not None and schedule.teacher is not None and teacher is not None:
        caches = 4 * teacher.layers * teacher.heads * teacher.head_width * schedule.teacher.end
    return max(1, min(MAX_BATCH, MEMORY_TARGET // (4 * (2 * (student + decoder) + caches))))


def check_noise(noise: Any, count: int, manifest: Manifest) -> None:
    """Raises NoiseError unless `noise` is finite float32 (count, L, Cv)."""
    want = (count, manifest.sequence.length, manifest.sequence.width)
    if not isinstance(noise, np.ndarray) or noise.dtype != np.float32:
        raise NoiseError(f"the noise must be a float32 array, but is {getattr(noise, 'dtype', type(noise))}")
    if noise.shape != want:
        raise NoiseError(
            f"the noise must have shape {want}, but has {noise.shape}",
            f"That is one for each of the {count} images, {want[1]} positions, {want[2]} numbers.",
        )
    if not np.isfinite(noise).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(noise))[0])
        raise NoiseError(f"the noise is not finite: {noise[place]} at {place}")


def _batches(
    labels: NDArray[np.int64],
    noise_of: Callable[[range], NDArray[np.float32]],
    uniforms_of: Callable[[range], NDArray[np.float64]] | None,
    batch_size: int,
    draw: Callable[..., Result],
) -> Iterator[Result]:
    for start in range(0, len(labels), batch_size):
        batch = labels[start : start + batch_size]
        indices = range(start, start + len(batch))
        yield draw(batch, noise_of(indices), uniforms_of(indices) if uniforms_of else None)


def _rows(numbers: NDArray[Any], indices: range) -> NDArray[Any]:
    return numbers[indices.start : indices.stop]


def _at_least_one(what: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise DDError(f"{what} must be an integer of at least 1, but is {value!r}")
