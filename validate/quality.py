"""`validate quality`: how good are the images of a distilled model, and does it draw what its teacher's map
draws?

The judge is a classifier of real digits that took no part in the distillation
(`validate/features/digits.py`). Every figure is measured with the weights as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console

if TYPE_CHECKING:
    from ddexport.distill.data import DataSet
    from ddexport.recipe import Recipe
    from ddexport.validate.features.digits import DigitJudge
    from ddexport.validate.image_sets import ImageRow, Models
    from ddexport.validate.quality_measures import Float64Array, PixelComponents

REFERENCE_CHUNK = 1000  # images a chunk for the Frechet distance, and a side for precision and recall
NEIGHBOURS = 3


@dataclass(frozen=True)
class Quality:
    """The figures of one row. Distances are explained in docs/distillation.md.

    accuracy: share read as the class asked for. frechet, pixel_frechet: Frechet distance to the real training
    digits in the judge's features (each scaled to unit variance over these) and in 64 principal components of
    the pixels. variance, pixel_variance: within-class variance in the same two spaces. paired_error: mean
    squared error to the map's image of the same noise (pixels in [0, 1]); paired_ratio: the same over that to
    another image of the class. None where a row has no pairs.
    """

    accuracy: float
    frechet: float
    pixel_frechet: float
    variance: float
    pixel_variance: float
    precision: float
    recall: float
    paired_error: float | None = None
    paired_ratio: float | None = None


class Gauge:
    """Measures rows against the real training digits."""

    def __init__(self, judge: DigitJudge, data: DataSet) -> None:
        from ddexport.validate.image_sets import as_pixels
        from ddexport.validate.quality_measures import PixelComponents

        self.judge = judge
        images = (data.train.images() + 1) / 2
        pixels = as_pixels(images)
        self.components: PixelComponents = PixelComponents(pixels)
        self.real_pixels: Float64Array = self.components(pixels)
        real = judge.read(images * 2 - 1).features.numpy()
        # The size of a classifier's features is an accident of its training (weight decay, label smoothing);
        # in units of their standard deviation over real digits the distances no longer depend on it.
        self.scale: Float64Array = real.std(0)
        self.real: Float64Array = real / self.scale

    def measure(self, row: ImageRow, target: ImageRow | None = None) -> Quality:
        """All figures of one row; `target` holds the map's images of the same noise."""
        import numpy as np

        from ddexport.validate.image_sets import as_pixels
        from ddexport.validate.metrics.precision_recall import precision_recall
        from ddexport.validate.quality_measures import chunked_frechet, within_class_variance

        read = self.judge.read(row.images * 2 - 1)
        features = read.features.numpy() / self.scale
        pixels = self.components(as_pixels(row.images))
        labels = row.labels.numpy()
        order = np.random.default_rng(0).permutation(len(features))[:REFERENCE_CHUNK]
        precision, recall = precision_recall(features[order], self.real[:REFERENCE_CHUNK], NEIGHBOURS)
        error, ratio = paired_error(row, target) if row.paired and target else (None, None)
        return Quality(
            accuracy=float((read.classes == row.labels).double().mean()),
            frechet=chunked_frechet(features, self.real, REFERENCE_CHUNK),
            pixel_frechet=chunked_frechet(pixels, self.real_pixels, REFERENCE_CHUNK),
            variance=within_class_variance(features, labels),
            pixel_variance=within_class_variance(pixels, labels),
            precision=precision,
            recall=recall,
            paired_error=error,
            paired_ratio=ratio,
        )


def paired_error(row: ImageRow, target: ImageRow) -> tuple[float, float]:
    """Mean squared error of `row` to `target`, and its ratio to the error against another target of the
    class.
    """
    from ddexport.validate.image_sets import shuffled_in_class

    other = target.images[shuffled_in_class(target.labels)]
    error = float((row.images - target.images).double().square().mean())
    return error, error / float((row.images - other).double().square().mean())


def measure_all(
    models: Models, data: DataSet, judge: DigitJudge, seeds: Sequence[int], samples: int
) -> dict[str, list[Quality]]:
    """One `Quality` a seed for every row (one in all for the real and reconstructed digits)."""
    from ddexport.validate.image_sets import drawn_rows, real_rows

    gauge = Gauge(judge, data)
    results = {row.name: [gauge.measure(row)] for row in real_rows(models, data)}
    for seed in console.progress(list(seeds), "seeds"):
        rows = drawn_rows(models, seed, samples)
        target = next(row for row in rows if row.name == "mapped pairs")
        for row in rows:
            results.setdefault(row.name, []).append(gauge.measure(row, target))
    return results


def summary(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and half of the range over the seeds; None where a row has no such figure."""
    numbers = [value for value in values if value is not None]
    return (sum(numbers) / len(numbers), (max(numbers) - min(numbers)) / 2) if numbers else None


def table(results: dict[str, list[Quality]]) -> str:
    """Rows of figures, mean over the seeds +- half of the range."""
    heads = {
        "accuracy": ("acc %", 100.0, 1),
        "frechet": ("FD", 1.0, 2),
        "pixel_frechet": ("FD pixel", 1.0, 1),
        "variance": ("var", 1.0, 1),
        "pixel_variance": ("var pixel", 1.0, 0),
        "precision": ("prec", 1.0, 2),
        "recall": ("rec", 1.0, 2),
        "paired_error": ("paired", 1.0, 4),
        "paired_ratio": ("ratio", 1.0, 2),
    }
    lines = [f"{'':24}" + "".join(f"{head[0]:>17}" for head in heads.values())]
    for name, qualities in results.items():
        cells = []
        for field, (_, factor, digits) in heads.items():
            value = summary([getattr(quality, field) for quality in qualities])
            if value is None:
                cells.append("")
            elif len(qualities) == 1:
                cells.append(f"{value[0] * factor:.{digits}f}")
            else:
                cells.append(f"{value[0] * factor:.{digits}f} +-{value[1] * factor:.{digits}f}")
        lines.append(f"{name:24}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def _train_judge(data: DataSet) -> None:
    from ddexport.validate.features.digits import (
        EPOCHS,
        feature_scale,
        held_out_accuracy,
        judge_path,
        save_judge,
        train_judge,
    )

    with console.stage("training the judge"), console.progress(EPOCHS, "epochs") as bar:
        judge = train_judge(data, on_epoch=lambda epoch, accuracy: bar.advance())
    save_judge(judge, judge_path(), feature_scale(judge, data))
    click.echo(
        f"{judge_path()}: {held_out_accuracy(judge, data):.1%} of the held-out digits read right", err=True
    )


def _seeds(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers like 0,1,2") from error


def _run(
    recipe: Recipe,
    samples: int,
    seeds: list[int],
    draws: int,
    weights: Path | None,
    grid: Path | None,
    retrain: bool,
) -> dict[str, Any]:
    from ddexport.distill.data import load_data
    from ddexport.distill.settings import distill_settings
    from ddexport.validate.features.digits import held_out_accuracy, judge_path, load_judge
    from ddexport.validate.image_sets import load_models
    from ddexport.validate.map_check import check_map
    from ddexport.validate.quality_grid import write_grid

    data = load_data(distill_settings(recipe).data)
    if retrain:
        _train_judge(data)
    judge = load_judge(judge_path())
    models = load_models(recipe, weights)
    if grid:
        write_grid(models, seeds[0], grid)
    results = measure_all(models, data, judge, seeds, samples)
    with console.stage("chi-square of the map"):
        chi_squares = check_map(models, draws)
    return {
        "judge_accuracy": held_out_accuracy(judge, data),
        "samples": samples,
        "seeds": seeds,
        "rows": results,
        "map": [test.to_dict() for test in chi_squares],
    }


@click.command("quality", cls=console.Command)
@click.argument("model")
@click.option(
    "--samples", type=click.IntRange(100), default=2000, show_default=True, help="Images a row and seed."
)
@click.option("--seeds", default="0,1,2", show_default=True, callback=_seeds, help="Seeds of the sampling.")
@click.option(
    "--draws", type=click.IntRange(100), default=20_000, show_default=True, help="Tokens a test of the map."
)
@click.option(
    "--weights", type=click.Path(path_type=Path, file_okay=False), help="A run's folder. [default: embedded]"
)
@click.option(
    "--grid", type=click.Path(path_type=Path, dir_okay=False), help="Also write a picture of samples."
)
@click.option("--train-judge", is_flag=True, help="First train the classifier again, and install it.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
@console.debug_option
def command(
    model: str,
    samples: int,
    seeds: list[int],
    draws: int,
    weights: Path | None,
    grid: Path | None,
    train_judge: bool,
    as_json: bool,
) -> None:
    """Measure the images of MODEL, a recipe that was trained with `ddexport distill`."""
    from ddexport.recipe import load_recipe

    report = _run(load_recipe(model), samples, seeds, draws, weights, grid, train_judge)
    if as_json:
        console.emit_json(report)
        return
    click.echo(
        f"{samples} images a row and seed, seeds {seeds};"
        f" judge: {report['judge_accuracy']:.1%} on held-out digits\n"
    )
    click.echo(table(report["rows"]))
    click.echo("\nchi-square of the map on the trained teacher")
    for test in report["map"]:
        verdict = "accepted" if test["accepted"] else "REJECTED"
        click.echo(
            f"  AR step {test['step']}: {test['statistic']:.0f} on {test['degrees']} degrees of freedom,"
            f" p = {test['p_value']:.3f}, {verdict}"
        )
