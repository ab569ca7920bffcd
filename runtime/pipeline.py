"""Labels in, images out: the Python interface of a bundle."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.backends import AUTO, UNSUPPORTED, Backend, choose, open_backend
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import FLOAT32, FULL, TEACHER, Manifest, read_manifest, resolve
from ddexport.runtime.conditions import Conditions, Texts
from ddexport.runtime.errors import BackendError, DDError, NoiseError, TextError
from ddexport.runtime.images import to_pil, to_uint8
from ddexport.runtime.labels import Label, Labels, read_labels
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.result import Result, joined
from ddexport.runtime.sampler import sample
from ddexport.runtime.schedule import Schedule, Span
from ddexport.runtime.schemes import local_bundle
from ddexport.runtime.teacher import (
    Arrays,
    Sampling,
    by_uniforms,
    check_uniforms,
    generate,
    read_codebook,
    sampling_of,
)
from ddexport.runtime.text import Features

OUTPUTS = ("pil", "numpy", "sequence")
MEMORY_TARGET = 2 << 30  # bytes; a CPU is no faster with more images at once
MAX_BATCH = 64
CPU_BATCH = 16  # of servers and workers: more gains nothing on a CPU
DIFFUSERS = {
    "num_inference_steps": "steps",
    "num_images_per_prompt": "num_images",
    "output_type": "output",
    "latents": "noise",
    "class_labels": "labels",
    "prompt": "labels",
    "cfg": "guidance_scale",
}
DIFFUSERS_OUTPUTS = {"np": "numpy", "latent": "sequence"}
REFUSED = {
    "generator": "Give seed, an integer: image i of a seed is the same on every machine.",
    "negative_prompt": "Leave it out: the student needs no guidance, and the teacher's null text is its own.",
    "height": "Leave it out: a bundle has one size of image.",
    "width": "Leave it out: a bundle has one size of image.",
    "callback_on_step_end": "Give on_pass, or read the steps of the result.",
    "eta": "Leave it out: nothing is random but the noise.",
    "return_dict": "Leave it out: a result has images, steps and seconds.",
}

Output: TypeAlias = Literal["pil", "numpy", "sequence"]
Method = TypeVar("Method", bound=Callable[..., Any])

logger = logging.getLogger(__name__)


def takes_diffusers_names(method: Method) -> Method:
    """Decorator: arguments may have diffusers' names; those without a meaning here are errors that name the
    alternative. Raises DDError."""

    @wraps(method)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        for name in [name for name in named if name in DIFFUSERS or name in REFUSED]:
            if name in REFUSED or DIFFUSERS[name] in named:
                hint = REFUSED.get(name) or f"It is {DIFFUSERS.get(name)}, which is given too."
                raise DDError(f"a pipeline of ddexport does not take {name}", hint)
            named[DIFFUSERS[name]] = named.pop(name)
        if named.get("output") in DIFFUSERS_OUTPUTS:
            named["output"] = DIFFUSERS_OUTPUTS[named["output"]]
        return method(self, *arguments, **named)

    return call  # type: ignore[return-value]


class Pipeline:
    """Draws images from an open bundle; a context manager, safe to call from several threads. Made by `load`.

    A pickle holds the path alone: unpickling loads the bundle again, in the same configuration.
    """

    def __init__(self, root: Path, manifest: Manifest, labels: Labels, backend: Backend) -> None:
        """Nothing is opened yet. Raises BundleError for a bad codebook."""
        self.root, self.manifest, self.labels, self.backend = root, manifest, labels, backend
        self.precision = backend.configuration.precision
        self.codebook = read_codebook(root, manifest) if manifest.teacher else None
        self.teacher_backend = self._teacher_backend() if manifest.teacher else None
        self.texts = Texts(root, manifest, self._text_backend()) if manifest.text else None

    @takes_diffusers_names
    def __call__(
        self,
        labels: Label | Iterable[Label] | Features | Conditions,
        steps: int | str | None = None,
        *,
        seed: int | None = 0,
        num_images: int = 1,
        first_image: int = 0,
        noise: NDArray[np.float32] | None = None,
        output: Output = "pil",
        batch_size: int | None = None,
        decoder: str = FULL,
        on_pass: Callable[[int], None] = lambda images: None,
        **teacher: Any,
    ) -> Result:
        """Draws `num_images` images of each label, in the order of the labels, and returns all at once.

        labels: a class number, a name, or several; of a text model a prompt or several, or `Features` of
        them. steps: the number of steps of a schedule in the manifest,
        the fewest if None, "teacher" for the whole auto-regressive model. seed: 0 to 2**64 - 1; None chooses
        a random one, which the result holds. first_image: image i gets noise first_image + i of the seed.
        noise: float32 (N, L, Cv) in place of the seed's. output: "pil", "numpy" (uint8 N, H, W, C) or
        "sequence" (float32 N, L, Cv, not decoded). batch_size: images per pass, chosen by their size if None.
        decoder: one of the manifest's, such as "small", in place of the full one. on_pass: called with the
        number of images after each pass through student or teacher.

        For steps that involve the teacher: teacher_start, the position at which it starts; guidance_scale,
        top_k, top_p, temperature, how it chooses tokens; uniforms, float64 (N, L) in place of the seed's.
        Names of diffusers are accepted. Raises LabelError, ScheduleError, NoiseError, BackendError, and
        BundleError for a decoder that there is not.
        """
        if output not in OUTPUTS:
            raise DDError(f"unknown output {output!r}", f"There is: {', '.join(OUTPUTS)}.")
        manifest, size, precision = self.manifest, self.manifest.sequence, self.backend.configuration.graphs
        schedule = self.schedule(steps, teacher.get("teacher_start"))
        sampling = sampling_of(schedule, manifest.teacher, teacher)
        _check_at_least_one("num_images", num_images)
        given = self.conditions(labels)
        given = given.rows(np.repeat(np.arange(len(given)), num_images))
        batch_size = self._batch_size(batch_size, schedule)
        seed = secrets.randbits(32) if seed is None else seed
        self._check_noise(len(given), noise, teacher.get("uniforms"))
        self.open(schedule, min(len(given), batch_size), decoder)
        decoder_graph = manifest.decoder(decoder, precision)

        parts = []
        for start in range(0, len(given), batch_size):
            rows = slice(start, start + batch_size)
            batch = given.rows(rows)
            images = range(first_image + start, first_image + start + len(batch))
            gaussian = gaussian_noise(seed, images, size.length, size.width) if noise is None else noise[rows]
            uniforms = None
            if sampling is not None:
                replayed = teacher.get("uniforms")
                uniforms = uniform_numbers(seed, images, size.length) if replayed is None else replayed[rows]

            def student(feeds: Arrays) -> Arrays:
                graph = manifest.graph("student", precision, schedule.split)
                outputs = self.backend.run(graph, feeds, ("sequence", "tokens"))
                on_pass(len(feeds["known"]))
                return outputs

            continued = partial(self._continued, batch, uniforms, sampling, on_pass)
            condition = batch.feeds("student") if schedule.known else {}
            done = sample(student, gaussian, condition, schedule, continued, self.codebook)

            began = time.perf_counter()
            pictures: Any = done[-1].sequence
            if output != "sequence":
                pictures = to_uint8(self.backend.run(decoder_graph, {"sequence": pictures})["image"])
            seconds = {"student": 0.0} | ({TEACHER: 0.0} if schedule.teacher else {})
            for step in done:
                seconds[step.role] += step.seconds
            seconds["decoder"] = time.perf_counter() - began
            shown = to_pil(pictures) if output == "pil" else pictures
            used_seed = seed if noise is None else None
            parts.append(Result(shown, batch.numbers, gaussian, done, seconds, used_seed, uniforms))
        return joined(parts)

    @takes_diffusers_names
    def stream(
        self,
        labels: Label | Iterable[Label] | Features | Conditions,
        steps: int | str | None = None,
        *,
        seed: int | None = 0,
        num_images: int = 1,
        first_image: int = 0,
        batch_size: int | None = None,
        **request: Any,
    ) -> Iterator[Result]:
        """Like a call, but yields the result batch by batch and keeps nothing, for any number of images.

        Labels, steps, decoder, sizes and noise are checked at once, not when the first batch is asked for.
        """
        _check_at_least_one("num_images", num_images)
        given = self.conditions(labels)
        count = len(given) * num_images
        size = self._batch_size(batch_size, self.schedule(steps, request.get("teacher_start")))
        seed = secrets.randbits(32) if seed is None else seed
        self.manifest.decoder(request.get("decoder", FULL))
        arrays = {name: request.pop(name) for name in ("noise", "uniforms") if request.get(name) is not None}
        self._check_noise(count, **arrays)

        def batches() -> Iterator[Result]:
            for start in range(0, count, size):
                stop = min(start + size, count)
                numbers = given.rows(np.arange(start, stop) // num_images)
                part = {name: array[start:stop] for name, array in arrays.items()}
                first = first_image + start
                yield self(numbers, steps, seed=seed, first_image=first, batch_size=size, **part, **request)

        return batches()

    def conditions(self, labels: Label | Iterable[Label] | Features | Conditions) -> Conditions:
        """One for each label, prompt or text. Raises LabelError, TextError."""
        if isinstance(labels, Conditions):
            return labels
        if self.texts is not None:
            return self.texts.conditions(labels)  # type: ignore[arg-type]
        if isinstance(labels, Features):
            raise TextError(f"{self.manifest.name} knows classes, not texts", "Give labels.")
        return Conditions(self.labels.indices(labels))

    def schedule(self, steps: int | str | None = None, teacher_start: int | None = None) -> Schedule:
        """The schedule for a request. Raises ScheduleError."""
        schedule = self.manifest.schedule(steps)
        if teacher_start is None:
            return schedule
        return schedule.with_teacher_start(self.manifest.teacher, teacher_start)

    def open(self, schedule: Schedule, batch: int = 1, decoder: str = FULL) -> None:
        """Opens the graphs of a schedule for batches of `batch` images. Raises BackendError, BundleError."""
        graphs = self.backend.configuration.graphs
        if schedule.known:
            self.backend.open(self.manifest.graph("student", graphs, schedule.split), batch)
        self.backend.open(self.manifest.decoder(decoder, graphs), batch)
        if schedule.teacher is not None:
            if self.teacher_backend is None:
                raise BackendError(
                    "the teacher needs ONNX Runtime, which cannot run here",
                    'pip install "ddexport[cpu]"',
                )
            engine = self.teacher_backend
            engine.open(self.manifest.graph(TEACHER, engine.configuration.graphs))

    def close(self) -> None:
        """Frees the engines. The pipeline cannot be used afterwards."""
        with ExitStack() as closing:
            closing.callback(self.backend.close)
            for engine in (self.teacher_backend, self.texts.engine if self.texts else None):
                if engine is not None:
                    closing.callback(engine.close)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pipeline {self.manifest.name}: {self.backend.configuration}>"

    def __reduce__(self) -> tuple[Callable[[], Pipeline], tuple[()]]:
        chosen = self.backend.configuration
        again = partial(load, str(self.root.resolve()), chosen.backend, self.backend.threads, self.precision)
        return partial(again, device=chosen.device), ()

    def _batch_size(self, asked: int | None, schedule: Schedule) -> int:
        if asked is None:
            return self.backend.max_batch or default_batch_size(self.manifest, schedule)
        _check_at_least_one("batch_size", asked)
        return asked

    def _check_noise(self, count: int, noise: Any = None, uniforms: Any = None) -> None:
        """Raises NoiseError unless `noise` is finite float32 (count, L, Cv) and `uniforms` are right."""
        want = (count, self.manifest.sequence.length, self.manifest.sequence.width)
        if noise is not None:
            if not isinstance(noise, np.ndarray) or noise.dtype != np.float32 or noise.shape != want:
                actual = f"{noise.dtype} {noise.shape}" if isinstance(noise, np.ndarray) else type(noise)
                raise NoiseError(
                    f"the noise must be a float32 array of shape {want}, but is {actual}",
                    f"That is one for each of the {count} images, {want[1]} positions, {want[2]} numbers.",
                )
            if not np.isfinite(noise).all():
                place = tuple(int(i) for i in np.argwhere(~np.isfinite(noise))[0])
                fault = f"the noise is not finite: {noise[place]} at {place}"
                raise NoiseError(fault, "Make the noise again, or give a seed in its place.")
        if uniforms is not None:
            check_uniforms(uniforms, count, want[1])

    def _continued(
        self,
        given: Conditions,
        uniforms: NDArray[np.float64] | None,
        sampling: Sampling | None,
        on_pass: Callable[[int], None],
        span: Span,
        prefix: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """The tokens (N, end) of a span that the teacher generates behind a prefix."""
        engine, teacher = self.teacher_backend, self.manifest.teacher
        assert engine and teacher and sampling and uniforms is not None  # a schedule with a span has them all
        run = partial(engine.run, self.manifest.graph(TEACHER, engine.configuration.graphs))
        pick, scale = by_uniforms(uniforms, sampling), sampling.guidance_scale
        condition = given.feeds(TEACHER)
        return generate(run, teacher, span, prefix, condition, scale, pick, on_pass, engine.new_cache)

    def _teacher_backend(self) -> OnnxRuntime | None:
        """ONNX Runtime for the teacher, where the student runs if it can, and in its precision if there is
        such a teacher: int8 has none. None where ONNX Runtime cannot run it."""
        chosen, manifest = self.backend.configuration, self.manifest
        for precision in dict.fromkeys((chosen.precision, FLOAT32, *manifest.precisions)):
            if not any((graph.role, graph.precision) == (TEACHER, precision) for graph in manifest.graphs):
                continue
            if isinstance(self.backend, OnnxRuntime) and precision == chosen.precision:
                return self.backend
            if engine := self._onnxruntime(precision):
                return engine
        return None

    def _text_backend(self) -> OnnxRuntime | None:
        """ONNX Runtime for what runs once a text, which is float32; None where it cannot run."""
        if isinstance(self.backend, OnnxRuntime):
            return self.backend
        return self.teacher_backend or self._onnxruntime(self.manifest.precisions[0])

    def _onnxruntime(self, precision: str) -> OnnxRuntime | None:
        for device in dict.fromkeys((self.backend.configuration.device, "cpu")):
            for configuration in OnnxRuntime.configurations(self.root, self.manifest, precision, device):
                if not configuration.obstacle:
                    return OnnxRuntime(self.root, self.manifest, configuration, self.backend.threads)
        return None


def load(
    path: str | Path,
    backend: str = AUTO,
    threads: int | None = None,
    precision: str | None = None,
    verify: bool = True,
    *,
    steps: int | str | None = None,
    device: str | None = None,
    decoder: str = FULL,
) -> Pipeline:
    """Opens a bundle: a directory, or an address such as hf://USER/NAME, from which the graphs of this
    precision and of these steps are fetched; of all steps if none are named.

    backend: the name of a file in runtime/backends, or "auto": a TensorRT engine that fits this machine, then
    ONNX Runtime on CUDA, then the CPU engine that `ddexport bench --save` found fastest, then ONNX Runtime on
    the CPU, then OpenVINO (docs/runtime.md). precision: to compute in; None takes that of the TensorRT
    engine, or the bundle's first. device: "cpu", "cuda", "cuda:1"; None leaves the choice to the engine.
    threads: number of CPU threads. verify: compare every SHA-256. steps, decoder: as in a call; the graphs
    of these are opened now, others when they are first run.
    Raises BundleError, BackendError, ScheduleError.
    """
    root = local_bundle(path, (precision,), () if steps is None else (steps,))
    if threads is not None and threads < 1:
        raise BackendError(f"the number of threads must be at least 1, but is {threads}")
    manifest = read_manifest(root, verify)
    labels = read_labels(resolve(root, manifest.labels.file), manifest.classes)
    schedule = manifest.schedule(steps)
    chosen = choose(root, manifest, backend, precision, device)
    pipe = Pipeline(root, manifest, labels, open_backend(root, manifest, chosen, threads))
    try:
        pipe.open(schedule, decoder=decoder)
    except BaseException:
        pipe.close()
        raise
    if chosen.note:
        logger.log(
            logging.WARNING if chosen.rank == UNSUPPORTED else logging.INFO, "%s: %s", chosen, chosen.note
        )
    if decoder in manifest.decoders:
        logger.info("decoder %s, against the full one: %s", decoder, manifest.decoders[decoder])
    if manifest.weights.kind == "random":
        logger.warning(
            "%s holds random weights (seed %s): its images show nothing", manifest.name, manifest.weights.seed
        )
    return pipe


def default_batch_size(manifest: Manifest, schedule: Schedule | None = None) -> int:
    """How many images fit the memory target, by a rough count of the float32 arrays in use at the same time.

    The student holds attention scores for some 16 heads twice, and the logits twice; the decoder about three
    maps of some 160 channels at full resolution; engines keep about as much again in free blocks. For 680
    positions and 256 x 256 pixels that is 370 MB per image, and 400 MB were measured with ONNX Runtime. A
    teacher's caches come on top: keys and values, with and without the label.
    """
    sequence, image, teacher = manifest.sequence, manifest.image, manifest.teacher
    student = 2 * 16 * sequence.length**2 + 2 * sequence.split * sequence.codebook
    decoder = 3 * 160 * image.height * image.width
    caches = 0
    if schedule is not None and schedule.teacher is not None and teacher is not None:
        caches = 4 * teacher.layers * teacher.heads * teacher.head_width * schedule.teacher.end
    return max(1, min(MAX_BATCH, MEMORY_TARGET // (4 * (2 * (student + decoder) + caches))))


def _check_at_least_one(what: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise DDError(f"{what} must be an integer of at least 1, but is {value!r}")
