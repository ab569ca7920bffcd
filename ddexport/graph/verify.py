"""Runs every graph after the export, and compares it with the float32 module that it was made from.

float32 and int8 graphs run in ONNX Runtime, as the runtime runs them; half graphs are emulated, for that
engine does not round them (`emulate`). A float32 graph must agree to rounding. How far the others are is
measured, and must stay within the recipe's limits. The figures are `parity/graphs.json` (docs/export.md).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ddexport.families._small_decoder import SmallDecoder
from ddexport.graph.emulate import EmulatedGraph
from ddexport.graph.flops import count_flops
from ddexport.graph.spec import BATCHES, GraphSpec, rows, sample_inputs
from ddexport.graph.wrappers import graph_module
from ddexport.precision.policy import FLOAT32, HALVES, INT8
from ddexport.recipe import Limits, Recipe
from ddexport.runtime.backends import CPU, Configuration
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import Decoder, Graph, Manifest, PipelineGraph, decoder_role
from ddexport.runtime.contract import TensorSpec
from ddexport.runtime.errors import VerificationError
from ddexport.runtime.images import to_uint8
from ddexport.runtime.noise import gaussian_noise
from ddexport.runtime.sampler import sample
from ddexport.runtime.schedule import Schedule

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], Arrays]

ENGINE = "onnxruntime"
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
"""The operators that the time goes into."""
TYPES = {ir.DataType.FLOAT: FLOAT32, ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
LARGEST_PSNR = 200.0  # of equal images, which JSON has no number for
LEAST_PSNR = 15.0  # dB, of a decoder that makes the images of the full one
WRITTEN = "nothing was written; "
KEEP = f"{WRITTEN}docs/export.md shows how to find the layer: give it to --keep-fp32, or take bf16"
HINTS = {
    FLOAT32: f"{WRITTEN}please report this with the versions that `ddexport --version` prints",
    INT8: f"{WRITTEN}calibrate on more images, --calibration N, or take fp16 or bf16",
}


class OutputError(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far one output at one batch size is from the float32 module.

    Attributes:
        output: its name.
        batch: the number of rows.
        relative: the largest difference over the module's largest value.
        rms: rms error over rms of the module's values, in the worst row.
        largest: the largest difference.
        copied: of `sequence`, whose other figures are of regressed positions: the largest difference, over
            the module's largest value, where it is data or the codebook entry of the same token.
        compared, differing, excused: tokens; those that are not the module's; those among them that the
            module itself was undecided about.
        psnr: of the worst image, in dB.
        bits8: the largest difference of an 8-bit value.
    """

    output: str
    batch: int
    relative: float
    rms: float
    largest: float
    copied: float | None = None
    compared: int | None = None
    differing: int | None = None
    excused: int | None = None
    psnr: float | None = None
    bits8: int | None = None


class Accuracy(msgspec.Struct, frozen=True):
    """What is known of one graph: what computed it here, how many weights of its matrix products and
    convolutions compute in each type, and the errors."""

    engine: str
    weights: dict[str, int]
    errors: list[OutputError]


def verify(
    folder: Path,
    manifest: Manifest,
    parts: Mapping[str, nn.Module],
    specs: Sequence[GraphSpec],
    recipe: Recipe,
    stage: Callable[[str], AbstractContextManager[None]],
) -> dict[str, Accuracy]:
    """Runs every graph of a bundle on random inputs at all `BATCHES`; returns its accuracy, by its file.

    parts: the modules, float32, as they were loaded.

    Raises:
        VerificationError: an output is not finite or constant, tokens are not those of the logits, a float32
            graph differs from its module, or a reduced one by more than the recipe's limits.
    """
    accuracy: dict[str, Accuracy] = {}
    for spec in specs:
        module = graph_module(spec, parts[spec.part], parts["tokenizer"])
        trials: list[tuple[Arrays, Arrays]] = []
        for graph in (g for g in manifest.graphs if (g.role, g.split) == (spec.role, spec.split)):
            limits = None if graph.precision == FLOAT32 else recipe.parity.limits(graph.precision)
            with stage(f"comparing {graph.file} with PyTorch"), _opened(folder, manifest, graph) as run:
                trials = trials or [trial(module, spec, recipe, sizes) for sizes in spec.sizes]
                compared = [compare(run, *one, spec, graph.file, graph.precision, limits) for one in trials]
            emulated = ", half rounding emulated" if graph.precision in HALVES else ""
            errors = [error for errors in compared for error in errors]
            accuracy[graph.file] = Accuracy(ENGINE + emulated, weights_by_type(folder / graph.file), errors)
    return accuracy


def verify_pipeline(folder: Path, manifest: Manifest, pipeline: PipelineGraph) -> None:
    """Compares a pipeline with its graphs, run one by one by the runtime's sampler, on the first images of
    seed 0. Raises VerificationError unless all tokens are equal, and all bytes of images to rounding."""
    schedule, size = manifest.schedule(pipeline.steps), manifest.sequence
    noise = gaussian_noise(0, range(max(BATCHES)), size.length, size.width)
    labels = np.arange(len(noise), dtype=np.int64) % manifest.classes
    student = manifest.graph("student", pipeline.precision, schedule.split)
    decoder = manifest.graph(decoder_role(pipeline.decoder), pipeline.precision)
    with _opened(folder, manifest, student) as run:
        wanted = sample(run, noise, {"label": labels}, schedule)[-1]  # type: ignore[arg-type]
    with _opened(folder, manifest, decoder) as run:
        images = to_uint8(run({"sequence": wanted.sequence})["image"])
    got = EmulatedGraph(folder / pipeline.file).run({"noise": noise, "label": labels})
    differing = int((got["tokens"] != wanted.tokens).sum())
    largest = int(np.abs(got["image"].astype(np.int64) - images).max())
    # In int8 a float that differs in its last bit can be rounded to the next of 256 numbers.
    most = manifest.parity[INT8]["image_max"] if pipeline.precision == INT8 else 1
    if differing or largest > most:
        raise VerificationError(
            f"{pipeline.file} is not its graphs run one by one: {differing} tokens, {largest} of 255 differ",
            HINTS.get(pipeline.precision, HINTS[FLOAT32]),
        )


def compare_decoders(folder: Path, manifest: Manifest, name: str, recipe: Recipe) -> Decoder:
    """What a further decoder saves and costs, by its graph in the bundle's first precision, on the images of
    seed 0 in one step; the FID is the recipe's, if the weights are. VerificationError for other images."""
    size, schedule = manifest.sequence, Schedule(known=(0,))
    student, full, other = map(manifest.graph, ("student", "decoder", decoder_role(name)))
    images = min(8, max(2, 512 // manifest.image.width))  # two of 256 x 256 have pixels enough
    noise = gaussian_noise(0, range(images), size.length, size.width)
    labels = np.arange(len(noise), dtype=np.int64) % manifest.classes
    with _opened(folder, manifest, student) as run:
        sequence = sample(run, noise, {"label": labels}, schedule)[-1].sequence  # type: ignore[arg-type]
    pictures = []
    for graph in (full, other):
        with _opened(folder, manifest, graph) as run:
            pictures.append(run({"sequence": sequence})["image"].clip(0, 1))
    mse = float(np.square(pictures[0] - pictures[1], dtype=np.float64).mean())
    share = count_flops(folder / other.file, batch=1) / count_flops(folder / full.file, batch=1)
    psnr, weights = round(-10 * math.log10(max(mse, 1e-20)), 2), manifest.weights
    if weights.kind != "random" and psnr < LEAST_PSNR:
        raise VerificationError(
            f"the images of the decoder {name} are not those of the full one: PSNR {psnr} dB",
            "give one that was distilled for this tokenizer, to the end: `ddexport distill decoder`",
        )
    own = {role: {source.embedded, source.file} for role, source in recipe.files.items()}
    measured = weights.kind != "random" and all(f.file in own.get(f.role, ()) for f in weights.files)
    fid = {int(steps): change for steps, change in recipe.decoders[name].fid.items() if measured}
    return Decoder(operations=round(share, 4), psnr=psnr, fid=fid)


def trial(
    module: nn.Module, spec: GraphSpec, recipe: Recipe, sizes: Mapping[str, int] | None = None
) -> tuple[Arrays, Arrays]:
    """Random inputs of a graph, with mixed `known`, and what the module makes of them, at the largest batch;
    of a small decoder random entries of the codebook.

    sizes: one of the graph's, the first by default. Smaller batches are the first rows of both: no row of the
    module depends on another, and it is slower than its graphs.
    """
    inputs = sample_inputs(spec, recipe, max(BATCHES), seed=1, sizes=sizes)
    if isinstance(module, SmallDecoder):
        # It has no norms: on what it is never given its int8 graph would leave the range of the numbers.
        tokens = np.random.default_rng(1).integers(
            recipe.sequence.codebook, size=inputs["sequence"].shape[:2]
        )
        inputs["sequence"] = module.reader.codebook.detach().numpy()[tokens]
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(value) for value in inputs.values()))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = {t.name: value.numpy() for t, value in zip(spec.outputs, outputs, strict=True)}
    _check_values(_by_row(wanted, spec.outputs), f"the PyTorch module of {spec.stem}", HINTS[FLOAT32])
    return inputs, wanted


def compare(
    run: Run,
    inputs: Arrays,
    wanted: Arrays,
    spec: GraphSpec,
    file: str,
    precision: str = FLOAT32,
    limits: Limits | None = None,
) -> list[OutputError]:
    """The errors of a graph on the inputs of a trial, at all `BATCHES`.

    Args:
        inputs, wanted: of `trial`.
        file, precision: of the graph, for an error.
        limits: of a reduced precision; None for float32, which must agree to `spec.tolerance`.

    Raises:
        VerificationError: as `verify`.
    """
    hint = HINTS.get(precision, KEEP)
    measured: list[OutputError] = []
    faults: list[str] = []
    for batch in BATCHES:
        feeds = rows(inputs, spec.inputs, batch)
        got = _by_row(run(feeds), spec.outputs)
        _check_values(got, file, hint)
        expected = _by_row(rows(wanted, spec.outputs, batch), spec.outputs)
        margin = None if limits is None else limits.token_margin
        errors = output_errors(got, expected, feeds.get("known"), margin, spec.tolerance)
        faults += [fault for error in errors for fault in faults_of(error, limits, spec.tolerance)]
        measured += [error for error in errors if not error.output.startswith("new_")]  # the teacher's cache
    if faults:
        what = "differs from the PyTorch module" if limits is None else "differs too much from float32"
        raise VerificationError(f"{file} {what}: {'; '.join(faults[:3])}", hint)
    return measured


def output_errors(
    got: Arrays, wanted: Arrays, known: np.ndarray | None, margin: float | None, tolerance: float
) -> list[OutputError]:
    """The errors of the float outputs of one batch.

    Args:
        got, wanted: outputs by name, their batch first, of the graph and of the float32 module.
        known: [B] the student's input, None for other graphs.
        margin: the module counts as undecided between two tokens below this difference of their logits; by
            default twice the error that `tolerance` allows a logit.
        tolerance: relative to the largest value.
    """
    errors = []
    for name, value in wanted.items():
        if value.dtype == np.int64:
            continue  # tokens are the largest logits, which `_check_values` has seen to
        difference = np.abs(got[name].astype(np.float64) - value)
        counted, scale = np.ones(value.shape[:2], dtype=bool), float(np.abs(value).max())
        more: dict[str, Any] = {}
        if name == "sequence" and known is not None:
            same = got["logits"].argmax(-1) == wanted["logits"].argmax(-1)
            counted, copied = _positions(value.shape[1], known, same)
            more = {"copied": _ratio(float(difference[copied].max(initial=0.0)), scale)}
        if name == "logits" and known is not None:
            more = _tokens(got[name], value, known, 2 * tolerance * scale if margin is None else margin)
        if name == "image":
            mse = float(np.square(difference).reshape(len(value), -1).mean(1).max())
            bits = np.abs(_bits8(got[name]) - _bits8(value)).max()
            more = {"psnr": min(-10 * math.log10(max(mse, 1e-20)), LARGEST_PSNR), "bits8": int(bits)}
        largest = float(difference[counted].max(initial=0.0))
        rms = max(_ratio(_rms(d[c]), _rms(v[c])) for d, v, c in zip(difference, value, counted, strict=True))
        errors.append(OutputError(name, len(value), _ratio(largest, scale), rms, largest, **more))
    return errors


def faults_of(error: OutputError, limits: Limits | None, tolerance: float) -> list[str]:
    """What is past its limit, in words. limits: None for float32."""
    checks = [("relative error of what is copied", error.copied or 0.0, tolerance, 1)]
    if limits is None:
        checks += [("relative error", error.relative, tolerance, 1)]
    elif error.output == "logits":
        checks += [("error of a logit", error.largest, limits.token_margin, 1)]
    elif error.output == "sequence":
        checks += [("relative error of the embeddings", error.rms, limits.embedding_error, 1)]
    elif error.output == "image":
        checks += [
            ("PSNR of an image", error.psnr or 0.0, limits.image_psnr, -1),
            ("8-bit difference", error.bits8 or 0, limits.image_max, 1),
        ]
    checks += [("tokens that differ", error.differing or 0, error.excused or 0, 1)]
    return [
        f"{error.output}: {what} {value:.3g} at batch {error.batch}, limit {limit:g}"
        for what, value, limit, sign in checks
        if not sign * value <= sign * limit  # so that what is not a number fails
    ]


def weights_by_type(path: Path) -> dict[str, int]:
    """How many weights of a graph's matrix products and convolutions compute in each type; a product between
    quantisers computes in int8."""
    counts: Counter[str] = Counter()
    for node in ir.load(path).graph.all_nodes():
        if node.op_type not in PRODUCTS:
            continue
        makers = [value.producer() if value is not None else None for value in node.inputs[:2]]
        quantised = all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
        kind = INT8 if quantised else TYPES[node.outputs[0].dtype]  # type: ignore[index]
        stored = [maker.inputs[0] if quantised and maker else value
                  for maker, value in zip(makers, node.inputs[:2], strict=True)]  # fmt: skip
        counts[kind] += sum(v.const_value.size for v in stored if v is not None and v.const_value is not None)
    return dict(sorted(counts.items()))


@contextmanager
def _opened(folder: Path, manifest: Manifest, graph: Graph) -> Iterator[Run]:
    if graph.precision in HALVES:
        yield EmulatedGraph(folder / graph.file).run
        return
    chosen = Configuration(ENGINE, "cpu", graph.precision, graph.precision, CPU)
    with closing(OnnxRuntime(folder, manifest, chosen)) as engine:
        yield partial(engine.run, graph)


def _check_values(arrays: Arrays, file: str, hint: str) -> None:
    """Raises `VerificationError` for a row that is not finite or constant, or tokens that are not those of
    the logits. A dead output would agree with any graph that is dead too."""
    for name, value in arrays.items():
        if value.dtype == np.int64:
            continue
        for row, numbers in enumerate(value.reshape(len(value), -1)):
            wrong = int((~np.isfinite(numbers)).sum())
            what = f"holds {wrong} numbers that are not finite" if wrong else "is constant"
            if wrong or (numbers.size > 1 and numbers.min() == numbers.max()):
                raise VerificationError(f"{file}: {name} {what} (row {row} of a batch of {len(value)})", hint)
    if "tokens" in arrays and not np.array_equal(arrays["tokens"], arrays["logits"].argmax(-1)):
        raise VerificationError(f"{file}: tokens are not the largest logits", hint)


def _by_row(arrays: Arrays, tensors: Sequence[TensorSpec]) -> Arrays:
    """The outputs with their batch first: a teacher's new cache has it second."""
    return {t.name: np.moveaxis(arrays[t.name], t.shape.index("batch"), 0) for t in tensors}


def _positions(length: int, known: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which positions of a sequence are regressed, and which are data or the entry of the same token: [B, L].

    same: [B, S] whether graph and module chose the same token.
    """
    position = np.arange(length)
    given, split = position < known[:, None], same.shape[1]
    copied = given.copy()
    copied[:, :split] |= same
    return ~given & (position >= split), copied


def _tokens(got: np.ndarray, wanted: np.ndarray, known: np.ndarray, margin: float) -> dict[str, int]:
    decided = np.arange(wanted.shape[1]) >= known[:, None]
    chosen = got.argmax(-1)
    differing = (chosen != wanted.argmax(-1)) & decided
    lost = wanted.max(-1) - np.take_along_axis(wanted, chosen[..., None], -1)[..., 0]
    counts = {"compared": decided, "differing": differing, "excused": differing & (lost < margin)}
    return {name: int(mask.sum()) for name, mask in counts.items()}


def _ratio(error: float, reference: float) -> float:
    return error / max(reference, 1e-30)


def _rms(values: np.ndarray) -> float:
    return math.sqrt(float(np.square(values, dtype=np.float64).mean())) if values.size else 0.0


def _bits8(image: np.ndarray) -> np.ndarray:
    return np.rint(image.astype(np.float64) * 255).clip(0, 255)
