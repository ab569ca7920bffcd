"""The command: what is measured, as a table, as JSON, as a plot and as a sheet of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from ddexport.runtime import console
from ddexport.runtime.options import comma_list, number, option
from ddexport.validate.options import shared

if TYPE_CHECKING:
    from ddexport.distill.data import DataSet
    from ddexport.recipe import Recipe

EPILOG = """
\b
Examples:
  ddexport validate distilled digits-var --plot plot.png --grid samples.png
  ddexport validate distilled digits-llamagen --samples 500 --seeds 0 --json
  ddexport validate distilled digits-var --weights runs/digits-var --threads 2
"""
Columns: TypeAlias = Mapping[str, tuple[str, float, int]]  # heading, factor, decimal places


def table(rows: Sequence[Mapping[str, Any]], columns: Columns, batches: Sequence[int]) -> str:
    """The rows as text: figures ± half of their range over the seeds, times with the speed-up."""
    from ddexport.validate.report import wide_table

    teacher = next(row for row in rows if row["kind"] == "teacher")
    lines: list[Mapping[str, str]] = []
    for row in rows:
        line = {"": str(row["name"]), "passes": str(row.get("passes", ""))}
        for name, (heading, factor, places) in columns.items():
            values = [row[key] for key in (name, f"{name}_half_range") if key in row]
            line[heading] = " ±".join(f"{value * factor:.{places}f}" for value in values)
        for key, heading in ((f"ms_{batch}", f"ms, batch {batch}") for batch in batches):
            line[heading] = f"{row[key]:.2f} ({teacher[key] / row[key]:.1f}x)" if key in row else ""
        lines.append(line)
    return wide_table(lines)


def tables(rows: Sequence[Mapping[str, Any]], columns: Columns, batches: Sequence[int]) -> list[str]:
    """A table for each part of the data."""
    parts = groupby(rows, lambda row: row.get("part", ""))
    return [f"{part}\n{table(list(own), columns, batches)}".lstrip("\n") for part, own in parts]


def as_text(report: Mapping[str, Any], columns: Columns) -> str:
    """The whole report for people."""
    accuracy = report["classifier_accuracy"]
    lines = [
        f"{report['model']}: {report['samples']} images for each of the seeds {report['seeds']};",
        f"the digit classifier recognizes {accuracy:.1%} of the held-out digits\n",
        *tables(report["rows"], columns, list(report["rounds"])),
        f"\nms per image: PyTorch, threads: {report['threads']}, medians of runs in turns",
        "\nchi-square test of the mapping from noise to tokens, on the trained teacher",
    ]
    for test in report["map"]:
        verdict = "accepted" if test["accepted"] else "REJECTED"
        lines.append(
            f"  AR step {test['step']}: {test['statistic']:.0f} on {test['degrees']} degrees of freedom,"
            f" p = {test['p_value']:.3f}, {verdict}"
        )
    return "\n".join(lines)


def write_classifier(recipe: Recipe, data: DataSet) -> None:
    """Trains the digit classifier on the real digits, and installs it with the statistics of its features."""
    from ddexport.validate.features import digits
    from ddexport.validate.fid.references import write_shipped_statistics

    with console.stage("training the digit classifier"), console.progress(digits.EPOCHS, "epochs") as bar:
        classifier = digits.train_classifier(data, on_epoch=lambda epoch, accuracy: bar.advance())
    digits.save_classifier(classifier, digits.classifier_path(), digits.feature_scale(classifier, data))
    click.echo(f"written to {digits.classifier_path()}", err=True)
    click.echo(f"set STATISTICS_SHA256 to {write_shipped_statistics(recipe)}", err=True)


_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_seed = partial(number, least=0)


@click.command("distilled", cls=console.Command, epilog=EPILOG)
@shared("model")
@option("--weights", type=_FOLDER, metavar="DIR", show_default="the weights that ship with ddexport",
        help="Directory of a run of `ddexport distill`.")  # fmt: skip
@option("--samples", type=click.IntRange(100), default=2000, metavar="N", help="Number of images per seed.")
@option("--seeds", default="0,1,2", metavar="N,...", callback=comma_list(_seed),
        help="Seeds of the random noise, separated by commas.")  # fmt: skip
@option("--draws", type=click.IntRange(100), default=20_000, metavar="N",
        help="Number of tokens per chi-square test, which compares the mapping from noise to tokens with the"
        " teacher's probabilities.")  # fmt: skip
@option("--plot", type=_FILE, metavar="FILE", help="Write a plot of Frechet distance against time.")
@option("--grid", type=_FILE, metavar="FILE", help="Write a picture with samples of every method.")
@option("--train-classifier", is_flag=True,
        help="First train the digit classifier again, and copy it to recipes/weights.")  # fmt: skip
@shared("threads", default=1, show_default=None)
@shared("json")
@console.debug_option
def command(
    model: str,
    weights: Path | None,
    samples: int,
    seeds: tuple[int, ...],
    draws: int,
    plot: Path | None,
    grid: Path | None,
    train_classifier: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Measure quality and speed of a model trained by `distill`.

    Teacher, student and a baseline generate images in PyTorch. The table shows the accuracy of a digit
    classifier on them, Frechet distance (FD), precision, recall and time per image; of a model that draws
    from sentences, how many images show what their sentence says. MODEL needs a recipe that `ddexport
    distill` can train.
    """
    from ddexport.recipe import load_recipe
    from ddexport.runtime.files import check_image_suffix, check_writable, write_image

    recipe = load_recipe(model)
    for path in (plot, grid):
        if path is not None:
            check_image_suffix(path)
            check_writable(path)

    import torch

    from ddexport.distill.data import load_data
    from ddexport.distill.settings import distill_settings
    from ddexport.validate.distilled.draws import load_models
    from ddexport.validate.distilled.map_check import check_map
    from ddexport.validate.distilled.measure import gauge_of, measured_rows, sheet_of_samples
    from ddexport.validate.distilled.times import ROUNDS
    from ddexport.validate.features.digits import classifier_path, held_out_accuracy, load_classifier
    from ddexport.validate.plots import frechet_against_time

    torch.set_num_threads(threads)
    data = load_data(distill_settings(recipe).data)
    models = load_models(recipe, weights, data)
    if train_classifier:
        write_classifier(recipe, data)
    classifier = load_classifier(classifier_path())
    if grid is not None:
        write_image(grid, sheet_of_samples(models, data, seeds[0]), follow=True)
    gauge = gauge_of(data, classifier)
    rows = measured_rows(models, gauge, data, seeds, samples)
    if plot is not None:
        of_first_part = [row for row in rows if row.get("part") == rows[0].get("part")]
        write_image(plot, frechet_against_time(of_first_part, recipe.title, list(ROUNDS)), follow=True)
    with console.stage("chi-square test of the mapping"):
        tests = check_map(models, draws)

    report = {
        "model": recipe.name,
        "samples": samples,
        "seeds": list(seeds),
        "threads": threads,
        "rounds": ROUNDS,
        "classifier_accuracy": held_out_accuracy(classifier, data),
        "rows": rows,
        "map": tests,
    }
    if as_json:
        console.emit_json(report)
    else:
        click.echo(as_text(report, gauge.COLUMNS))
