"""`ddexport sample`: draws images from a bundle."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ddexport.runtime import console
from ddexport.runtime.errors import LabelError
from ddexport.runtime.options import MODES, PROVIDERS

if TYPE_CHECKING:
    import numpy as np
    from ddexport.runtime.collector import Collector
    from ddexport.runtime.pipeline import Pipeline
    from numpy.typing import NDArray

FEW_CLASSES = 10
SHOWN_CLASSES = 8


@dataclass(frozen=True)
class Request:
    """What the options ask for; see `--help`. `output` keeps a trailing slash, which means a directory."""

    bundle: Path
    labels: tuple[str, ...] = ()
    steps: int | str | None = None
    teacher_start: int | None = None
    cfg: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    seed: int = 0
    num_images: int = 1
    backend: str = "auto"
    threads: int | None = None
    precision: str | None = None
    provider: str | None = None
    device: int | None = None
    mode: str | None = None
    model_cache: Path | None = None
    noise: Path | None = None
    dump: Path | None = None
    output: str = "out.png"
    batch_size: int | None = None
    verify: bool = True

    def sampling(self) -> dict[str, Any]:
        """What is asked for of a teacher's steps."""
        names = ("teacher_start", "cfg", "top_k", "top_p", "temperature")
        return {name: getattr(self, name) for name in names}

    @property
    def into_directory(self) -> bool:
        path = Path(self.output)
        return self.output.endswith(("/", os.sep)) or path.is_dir() or not path.suffix


@dataclass(frozen=True)
class Report:
    """What was drawn, with times in seconds. `seed` is None where the noise came from a file."""

    bundle: str
    output: str
    images: int
    labels: list[int]
    steps: int
    seed: int | None
    backend: str
    provider: str | None
    precision: str
    random_weights: bool
    seconds: dict[str, float]

    def line(self) -> str:
        """The report for people, in one line."""
        parts = {what: spent for what, spent in self.seconds.items() if what != "load" and spent}
        times = ", ".join(f"{what} {console.duration(spent)}" for what, spent in parts.items())
        engine = ", ".join(part for part in (self.backend, self.provider, self.precision) if part)
        each = console.duration(sum(parts.values()) / self.images)
        return (
            f"{self.output}: {_count(self.images, 'image')} in {_count(self.steps, 'step')}; "
            f"{times}, {each} an image; {engine}"
        )


def draw(request: Request) -> Report:
    """Draws and writes what is asked for. Raises DDError; then the output is as it was before."""
    from ddexport.runtime.collector import Collector
    from ddexport.runtime.files import read_noise
    from ddexport.runtime.pipeline import load

    _check_outputs(request)
    noise, own_labels, uniforms = read_noise(request.noise) if request.noise else (None, None, None)
    if own_labels is not None and (request.labels or request.num_images != 1):
        raise LabelError(
            f"{request.noise} brings its own labels, so neither --label nor -n can be given with it",
            "Leave them out, or take `labels` out of the file.",
        )
    start = time.perf_counter()
    with console.stage(f"loading {request.bundle}", keep=False):
        pipe = load(
            request.bundle,
            request.backend,
            request.threads,
            request.precision,
            request.verify,
            steps=request.steps,
            provider=request.provider,
            device=request.device,
            mode=request.mode,
            cache=request.model_cache,
        )
    with pipe:
        loaded = time.perf_counter() - start
        labels = pipe.labels.indices(_chosen(request, own_labels, pipe))
        sampling = request.sampling()
        schedule = pipe.schedule(request.steps, request.teacher_start)
        passes = pipe.manifest.number_of_steps(schedule)
        collector = Collector(Path(request.output), request.into_directory, request.dump)
        with console.progress(len(labels) * request.num_images * passes, "drawing, in passes") as bar:
            results = pipe.stream(
                labels.tolist(),
                request.steps,
                seed=request.seed,
                num_images=request.num_images,
                batch_size=request.batch_size,
                output="numpy",
                noise=noise,
                on_pass=bar.advance,
                **sampling,
                **({} if uniforms is None or schedule.teacher is None else {"uniforms": uniforms}),
            )
            for result in results:
                collector.add(result)
        collector.finish(len(labels), request.num_images)
        return _report(request, pipe, labels.tolist(), collector, loaded, passes)


def print_labels(bundle: Path, as_json: bool) -> None:
    """Prints number and name of every class."""
    from ddexport.runtime.labels import read_labels
    from ddexport.runtime.manifest import read_manifest, resolve

    manifest = read_manifest(bundle, verify=False)
    names = read_labels(resolve(bundle, manifest.labels.file), manifest.classes).names
    if as_json:
        console.emit_json({"names": names})
    else:
        click.echo("\n".join(f"{number:>5}  {name}" for number, name in enumerate(names)))


def _check_outputs(request: Request) -> None:
    from ddexport.runtime.files import check_image_suffix, check_writable, make_directory

    output = Path(request.output)
    if request.into_directory:
        make_directory(output)
    else:
        check_image_suffix(output)
        check_writable(output)
    if request.dump:
        check_writable(request.dump)


def _chosen(request: Request, own: NDArray[np.int64] | None, pipe: Pipeline) -> list[Any]:
    if own is not None:
        return list(own)
    if request.labels:
        return list(request.labels)
    classes = pipe.manifest.classes
    if classes <= FEW_CLASSES:
        return list(range(classes))
    return [number * (classes - 1) // (SHOWN_CLASSES - 1) for number in range(SHOWN_CLASSES)]


def _report(
    request: Request,
    pipe: Pipeline,
    labels: list[int],
    collector: Collector,
    loaded: float,
    steps: int,
) -> Report:
    spent = collector.seconds
    assert spent is not None  # a request has at least one image
    return Report(
        bundle=pipe.manifest.name,
        output=request.output,
        images=collector.count,
        labels=labels,
        steps=steps,
        seed=None if request.noise else request.seed,
        backend=pipe.backend.name,
        provider=pipe.backend.provider,
        precision=pipe.precision,
        random_weights=pipe.manifest.weights.kind == "random",
        seconds={"load": loaded, **spent.by_part()},
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


_PATH = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)
_SEED = click.IntRange(0, 2**64 - 1)


EPILOG = """
\b
Examples:
  ddexport sample build/var-d16 --label 207 --label "ice bear" --steps 2 -n 4
  ddexport sample build/digits-var --steps 3 --cfg 1.5 --top-p 0.9
  ddexport sample build/digits-var --steps teacher --top-k 1 --dump teacher.npz
"""


def _steps(ctx: click.Context, param: click.Parameter, value: Any) -> int | str | None:
    """A number of steps, or "teacher"."""
    return value if value in (None, "teacher") else int(_POSITIVE.convert(value, param, ctx))


@click.command(name="sample", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", type=_PATH)
@click.option(
    "--label", "labels", multiple=True, metavar="CLASS", help="A class by number or name; repeatable."
)
@click.option(
    "--steps",
    callback=_steps,
    metavar="N|teacher",
    help="One of the bundle's schedules, or the whole teacher.  [default: the fewest]",
)
@click.option(
    "--teacher-start",
    type=click.IntRange(min=0),
    metavar="P",
    help="The position at which the teacher starts.  [default: the schedule's]",
)
@click.option("--cfg", type=float, metavar="X", help="The teacher's guidance.  [default: the bundle's]")
@click.option(
    "--top-k", type=_POSITIVE, metavar="N", help="Tokens it can draw; 1 is greedy.  [default: the bundle's]"
)
@click.option("--top-p", type=float, metavar="P", help="Their mass.  [default: the bundle's]")
@click.option("--temperature", type=float, metavar="T", help="Of its logits.  [default: the bundle's]")
@click.option("--seed", type=_SEED, metavar="N", default=0, help="The seed of the noise.  [default: 0]")
@click.option(
    "-n", "--num-images", type=_POSITIVE, metavar="N", default=1, help="Images a label.  [default: 1]"
)
@click.option("--backend", metavar="NAME", default="auto", help="The engine.  [default: the best that fits]")
@click.option("--provider", type=click.Choice(PROVIDERS), help="Of ONNX Runtime.  [default: the best]")
@click.option("--device", type=click.IntRange(min=0), metavar="N", help="Which GPU.  [default: 0]")
@click.option("--threads", type=_POSITIVE, metavar="N", help="Of the CPU.  [default: the engine's choice]")
@click.option(
    "--precision", metavar="NAME", help="Of the arithmetic.  [default: the best engine's, else the first]"
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="Of OpenVINO: one batch soon, or many images a second.  [default: latency]",
)
@click.option(
    "--model-cache",
    type=_PATH,
    metavar="DIR",
    help="Where OpenVINO keeps compiled graphs, to load sooner the next time.  [default: nowhere]",
)
@click.option("--batch-size", type=_POSITIVE, metavar="N", help="Images at once.  [default: by their size]")
@click.option("--noise", type=_PATH, metavar="NPZ", help="Replay `noise`, and `labels` if it has them.")
@click.option("--dump", type=_PATH, metavar="NPZ", help="Write labels, noise, tokens, sequences and images.")
@click.option(
    "-o",
    "--output",
    default="out.png",
    show_default=True,
    metavar="PATH",
    help="A picture of all images, or a directory for one file an image.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--list-labels", is_flag=True, help="Print the classes of the bundle and stop.")
@click.option("--no-verify", is_flag=True, help="Do not compare the files' SHA-256 with the manifest's.")
@console.debug_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, list_labels: bool, no_verify: bool, **options: Any) -> None:
    """Draw images from BUNDLE, a directory made by `ddexport onnx`."""
    if list_labels:
        print_labels(options["bundle"], as_json)
        return
    source = ctx.get_parameter_source("seed")
    if options["noise"] and source is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--noise takes the place of the seed's noise: give one of --noise and --seed.")
    report = draw(Request(**options, verify=not no_verify))
    if as_json:
        console.emit_json(report)
    else:
        click.echo(report.line())
