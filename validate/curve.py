"""`validate curve`: what each step more buys.

Quality and time of every schedule of a bundle, from one student step over steps with the teacher to the whole
teacher, all drawn and timed inside the runtime. Only for models that were distilled here: the judge reads
digits. docs/image-quality.md explains the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console

if TYPE_CHECKING:
    from ddexport.recipe import Recipe
    from ddexport.runtime.pipeline import Pipeline
    from ddexport.runtime.result import Result
    from ddexport.validate.quality import Gauge, Quality

EPILOG = """
\b
Examples:
  ddexport validate curve build/digits-var --plot curve.png
  ddexport validate curve build/digits-llamagen --images 1000 --seeds 0 --json
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see `--help`."""

    images: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)
    batches: tuple[int, ...] = (1, 64)
    rounds: int = 15
    threads: int = 1
    backend: str = "auto"
    precision: str | None = None


@dataclass(frozen=True)
class Point:
    """One schedule: passes of student and teacher, a `Quality` for each seed, and milliseconds an image, by
    batch size, of each part."""

    name: str
    student: int
    teacher: int
    quality: tuple[Quality, ...]
    times: dict[int, dict[str, float]]

    def image(self, batch: int) -> float:
        """Milliseconds an image."""
        return sum(self.times[batch].values())

    def to_dict(self) -> dict[str, Any]:
        """As plain data: `--json`."""
        fields = ("frechet", "accuracy", "precision", "recall")
        return {
            "steps": self.name,
            "student_passes": self.student,
            "teacher_passes": self.teacher,
            **{name: [getattr(quality, name) for quality in self.quality] for name in fields},
            "ms": self.times,
            "image_ms": {batch: self.image(batch) for batch in self.times},
        }


def schedules_of(pipe: Pipeline) -> dict[str, tuple[int, int]]:
    """The schedules by name, the fewest steps first and the whole teacher last, with the passes of student
    and teacher."""
    names: list[int | str] = sorted(pipe.manifest.schedules)
    if pipe.manifest.teacher is not None:
        names.append("teacher")
    passes = {}
    for name in names:
        schedule = pipe.manifest.schedule(name)
        students = len(schedule.known)
        passes[str(name)] = (students, pipe.manifest.number_of_steps(schedule) - students)
    return passes


def steps_of(name: str) -> int | str:
    """What a call takes as `steps`."""
    return name if name == "teacher" else int(name)


def measure(pipe: Pipeline, options: Options, gauge: Gauge | None = None) -> list[Point]:
    """Times and draws every schedule. Raises DDError where there is no data to compare with."""
    from ddexport.recipe import recipe_of

    passes = schedules_of(pipe)
    gauge = gauge or _gauge(recipe_of(pipe.manifest))
    with console.stage("timing"):
        times = time_schedules(pipe, list(passes), options.batches, options.rounds)
    qualities: dict[str, list[Quality]] = {name: [] for name in passes}
    with console.progress(len(options.seeds) * len(passes), "drawing and measuring") as bar:
        for seed in options.seeds:
            for name in passes:
                qualities[name].append(_quality(pipe, gauge, name, seed, options.images))
                bar.advance()
    return [Point(name, *passes[name], tuple(qualities[name]), times[name]) for name in passes]


def time_schedules(
    pipe: Pipeline, names: Sequence[str], batches: Sequence[int], rounds: int
) -> dict[str, dict[int, dict[str, float]]]:
    """Milliseconds an image of each part: medians over rounds in which all schedules run in turn.

    The smaller the batch, the more rounds, up to ten times as many: a short run is easily disturbed.
    """
    milliseconds: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    for batch in batches:
        labels = [number % pipe.manifest.classes for number in range(batch)]
        spent: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(rounds * min(10, max(batches) // batch) + 1):
            for name in names:
                drawn = pipe(labels, steps_of(name), seed=number, output="numpy", batch_size=batch)
                if number:  # the first round opens and warms up
                    spent[name].append(drawn.seconds)
        for name, all_rounds in spent.items():
            parts = all_rounds[0]
            milliseconds[name][batch] = {
                part: median(times[part] for times in all_rounds) * 1000 / batch for part in parts
            }
    return milliseconds


def table(points: Sequence[Point]) -> str:
    """The points as text: FD mean over the seeds +- half of the range, times with the speed-up."""
    from ddexport.validate.quality import summary

    batches = list(points[0].times)
    heads = f"{'steps':9}{'student':>8}{'teacher':>8}{'FD':>15}{'acc %':>8}{'prec':>7}{'rec':>7}"
    lines = [heads + "".join(f"{f'an image, batch {b}':>24}" for b in batches)]
    for point in points:
        line = f"{point.name:9}{point.student:8}{point.teacher:8}"
        mean, spread = summary([quality.frechet for quality in point.quality]) or (0.0, 0.0)
        line += f"{f'{mean:.2f} +-{spread:.2f}':>15}"
        for field, factor, width, digits in (
            ("accuracy", 100.0, 8, 1),
            ("precision", 1.0, 7, 2),
            ("recall", 1.0, 7, 2),
        ):
            value, _ = summary([getattr(quality, field) for quality in point.quality]) or (0.0, 0.0)
            line += f"{value * factor:{width}.{digits}f}"
        for b in batches:
            faster = points[-1].image(b) / point.image(b)
            line += f"{f'{point.image(b):.2f} ms ({faster:.1f}x)':>24}"
        lines.append(line)
    return "\n".join(lines)


def _quality(pipe: Pipeline, gauge: Gauge, name: str, seed: int, count: int) -> Quality:
    """Balanced labels, the same for every schedule, so that one seed gives all of them the same noise."""
    import numpy as np

    labels = np.arange(count) % pipe.manifest.classes
    parts = list(pipe.stream(labels.tolist(), steps_of(name), seed=seed, output="numpy"))
    return gauge.measure(_as_row(name, parts))


def _as_row(name: str, parts: list[Result]) -> Any:
    import numpy as np
    import torch

    from ddexport.validate.image_sets import ImageRow

    pixels = np.concatenate([part.images for part in parts])  # uint8 (N, H, W, 3)
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    return ImageRow(name, images, torch.from_numpy(np.concatenate([part.labels for part in parts])))


def _gauge(recipe: Recipe) -> Gauge:
    from ddexport.distill.data import load_data
    from ddexport.distill.settings import distill_settings
    from ddexport.validate.features.digits import judge_path, load_judge
    from ddexport.validate.quality import Gauge

    return Gauge(load_judge(judge_path()), load_data(distill_settings(recipe).data))


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in value.split(",")):
        raise click.BadParameter(f"{value!r} is not a list of whole numbers like 0,1,2")
    return tuple(int(part) for part in value.split(","))


@click.command("curve", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--images", type=click.IntRange(100), default=2000, show_default=True, help="Images a schedule and seed."
)
@click.option("--seeds", default="0,1,2", show_default=True, callback=_numbers, help="Of noise and draws.")
@click.option("--batches", default="1,64", show_default=True, callback=_numbers, help="Batches to time.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=15,
    show_default=True,
    help="Rounds to time the largest batch.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of the engine.")
@click.option("--backend", metavar="NAME", default="auto", help="The engine.  [default: the best that fits]")
@click.option("--precision", metavar="NAME", help="Of the graphs.  [default: the bundle's first]")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Also draw FD against time.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
@console.debug_option
def command(bundle: Path, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Measure quality and time of every schedule of BUNDLE, with those that involve its teacher.

    BUNDLE is one of a model that was trained with `ddexport distill`.
    """
    from ddexport.runtime.files import check_image_suffix, check_writable
    from ddexport.runtime.pipeline import load

    request = Options(**options)
    if not all(request.batches):
        raise click.BadParameter("0 is not the size of a batch", param_hint="--batches")
    if plot is not None:
        check_image_suffix(plot)
        check_writable(plot)
    with load(bundle, request.backend, request.threads, request.precision) as pipe:
        points = measure(pipe, request)
        name, title = pipe.manifest.name, pipe.manifest.title
        engine = f"{pipe.backend.name} in {pipe.precision}"
    if plot is not None:
        from ddexport.validate.curve_plot import write_plot

        write_plot(points, title, plot)
    if as_json:
        settings = {"images": request.images, "seeds": request.seeds, "threads": request.threads}
        console.emit_json(
            {"model": name, "engine": engine, **settings, "points": [point.to_dict() for point in points]}
        )
        return
    threads = f"{request.threads} thread{'s' * (request.threads > 1)}"
    click.echo(f"{name}: {request.images} images a schedule and seed, seeds {list(request.seeds)};")
    click.echo(f"{engine}, {threads}, median of {request.rounds} rounds in turn or more\n")
    click.echo(table(points))
