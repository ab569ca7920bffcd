"""`validate speed`: how long an image takes with the teacher, in two steps and in one.

PyTorch on the CPU, the reference modules as they are. What is compared runs in turn, round after round, so
that a busy machine slows all of it alike; each figure is the median over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from ddexport.runtime import console

if TYPE_CHECKING:
    from torch import Tensor

    from ddexport.recipe import Recipe
    from ddexport.validate.image_sets import Models


@dataclass(frozen=True)
class Timing:
    """What a runner takes: passes of its network for an image, and milliseconds an image by batch size.

    `sequence` is the time of the network alone, `image` that with the decoder.
    """

    name: str
    passes: int
    sequence: dict[int, float]
    image: dict[int, float]


@dataclass(frozen=True)
class Runner:
    """What is timed: its passes of a network, and noise (B, L, Cv), labels (B,) -> sequences (B, L, Cv)."""

    name: str
    passes: int
    sequences: Callable[[Tensor, Tensor], Tensor]


def few_steps(models: Models, known: tuple[int, ...], noise: Tensor, labels: Tensor) -> Tensor:
    """The student's sequences (B, L, Cv) as a bundle computes them; `known` as in a recipe's schedule."""
    import torch

    tokens, position = noise, torch.arange(noise.shape[1])[:, None]
    for count in known:
        inputs = torch.where(position < count, tokens, noise)
        tokens, *_ = models.student(inputs, labels, torch.full_like(labels, count))
    return tokens


def measure_speed(models: Models, batches: list[int], rounds: int) -> list[Timing]:
    """Teacher, and every schedule of the recipe from the longest on."""
    return time_runners(models, [teacher_runner(models), *student_runners(models)], batches, rounds)


def teacher_runner(models: Models) -> Runner:
    """The teacher, AR step by AR step, as its pairs were drawn."""
    import torch

    from ddexport.distill.teacher import at_random, generate

    pairs, tokenizer = models.pairs, models.tokenizer
    choose = at_random(torch.Generator().manual_seed(0))

    def sequences(noise: Tensor, labels: Tensor) -> Tensor:
        drawn = generate(models.teacher, tokenizer, labels, choose, pairs.guidance, pairs.top_k)
        embedded: Tensor = tokenizer.embed(drawn)
        return embedded

    return Runner("teacher", len(tokenizer.starts) - 1, sequences)


def student_runners(models: Models) -> list[Runner]:
    """The student in every schedule, the longest first, with the tables that a bundle has."""
    from ddexport.validate.drawing import student_schedules

    models.student.tabulate()
    alone = student_schedules(models.recipe.schedules, models.recipe.sequence.split)
    known = {f"student, {steps}": numbers for steps, numbers in alone.items()}
    return [
        Runner(name, len(known[name]), partial(few_steps, models, known[name]))
        for name in sorted(known, reverse=True)
    ]


def time_runners(models: Models, runners: list[Runner], batches: list[int], rounds: int) -> list[Timing]:
    """Times all runners in turn, round after round, each with the decoder behind it."""
    import torch

    sequence = models.recipe.sequence
    network: dict[str, dict[int, float]] = {runner.name: {} for runner in runners}
    image: dict[str, dict[int, float]] = {runner.name: {} for runner in runners}
    with torch.inference_mode():
        for batch in batches:
            labels = torch.arange(batch) % models.recipe.classes
            noise = torch.randn(batch, sequence.length, sequence.width)
            spent: dict[str, list[tuple[float, float]]] = {runner.name: [] for runner in runners}
            for number in range(rounds + 1):
                for runner in runners:
                    start = time.perf_counter()
                    drawn = runner.sequences(noise, labels)
                    middle = time.perf_counter()
                    models.tokenizer(drawn)
                    if number:  # the first round warms up
                        spent[runner.name].append((middle - start, time.perf_counter() - start))
            for name, times in spent.items():
                network[name][batch] = median(t for t, _ in times) * 1000 / batch
                image[name][batch] = median(t for _, t in times) * 1000 / batch
    return [
        Timing(runner.name, runner.passes, network[runner.name], image[runner.name]) for runner in runners
    ]


def table(timings: list[Timing]) -> str:
    """Milliseconds an image, and how many times faster than the teacher that is."""
    batches = list(timings[0].image)
    lines = [f"{'':14}{'passes':>8}" + "".join(f"{f'image, batch {b}':>24}{'network':>18}" for b in batches)]
    for timing in timings:
        line = f"{timing.name:14}{timing.passes:8}"
        for b in batches:
            for value, first, width in (
                (timing.image[b], timings[0].image[b], 24),
                (timing.sequence[b], timings[0].sequence[b], 18),
            ):
                line += f"{f'{value:.2f} ms ({first / value:.1f}x)':>{width}}"
        lines.append(line)
    return "\n".join(lines)


def _batches(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    if not all(part.isdigit() and int(part) for part in value.split(",")):
        raise click.BadParameter(f"{value!r} is not a list of sizes like 1,64")
    return [int(part) for part in value.split(",")]


def run(recipe: Recipe, weights: Path | None, batches: list[int], rounds: int, threads: int) -> list[Timing]:
    """Time the recipe's stored weights on `threads` threads. Raises DDError for a missing or bad file."""
    import torch

    from ddexport.validate.image_sets import load_models

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure_speed(load_models(recipe, weights), batches, rounds)
    finally:
        torch.set_num_threads(before)


@click.command("speed", cls=console.Command)
@click.argument("model")
@click.option("--batches", default="1,64", show_default=True, callback=_batches, help="Sizes of the batches.")
@click.option(
    "--rounds", type=click.IntRange(1), default=15, show_default=True, help="Rounds to take the median of."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch.")
@click.option(
    "--weights", type=click.Path(path_type=Path, file_okay=False), help="A run's folder. [default: embedded]"
)
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
@console.debug_option
def command(
    model: str, batches: list[int], rounds: int, threads: int, weights: Path | None, as_json: bool
) -> None:
    """Time MODEL's images: teacher against few steps.

    MODEL is a recipe that was trained with `ddexport distill`.
    """
    from ddexport.recipe import load_recipe

    timings = run(load_recipe(model), weights, batches, rounds, threads)
    if as_json:
        console.emit_json({"model": model, "threads": threads, "timings": [asdict(t) for t in timings]})
        return
    click.echo(f"PyTorch, {threads} thread{'s' * (threads > 1)}, median of {rounds} rounds in turn")
    click.echo(table(timings))
