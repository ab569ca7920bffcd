"""`validate comparison`: the paper's table for a model that was distilled here. What do few steps cost, what
do they save, and what would drawing as many tokens at once give without distillation?

Rows and columns are explained in docs/image-quality.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ddexport.runtime import console
from ddexport.runtime.errors import DDError

if TYPE_CHECKING:
    from torch import Tensor

    from ddexport.recipe import Recipe
    from ddexport.validate.image_sets import ImageRow, Models
    from ddexport.validate.quality import Gauge, Quality
    from ddexport.validate.speed import Timing

SHARES = (0.75, 0.5, 0.25)  # of the AR steps that are the teacher's in the rows skip-n
COLUMNS = (("accuracy", "acc %", 100.0, 1), ("precision", "prec", 1.0, 2), ("recall", "rec", 1.0, 2))


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see `--help`."""

    images: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)
    skip: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1, 64)
    rounds: int = 15
    threads: int = 1
    weights: Path | None = None


@dataclass(frozen=True)
class Kind:
    """One row: its name, who draws, the passes of a network for an image, and how it is drawn, in words.

    first: the AR steps that are the teacher's own, where the rest is drawn at once.
    """

    name: str
    by: Literal["teacher", "at once", "student"]
    passes: int
    how: str
    first: int = 0


@dataclass(frozen=True)
class Row:
    """What was measured of one kind: a `Quality` for each seed, and its time."""

    kind: Kind
    quality: tuple[Quality, ...]
    timing: Timing

    def to_dict(self) -> dict[str, Any]:
        """As plain data: `--json`."""
        fields = ("frechet", "accuracy", "precision", "recall")
        return {
            "name": self.kind.name,
            "passes": self.kind.passes,
            "how": self.kind.how,
            **{name: [getattr(quality, name) for quality in self.quality] for name in fields},
            "network_ms": self.timing.sequence,
            "image_ms": self.timing.image,
        }


def kinds(steps: int, schedules: Sequence[int], skip: Sequence[int] | None = None) -> list[Kind]:
    """The rows for a teacher of so many AR steps and a student with these schedules.

    skip: passes saved, n of skip-n; by default what is nearest to `SHARES`. Raises DDError for one that the
    teacher cannot save.
    """
    if skip is None:
        skip = sorted(
            {saved for share in SHARES if 1 <= (saved := steps - 1 - round(steps * share)) < steps - 1}
        )
    wrong = [saved for saved in skip if not 1 <= saved < steps - 1]
    if wrong:
        raise DDError(
            f"skip-{wrong[0]} is not possible: the teacher has {steps} AR steps",
            f"--skip takes 1 to {steps - 2}; {steps - 1} would be onestep*",
        )
    rows = [Kind("teacher", "teacher", steps, f"all {steps} AR steps by the teacher")]
    for saved in skip:
        first = steps - saved - 1
        how = f"{first} AR step{'s' * (first > 1)} by the teacher, the other {steps - first} at once"
        rows.append(Kind(f"skip-{saved}", "at once", first + 1, how, first))
    rows.append(Kind("onestep*", "at once", 1, f"all {steps} AR steps at once, from the teacher's marginals"))
    for count in sorted(schedules, reverse=True):
        rows.append(
            Kind(student_name(count), "student", count, f"the distilled student, {passes_text(count)}")
        )
    return rows


def student_name(steps: int) -> str:
    """`DD 1 step`, `DD 2 steps`."""
    return f"DD {steps} step{'s' * (steps > 1)}"


def passes_text(count: int) -> str:
    """`1 pass`, `2 passes`."""
    return f"{count} pass{'es' * (count > 1)}"


def draw_rows(models: Models, rows: Sequence[Kind], seed: int, count: int) -> Iterator[ImageRow]:
    """The images of every kind, one after the other, with balanced labels; students from the seed's noise."""
    import torch

    from ddexport.distill.teacher import at_random
    from ddexport.distill.tokenizer import images_of_sequences
    from ddexport.runtime.noise import gaussian_noise
    from ddexport.validate.image_sets import (
        ImageRow,
        balanced_labels,
        by_chunks,
        independent_marginals,
        student_sequences,
    )
    from ddexport.validate.set_prediction import rest_at_once, teacher_of

    recipe, tokenizer = models.recipe, models.tokenizer
    sequence, labels = recipe.sequence, balanced_labels(count, recipe.classes)
    noise = torch.from_numpy(gaussian_noise(seed, range(count), sequence.length, sequence.width))
    generator = torch.Generator().manual_seed(seed)
    teacher, starts = teacher_of(models), list(tokenizer.starts)
    whole = by_chunks(lambda rows: teacher(labels[rows], at_random(generator)), count)

    def sequences(kind: Kind) -> Tensor:
        if kind.by == "student":
            known = recipe.schedules[str(kind.passes)].known
            return student_sequences(models, noise, labels, known, sequence.split)
        if kind.by == "teacher":
            tokens = whole
        elif kind.first == 0:  # shuffled in a class, the teacher's own samples are draws from its marginals
            tokens = independent_marginals(whole, labels, generator)
        else:
            first = kind.first
            tokens = by_chunks(
                lambda rows: rest_at_once(teacher, starts, labels[rows], first, generator), count
            )
        embedded: Tensor = tokenizer.embed(tokens)
        return embedded

    for kind in rows:
        yield ImageRow(kind.name, images_of_sequences(tokenizer, sequences(kind)), labels)


def time_rows(models: Models, rows: Sequence[Kind], batches: Sequence[int], rounds: int) -> list[Timing]:
    """The time of every kind, all in turn in one run; see `ddexport.validate.speed`."""
    from ddexport.validate.set_prediction import one_pass_runner
    from ddexport.validate.speed import Runner, student_runners, teacher_runner, time_runners

    students = {runner.passes: runner.sequences for runner in student_runners(models)}

    def sequences(kind: Kind) -> Callable[[Tensor, Tensor], Tensor]:
        if kind.by == "student":
            return students[kind.passes]
        return (
            teacher_runner(models).sequences if kind.by == "teacher" else one_pass_runner(models, kind.first)
        )

    runners = [Runner(kind.name, kind.passes, sequences(kind)) for kind in rows]
    return time_runners(models, runners, list(batches), rounds)


def measure(recipe: Recipe, options: Options, gauge: Gauge | None = None) -> list[Row]:
    """Draws, measures and times every row. Raises DDError for missing weights, data, or a wrong `skip`."""
    import torch

    from ddexport.validate.drawing import student_schedules
    from ddexport.validate.image_sets import load_models

    models = load_models(recipe, options.weights)
    alone = student_schedules(recipe.schedules, recipe.sequence.split)
    rows = kinds(len(models.tokenizer.starts) - 1, [int(count) for count in alone], options.skip)
    gauge = gauge or _gauge(recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with console.stage("timing"):
            timings = time_rows(models, rows, options.batches, options.rounds)
        torch.set_num_threads(threads)
        qualities: dict[str, list[Quality]] = {kind.name: [] for kind in rows}
        fresh = load_models(recipe, options.weights)  # the timed student has its tables in place of products
        with console.progress(len(options.seeds) * len(rows), "drawing and measuring") as bar:
            for seed in options.seeds:
                for row in draw_rows(fresh, rows, seed, options.images):
                    qualities[row.name].append(gauge.measure(row))
                    bar.advance()
    finally:
        torch.set_num_threads(threads)
    return [
        Row(kind, tuple(qualities[kind.name]), timing) for kind, timing in zip(rows, timings, strict=True)
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as text: FD mean over the seeds +- half of the range, times with the speed-up."""
    from ddexport.validate.quality import summary

    batches = list(rows[0].timing.image)
    heads = [f"{'':12}{'passes':>7}{'FD':>15}"] + [f"{head:>{9}}" for _, head, _, _ in COLUMNS]
    lines = ["".join(heads) + "".join(f"{f'an image, batch {b}':>24}" for b in batches)]
    for row in rows:
        mean, spread = summary([quality.frechet for quality in row.quality]) or (0.0, 0.0)
        line = f"{row.kind.name:12}{row.kind.passes:7}{f'{mean:.2f} +-{spread:.2f}':>15}"
        for name, _, factor, digits in COLUMNS:
            value, _ = summary([getattr(quality, name) for quality in row.quality]) or (0.0, 0.0)
            line += f"{value * factor:9.{digits}f}"
        for b in batches:
            faster = rows[0].timing.image[b] / row.timing.image[b]
            line += f"{f'{row.timing.image[b]:.2f} ms ({faster:.1f}x)':>24}"
        lines.append(line)
    return "\n".join([*lines, "", *(f"{row.kind.name:12}{row.kind.how}" for row in rows)])


def _gauge(recipe: Recipe) -> Gauge:
    from ddexport.distill.data import load_data
    from ddexport.distill.settings import distill_settings
    from ddexport.validate.features.digits import judge_path, load_judge
    from ddexport.validate.quality import Gauge

    return Gauge(load_judge(judge_path()), load_data(distill_settings(recipe).data))


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not all(part.strip().isdecimal() for part in value.split(",")):
        raise click.BadParameter(f"{value!r} is not a list of whole numbers like 0,1,2")
    return tuple(int(part) for part in value.split(","))


@click.command("comparison", cls=console.Command)
@click.argument("model")
@click.option(
    "--images", type=click.IntRange(100), default=2000, show_default=True, help="Images a row and seed."
)
@click.option("--seeds", default="0,1,2", show_default=True, callback=_numbers, help="Of labels' draws.")
@click.option("--skip", metavar="LIST", callback=_numbers, help="The n of the rows skip-n. [default: spread]")
@click.option("--batches", default="1,64", show_default=True, callback=_numbers, help="Batches to time.")
@click.option(
    "--rounds", type=click.IntRange(1), default=15, show_default=True, help="Rounds to take the median of."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of torch, when timed.")
@click.option(
    "--weights", type=click.Path(path_type=Path, file_okay=False), help="A run's folder. [default: embedded]"
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Also draw FD against time.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
@console.debug_option
def command(model: str, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Compare MODEL's teacher, its student, and drawing at once without distillation: quality and time.

    MODEL is a recipe that was trained with `ddexport distill`.
    """
    from ddexport.recipe import load_recipe
    from ddexport.runtime.files import check_image_suffix, check_writable

    request = Options(**options)
    if not all(request.batches):
        raise click.BadParameter("0 is not the size of a batch", param_hint="--batches")
    recipe = load_recipe(model)
    if plot is not None:
        check_image_suffix(plot)
        check_writable(plot)
    rows = measure(recipe, request)
    if plot is not None:
        from ddexport.validate.comparison_plot import write_plot

        write_plot(rows, recipe.title, plot)
    if as_json:
        settings = {"images": request.images, "seeds": request.seeds, "threads": request.threads}
        console.emit_json({"model": recipe.name, **settings, "rows": [row.to_dict() for row in rows]})
        return
    many = f"{request.threads} thread{'s' * (request.threads > 1)}"
    click.echo(f"{recipe.name}: {request.images} images a row and seed, seeds {list(request.seeds)};")
    click.echo(f"PyTorch, {many}, median of {request.rounds} rounds in turn\n")
    click.echo(table(rows))
