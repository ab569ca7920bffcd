"""Labels in, images out: the Python interface of a bundle."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.backends._base import Backend
from runtime.errors import DDError, NoiseError
from runtime.images import to_pil, to_uint8
from runtime.labels import Label, Labels, read_labels
from runtime.machine import Machine
from runtime.manifest import ROLES, Manifest, Schedule, read_manifest, resolve
from runtime.noise import gaussian_noise
from runtime.options import Options
from runtime.sampler import Step, sample
from runtime.selection import AUTO, backend_class, candidates, choose, nothing_fits

OUTPUTS = ("pil", "numpy", "sequence")
MEMORY_TARGET = 2 << 30  # bytes; a CPU is no faster with more images at once
MAX_BATCH = 64

Output: TypeAlias = Literal["pil", "numpy", "sequence"]
Images: TypeAlias = list[Image.Image] | NDArray[Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timings:
    """Seconds spent in the student (all steps) and in the decoder."""

    student: float
    decoder: float

    def __add__(self, other: Timings) -> Timings:
        return Timings(self.student + other.student, self.decoder + other.decoder)


@dataclass(frozen=True)
class Result:
    """N images and how they came about.

    images: a list of PIL images, uint8 (N, H, W, C), or for output "sequence" float32 (N, L, Cv), undecoded.
    labels: int64 (N,). noise: float32 (N, L, Cv). steps: one Step each, the last one is what was decoded.
    """

    images: Images
    labels: NDArray[np.int64]
    noise: NDArray[np.float32]
    steps: list[Step]
    timings: Timings

    def __len__(self) -> int:
        return len(self.labels)


class Pipeline:
    """Draws images from an open bundle; a context manager. Made by `load`."""

    def __init__(self, manifest: Manifest, labels: Labels, backend: Backend, precision: str) -> None:
        self.manifest, self.labels, self.backend, self.precision = manifest, labels, backend, precision

    def __call__(
        self,
        labels: Label | Iterable[Label],
        steps: int | None = None,
        *,
        seed: int = 0,
        num_images: int = 1,
        noise: NDArray[np.float32] | None = None,
        output: Output = "pil",
        batch_size: int | None = None,
    ) -> Result:
        """Draws `num_images` images of each label, in the order of the labels, and returns all at once.

        labels: a class number, a name, or several. steps: of one of the manifest's schedules, the shortest if
        None. seed: 0 to 2**64 - 1; image i of the request gets noise i of the seed. noise: float32 (N, L, Cv)
        to use in place of the seed's. output: "pil", "numpy" (uint8 N, H, W, C) or "sequence" (not decoded).
        batch_size: how many images the engine gets at once, chosen by their size if None.
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
        )
        return joined(list(parts))

    def stream(
        self,
        labels: Label | Iterable[Label],
        steps: int | None = None,
        *,
        seed: int = 0,
        num_images: int = 1,
        batch_size: int | None = None,
        output: Output = "pil",
        noise: NDArray[np.float32] | None = None,
    ) -> Iterator[Result]:
        """As a call, but yields the result batch by batch and keeps none of it, for any number of images.

        The request is checked at once, not when the first batch is asked for.
        """
        if output not in OUTPUTS:
            raise DDError(f"unknown output {output!r}", f"There is: {', '.join(OUTPUTS)}.")
        _at_least_one("num_images", num_images)
        if batch_size is None:
            batch_size = self.backend.batch_size or default_batch_size(self.manifest)
        _at_least_one("batch_size", batch_size)
        schedule = self.manifest.schedule(steps)
        each = np.repeat(self.labels.indices(labels), num_images)
        if noise is None:
            noise_of = partial(self._seeded, seed)
            noise_of(range(0))  # to complain about the seed now
        else:
            check_noise(noise, len(each), self.manifest)
            noise_of = partial(_rows, noise)
        return self._batches(each, schedule, noise_of, batch_size, output)

    def close(self) -> None:
        """Frees the engine. The pipeline cannot be used afterwards."""
        self.backend.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batches(
        self,
        labels: NDArray[np.int64],
        schedule: Schedule,
        noise_of: Callable[[range], NDArray[np.float32]],
        batch_size: int,
        output: Output,
    ) -> Iterator[Result]:
        for start in range(0, len(labels), batch_size):
            batch = labels[start : start + batch_size]
            yield self._batch(batch, noise_of(range(start, start + len(batch))), schedule, output)

    def _batch(
        self, labels: NDArray[np.int64], noise: NDArray[np.float32], schedule: Schedule, output: Output
    ) -> Result:
        start = time.perf_counter()
        steps = sample(partial(self.backend.run, "student"), noise, labels, schedule)
        drawn = time.perf_counter()
        if output == "sequence":
            return Result(steps[-1].sequence, labels, noise, steps, Timings(drawn - start, 0.0))
        image = self.backend.run("decoder", {"sequence": steps[-1].sequence})["image"]
        timings = Timings(drawn - start, time.perf_counter() - drawn)
        pixels = to_uint8(image)
        return Result(to_pil(pixels) if output == "pil" else pixels, labels, noise, steps, timings)

    def _seeded(self, seed: int, indices: range) -> NDArray[np.float32]:
        return gaussian_noise(seed, indices, self.manifest.sequence.length, self.manifest.sequence.width)


def load(
    path: str | Path,
    backend: str = AUTO,
    threads: int | None = None,
    precision: str | None = None,
    verify: bool = True,
    *,
    provider: str | None = None,
    device: int | None = None,
    cuda_graphs: bool | None = None,
) -> Pipeline:
    """Opens a bundle directory.

    backend: the name of a file in runtime/backends, or "auto": a TensorRT engine that fits this machine, then
    ONNX Runtime on a GPU, then on the CPU. precision: the best that was built for TensorRT, else the
    manifest's first if None. verify: compare every SHA-256. threads, provider, device, cuda_graphs: as in
    `runtime.options.Options`. Raises BundleError, BackendError.
    """
    root = Path(path)
    options = Options(threads, provider, device, cuda_graphs)
    manifest = read_manifest(root, verify)
    labels = read_labels(resolve(root, manifest.labels.file), manifest.classes)
    if precision is not None:
        manifest.graph("student", precision)  # to complain now
    engine = _open_engine(root, manifest, Machine(), backend, precision, options)
    if manifest.weights.kind == "random":
        logger.warning(
            "%s holds random weights (seed %s): its images show nothing", manifest.name, manifest.weights.seed
        )
    return Pipeline(manifest, labels, engine, next(iter(engine.graphs.values())).precision)


def _open_engine(
    root: Path, manifest: Manifest, machine: Machine, backend: str, precision: str | None, options: Options
) -> Backend:
    found = candidates(root, manifest, machine, backend=backend, precision=precision, options=options)
    chosen = choose(found, explicit=backend != AUTO)
    if chosen is None:
        raise nothing_fits(found, backend, manifest)
    graphs = {role: manifest.graph(role, chosen.precision) for role in ROLES}
    engine = backend_class(chosen.backend)(root, graphs, chosen.options, machine)
    engine.open()
    return engine


def default_batch_size(manifest: Manifest) -> int:
    """How many images fit the memory target, by a rough count of the float32 arrays alive at once.

    The student holds attention scores for some 16 heads twice, and the logits twice; the decoder about three
    maps of some 160 channels at full resolution; engines keep about as much again in free blocks. For 680
    positions and 256 x 256 pixels that is 370 MB an image, and 400 MB were measured with ONNX Runtime.
    """
    sequence, image = manifest.sequence, manifest.image
    student = 2 * 16 * sequence.length**2 + 2 * sequence.split * sequence.codebook
    decoder = 3 * 160 * image.height * image.width
    return max(1, min(MAX_BATCH, MEMORY_TARGET // (2 * 4 * (student + decoder))))


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


def _rows(noise: NDArray[np.float32], indices: range) -> NDArray[np.float32]:
    return noise[indices.start : indices.stop]


def _at_least_one(what: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise DDError(f"{what} must be an integer of at least 1, but is {value!r}")


def joined(parts: list[Result]) -> Result:
    """The results of consecutive batches as one."""
    if len(parts) == 1:
        return parts[0]
    images: Images
    if isinstance(parts[0].images, list):
        images = [image for part in parts for image in part.images]
    else:
        images = np.concatenate([part.images for part in parts])
    return Result(
        images,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.noise for part in parts]),
        [
            Step(np.concatenate([s.tokens for s in same]), np.concatenate([s.sequence for s in same]))
            for same in zip(*(part.steps for part in parts), strict=True)
        ],
        sum((part.timings for part in parts), Timings(0.0, 0.0)),
    )
