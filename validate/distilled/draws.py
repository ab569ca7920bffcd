"""The images that `validate distilled` measures: of the teacher, its map, the student and the baseline.

Shapes: N images, L positions, Cv width of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from msgspec import structs
from torch import Tensor

from ddexport.distill.conditions import Condition
from ddexport.distill.data import DataSet, Part
from ddexport.distill.pairs import mapped_tokens
from ddexport.distill.settings import PairSettings, distill_settings
from ddexport.distill.teacher import at_random, generate
from ddexport.distill.tokenizer import images_of_sequences
from ddexport.distill.train import condition_of
from ddexport.distill.trainers import Choose, trainer
from ddexport.families._checkpoint import connect, load_part
from ddexport.recipe import Recipe, embedded_weights
from ddexport.runtime.errors import DDError
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.validate.reference import plans_of
from ddexport.validate.sampling import Plan, Sampler, TokenChoice

CHUNK = 500  # images drawn together

Module: TypeAlias = Any  # torch.nn.Module: its stubs are not analysed


@dataclass(frozen=True)
class Models:
    """The trained parts of one recipe, in eval mode, what they draw from, and how its pairs were drawn."""

    recipe: Recipe
    tokenizer: Module
    teacher: Module
    student: Module
    condition: Condition
    pairs: PairSettings

    @cached_property
    def sampler(self) -> Sampler:
        """The reference loop on these modules."""
        settings = self.recipe.teacher
        choice = TokenChoice(**structs.asdict(settings)) if settings else None
        draw_tokens = trainer(self.teacher.family).generate
        return Sampler(self.student, self.tokenizer, self.teacher, draw_tokens, choice)

    def teacher_tokens(self, condition: tuple[Tensor, ...], choose: Choose) -> Tensor:
        """The teacher with the guidance and top-k of the pairs: tokens (N, L) int64."""
        pairs = self.pairs
        return generate(self.teacher, self.tokenizer, condition, choose, pairs.guidance, pairs.top_k)


@dataclass(frozen=True)
class Inputs:
    """What the images of a seed are drawn from; noise and uniform numbers are the runtime's.

    labels (N,) int64, condition: what networks read of them, with N rows; noise (N, L, Cv) float32, uniforms
    (N, L) float64; the generator is for draws that the runtime does not make.
    """

    labels: Tensor
    condition: tuple[Tensor, ...]
    noise: Tensor
    uniforms: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, models: Models, part: Part, seed: int, count: int) -> Inputs:
        """`count` images of a part of the data."""
        sequence, labels = models.recipe.sequence, part.of(count)
        with torch.inference_mode():
            rows = models.condition.rows(labels, torch.Generator().manual_seed(seed), part.held_out)
            condition = models.condition.inputs(rows)
        noise = torch.from_numpy(gaussian_noise(seed, range(count), sequence.length, sequence.width))
        uniforms = torch.from_numpy(uniform_numbers(seed, range(count), sequence.length))
        return cls(labels, condition, noise, uniforms, torch.Generator().manual_seed(seed))

    def by_chunks(self, work: Callable[[Inputs], Tensor]) -> Tensor:
        """The results of `work` on `CHUNK` images at a time, concatenated."""
        splits = [tensor.split(CHUNK) for tensor in (self.labels, self.noise, self.uniforms, *self.condition)]
        parts = zip(*splits, strict=True)
        return torch.cat([work(Inputs(a, tuple(rest), b, c, self.generator)) for a, b, c, *rest in parts])


@dataclass(frozen=True)
class Method:
    """One method of making images, and the passes of a network that an image takes.

    plan: of a student. "discrete" is a student that regresses nothing: every position takes a code.
    """

    name: str
    kind: Literal["teacher", "map", "student", "discrete", "student and teacher", "baseline"]
    passes: int
    plan: Plan | None = None

    @property
    def timed(self) -> bool:
        """Whether it is a method of use, beside a yardstick."""
        return self.kind not in ("map", "discrete")

    @property
    def paired(self) -> bool:
        """Whether its image i is determined by the noise of image i, so that the map's is its target."""
        return self.kind in ("map", "student", "discrete")


def load_models(recipe: Recipe, folder: Path | None, data: DataSet) -> Models:
    """The recipe's parts from a run's `folder`, or the embedded ones.

    Raises DDError for a missing or bad file, and for a recipe that was not trained here.
    """
    parts = {}
    for role in ("tokenizer", "teacher", "student"):
        source = recipe.files.get(role)
        if source is None or not source.embedded:
            raise DDError(
                f"the recipe {recipe.name} has no embedded {role}",
                "only recipes trained with `ddexport distill` can be measured, such as digits-var",
            )
        path = folder / source.embedded if folder else embedded_weights(source)
        parts[role] = load_part(recipe, role, path)
    connect(parts["student"], parts["tokenizer"])
    settings = distill_settings(recipe)
    shipped = Path(str(resources.files("ddexport.recipes") / "weights"))
    condition = condition_of(recipe, settings, data, folder or shipped)
    return Models(recipe, **parts, condition=condition, pairs=settings.pairs)


def methods(models: Models) -> list[Method]:
    """The teacher, its map, every schedule of the recipe, and set prediction."""
    starts, length = list(models.tokenizer.starts), models.recipe.sequence.length
    students, discrete = [], []
    for plan in plans_of(models.recipe, teacher=models.recipe.teacher is not None).values():
        first, end = plan.teacher or (0, 0)
        by_teacher = sum(first <= start < end for start in starts[:-1])
        passes = len(plan.known) + by_teacher
        name = f"{passes} step{'s' * (passes > 1)}"
        if plan.known and by_teacher:
            name = f"{name}, {by_teacher} by the teacher"
            students.append(Method(name, "student and teacher", passes, plan))
        elif plan.known:
            students.append(Method(name, "student", passes, plan))
            if plan.split < length:
                whole = Plan(plan.known, length)
                discrete.append(Method(f"{name}, all discrete", "discrete", passes, whole))
    steps = len(starts) - 1
    yardsticks = [Method("teacher", "teacher", steps), Method("mapped pairs", "map", steps)]
    return [*yardsticks, *students, *discrete, Method("set prediction", "baseline", 1)]


def draw(models: Models, rows: Sequence[Method], inputs: Inputs) -> Iterator[tuple[Method, Tensor]]:
    """The images (N, 3, H, W) in [0, 1] of every method, in the order of `rows`."""
    labels, sample = inputs.labels, at_random(inputs.generator)
    of_teacher = inputs.by_chunks(lambda part: models.teacher_tokens(part.condition, sample))
    for method in rows:
        if method.plan is not None:
            sequences = inputs.by_chunks(partial(student_sequences, models, method.plan))
        elif method.kind == "map":
            sequences = models.tokenizer.embed(inputs.by_chunks(partial(tokens_of_map, models)))
        elif method.kind == "teacher":
            sequences = models.tokenizer.embed(of_teacher)
        else:
            sequences = models.tokenizer.embed(independent_marginals(of_teacher, labels, inputs.generator))
        yield method, images_of_sequences(models.tokenizer, sequences)


def student_sequences(models: Models, plan: Plan, inputs: Inputs) -> Tensor:
    """Few-step sampling by the reference loop: sequences (N, L, Cv) float32."""
    condition = tuple(tensor.numpy() for tensor in inputs.condition)
    passes = models.sampler.sample(inputs.noise.numpy(), condition, plan, inputs.uniforms.numpy())
    return torch.from_numpy(passes[-1].sequence)


def tokens_of_map(models: Models, inputs: Inputs) -> Tensor:
    """What the map makes of the noise: tokens (N, L) int64."""
    return mapped_tokens(models.teacher, models.tokenizer, inputs.noise, inputs.condition, models.pairs)


def independent_marginals(tokens: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Set prediction, the baseline `onestep*` of arXiv 2412.17153: all positions at once.

    A network that draws positions in one pass draws them independently. The best it can do is to draw each
    from its own marginal law given the class, where its cross entropy has the minimum. No such network is
    trained: each position's tokens (N, L) are shuffled among the teacher's samples of a class. The marginals
    are then the teacher's own to the last count, and no dependence between positions is left.
    """
    mixed = tokens.clone()
    for c in labels.unique():
        members = (labels == c).nonzero()[:, 0]
        for position in range(tokens.shape[1]):
            order = torch.randperm(len(members), generator=generator)
            mixed[members, position] = tokens[members[order], position]
    return mixed
