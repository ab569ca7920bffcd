"""`validate parity`: is the bundle the model it was exported from? docs/parity.md explains every row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime import console
from runtime.errors import OutputError, VerificationError

if TYPE_CHECKING:
    from runtime.manifest import Manifest
    from runtime.pipeline import Pipeline
    from validate.batches import Model
    from validate.harness import Request
    from validate.metrics._base import Comparison, FloatArray, IntArray, Limits, StudentOutput
    from validate.report import ParityReport
    from validate.teacher_runs import Graphs

EPILOG = """
\b
Examples:
  python -m validate parity build/digits-var
  python -m validate parity build/var-d16 --checkpoint var-d16.pth --vae vae_ch160v4096z32.pth
  python -m validate parity build/digits-var --precision fp16
  ddexport validate parity build/digits-var --images 32 --report parity-32 --json
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see `--help`."""

    bundle: Path
    images: int = 8
    seed: int = 0
    batch: int = 8
    precision: str | None = None
    backend: str = "auto"
    checkpoint: Path | None = None
    vae: Path | None = None
    teacher: Path | None = None
    weights: str | None = None
    threads: int | None = None
    emulate: bool | None = None


class Watched:
    """A `validate.batches.Model` that says how many rows it has run."""

    def __init__(self, model: Model, advance: Callable[[int], None]) -> None:
        self._model, self._advance = model, advance

    def student(self, tokens: FloatArray, label: IntArray, known: IntArray) -> StudentOutput:
        """As the model's."""
        output = self._model.student(tokens, label, known)
        self._advance(len(label))
        return output

    def decode(self, sequence: FloatArray) -> FloatArray:
        """As the model's."""
        images = self._model.decode(sequence)
        self._advance(len(sequence))
        return images


class BundleModel:
    """An open bundle as a `validate.batches.Model`."""

    def __init__(self, pipe: Pipeline) -> None:
        self._backend = pipe.backend

    def student(self, tokens: FloatArray, label: IntArray, known: IntArray) -> StudentOutput:
        """tokens (B, L, Cv) float32, label (B,), known (B,) int64. Raises BackendError."""
        from validate.metrics._base import StudentOutput

        outputs = self._backend.run("student", {"tokens": tokens, "label": label, "known": known})
        return StudentOutput(outputs["sequence"], outputs["logits"])

    def decode(self, sequence: FloatArray) -> FloatArray:
        """sequence (B, L, Cv) float32 -> images (B, 3, H, W) float32 in [0, 1]. Raises BackendError."""
        images: FloatArray = self._backend.run("decoder", {"sequence": sequence})["image"]
        return images


@dataclass(frozen=True)
class Side:
    """The bundle's side of the comparison: what runs it, and in which precision; its graphs by key."""

    model: Model
    engine: str
    precision: str
    graphs: Graphs


@contextmanager
def opened_side(manifest: Manifest, options: Options) -> Iterator[Side]:
    """The bundle on the engine that the options ask for, or emulated where that engine would not round.

    Raises DDError where it cannot be run.
    """
    from runtime.pipeline import load
    from validate.emulation import ENGINE, EmulatedBundle, emulated_precision

    threads = options.threads
    half = emulated_precision(
        options.bundle, manifest, options.backend, options.precision, options.emulate, threads
    )
    if half is not None:
        emulated = EmulatedBundle(options.bundle, manifest, half, threads)
        yield Side(emulated, ENGINE, half, emulated)
        return
    with load(options.bundle, options.backend, threads, options.precision, verify=False) as pipe:
        yield Side(BundleModel(pipe), pipe.backend.name, pipe.precision, pipe.backend)


def run_parity(options: Options) -> tuple[ParityReport, Comparison]:
    """Runs bundle and reference and measures. Raises DDError where one of them cannot be run."""
    from runtime.manifest import FILE_NAME, read_manifest, sha256_of
    from validate.harness import compare, measure
    from validate.reference import build_reference, describe_weights
    from validate.report import ParityReport, Settings
    from validate.teacher_runs import WatchedGraphs, compare_teachers, teacher_request

    start = time.perf_counter()
    with console.stage(f"loading {options.bundle}", keep=False):
        manifest = read_manifest(options.bundle)
        digest = sha256_of(options.bundle / FILE_NAME)
    with opened_side(manifest, options) as side:
        limits = _limits(manifest, side.precision)
        with console.stage("building the reference", keep=False):
            files = {"student": options.checkpoint, "tokenizer": options.vae, "teacher": options.teacher}
            reference = build_reference(manifest, files, options.weights, options.threads, teacher=True)
        request = _request(manifest, options)
        drawn = teacher_request(options.bundle, manifest, side.precision, options.seed, request)
        work = request.work + (drawn.work if drawn else 0)
        with console.progress(work, f"comparing {options.images} images") as bar:
            bundle = Watched(side.model, bar.advance)
            comparison = compare(bundle, Watched(reference, bar.advance), request)
            if drawn is not None:
                graphs = WatchedGraphs(side.graphs, bar.advance)
                modules = WatchedGraphs(reference, bar.advance)
                comparison = comparison.with_more(compare_teachers(graphs, modules, drawn))
        settings = Settings(
            bundle=str(options.bundle),
            manifest=digest,
            name=manifest.name,
            weights=describe_weights(manifest),
            precision=side.precision,
            backend=side.engine,
            images=options.images,
            seed=options.seed,
            batch=options.batch,
            labels=tuple(request.labels.tolist()),
            steps=tuple(sorted({*request.schedules, *(drawn.numbers if drawn else ())})),
            versions=_versions(),
            seconds=round(time.perf_counter() - start, 2),
        )
    return ParityReport(settings, limits, tuple(measure(comparison, limits))), comparison


def _limits(manifest: Manifest, precision: str) -> Limits:
    """The limits of a precision, from the manifest. Raises VerificationError if it has none."""
    from dataclasses import fields

    from validate.metrics._base import Limits

    given: dict[str, Any] = manifest.parity.get(precision) or {}
    names = [field.name for field in fields(Limits)]
    lacking = [name for name in names if not isinstance(given.get(name), (int, float))]
    if lacking:
        raise VerificationError(
            f"bundle {manifest.name} states no parity limits for {precision}: {', '.join(lacking)} missing",
            f"state them in the recipe under parity.{precision}, and export again",
        )
    return Limits(**{name: given[name] for name in names})


def _request(manifest: Manifest, options: Options) -> Request:
    """Labels spread over all classes, and the seed's noise."""
    import numpy as np

    from runtime.noise import gaussian_noise
    from runtime.schedules import by_student_alone
    from validate.harness import Request

    sequence = manifest.sequence
    spread = np.arange(options.images, dtype=np.int64) * manifest.classes // options.images
    return Request(
        labels=(spread + options.seed % manifest.classes) % manifest.classes,
        noise=gaussian_noise(options.seed, range(options.images), sequence.length, sequence.width),
        schedules=by_student_alone(manifest.schedules, sequence.split),
        split=sequence.split,
        batch=options.batch,
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("ddexport", "torch", "onnxruntime", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # another engine than onnxruntime, or a source tree
            continue
    return found


def _require_validate_extra() -> None:
    from importlib.util import find_spec

    from runtime.errors import DDError

    missing = [name for name in ("torch", "safetensors", "yaml") if find_spec(name) is None]
    if missing:
        raise DDError(f"the PyTorch reference needs {', '.join(missing)}", 'pip install "ddexport[validate]"')


def _report_directory(bundle: Path, named: Path | None) -> Path | None:
    """Where the report goes, checked before the work. None, with a warning, where the bundle is read-only."""
    from runtime.files import make_directory

    if named is not None:
        make_directory(named)
        return named
    if not bundle.is_dir():
        return None  # which `load` will explain
    try:
        make_directory(bundle / "parity")
    except OutputError as error:
        click.echo(f"warning: {error.message}: no report; name a place with --report", err=True)
        return None
    return bundle / "parity"


_PATH = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)


@click.command("parity", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", type=_PATH)
@click.option("--images", type=_POSITIVE, default=8, show_default=True, help="How many images to compare.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of the noise.")
@click.option(
    "--batch", type=click.IntRange(min=2), default=8, show_default=True, help="The largest batch size tried."
)
@click.option("--precision", metavar="NAME", help="Which graphs of the bundle.  [default: its first]")
@click.option("--backend", metavar="NAME", default="auto", help="The engine.  [default: the best installed]")
@click.option(
    "--emulate/--no-emulate",
    default=None,
    help="Round fp16 and bf16 on the CPU as a half engine does; not: the engine as it is."
    "  [default: emulate on the CPU alone]",
)
@click.option("--checkpoint", type=_PATH, help="The student's checkpoint that the bundle was made from.")
@click.option("--vae", type=_PATH, help="The tokenizer's checkpoint that the bundle was made from.")
@click.option("--teacher", type=_PATH, help="The teacher's checkpoint that the bundle was made from.")
@click.option(
    "--weights",
    type=click.Choice(["ema", "model"]),
    help="Which copy of the student's weights to compare with.  [default: the bundle's own]",
)
@click.option("--threads", type=_POSITIVE, metavar="N", help="Of engine and torch.  [default: their choice]")
@click.option("--report", type=_PATH, metavar="DIR", help="Where to write it.  [default: BUNDLE/parity]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@console.debug_option
def command(report: Path | None, as_json: bool, **options: Any) -> None:
    """Compare BUNDLE with the PyTorch model it was made from, in every schedule, on the same noise.

    Exit code 3 if a limit of the manifest is passed.
    """
    from validate.report import failure_line, table, verdict_line, write_report

    _require_validate_extra()
    request = Options(**options)
    directory = _report_directory(request.bundle, report)
    result, comparison = run_parity(request)
    if as_json:
        console.emit_json(result.to_dict())
    else:
        click.echo(table(result))
    hint = "name a directory for the pictures with --report"
    if directory is not None:
        page = write_report(result, comparison, directory)
        click.echo(f"report: {page}", err=True)
        hint = f"see {page}"
    for one in result.failures:
        click.echo(f"failed: {failure_line(one)}", err=True)
    if not result.passed:
        raise VerificationError(verdict_line(result), hint)
