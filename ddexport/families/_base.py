"""What a family provides: modules for its parts, and how the published files spell their weights."""

from __future__ import annotations

import copy
import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ddexport.runtime.errors import DDError
from ddexport.runtime.schedule import schedule_fault

if TYPE_CHECKING:
    from ddexport.families._explicit_cache import ExplicitCache
    from ddexport.recipe import Recipe


class GeometryError(DDError):
    """A recipe whose geometry does not fit its family."""


@dataclass(frozen=True)
class Layout:
    """How a published file spells the weights of one part.

    `published(key)` gives the published name of one of our state-dict keys; where the file stores several
    tensors for one of ours (query, key and value), all names, to be concatenated along dimension 0.
    `recomputable` are published buffers that carry no information, as regular expressions:
    they may be missing, and where present they must satisfy the check, or the file was made by different
    code. `rows(key)` is given where our tensor has the published one's rows in another order: for each of
    our rows the index of the published row, else None.
    """

    published: Callable[[str], tuple[str, ...]]
    recomputable: Mapping[str, Callable[[Tensor], bool]] = field(default_factory=dict)
    rows: Callable[[str], Tensor | None] = lambda key: None


class Student(nn.Module):
    """The contract every family's student keeps."""

    codebook: Tensor  # [V, Cv], the tokenizer's
    geometry: Any  # the family's, with `split`

    def forward(self, tokens: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, L, Cv], label [B], known [B] -> sequence [B, L, Cv], tokens [B, S], logits [B, S, V]."""
        raise NotImplementedError

    def heads(self, tokens: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Both heads at every position, nothing composed: logits [B, L, V], embeddings [B, L, Cv]."""
        raise NotImplementedError

    def tabulate(self) -> None:
        """Replaces, in place, what depends on a small index alone by tables, if there is such. Outputs stay
        equal."""

    def attend_in_groups(self) -> None:
        """Replaces, in place, attention by one that leaves out what the mask forbids. Outputs stay equal.

        Where that saves nothing, as in causal attention over a few hundred positions, nothing is to be done.
        """

    def at_split(self, split: int) -> Student:
        """The same student with another split position; it shares every weight with this one."""
        twin = copy.copy(self)
        twin.geometry = dataclasses.replace(self.geometry, split=split)
        return twin


class Teacher(nn.Module):
    """What every family's teacher has: an auto-regressive model of the token sequence.

    Each AR step draws a group of positions; `geometry.starts` holds where the groups start, and L.
    """

    family: str  # its name: how it is trained and sampled is found by it
    guidance: Literal[
        "rising", "constant"
    ]  # how its guidance goes with the AR steps, in the manifest's words (runtime/bundle.py)
    geometry: Any  # the family's, with `starts`, `depth`, `heads`, `head_width` and `classes`

    def forward(self, inputs: Tensor, label: Tensor) -> Tensor:
        """All positions at once, for training: -> logits [B, L, V], each given the AR steps before."""
        raise NotImplementedError

    def reader(self, tokenizer: nn.Module) -> nn.Module:
        """A module from tokens [B, L] int64 and positions [n] int64 to the inputs [B, n, ...] of `extend`.

        It reads the tokens of earlier AR steps only, and holds those weights of the tokenizer that it needs.
        """
        raise NotImplementedError

    def extend(
        self, inputs: Tensor, label: Tensor, positions: Tensor, past: Sequence[ExplicitCache]
    ) -> Tensor:
        """The consecutive positions [n] behind what `past` holds: -> logits [2B, n, V], of these positions.

        Args:
            inputs: [2B, n, ...] of `reader`, conditional rows before unconditional ones.
            label: [2B] int64; `geometry.classes` is the null class of guidance.
            positions: [n] int64.
            past: one for each block, with as many valid positions as come before; takes the new rows.
        """
        raise NotImplementedError

    def pair(self, label: Tensor) -> tuple[Tensor, ...]:
        """The conditions of guidance, those of the null class behind: label [B] -> [2B]."""
        return (torch.cat([label, torch.full_like(label, self.geometry.classes)]),)

    def tabulate(self) -> None:
        """As a student's."""


class Family(ABC):
    """One model family. Stateless: a recipe goes in, modules and layouts come out."""

    @abstractmethod
    def geometry(self, recipe: Recipe) -> Any:
        """Sizes of the transformer, with `starts` as in `Teacher`. Raises `GeometryError`."""

    def build(self, recipe: Recipe, role: str) -> nn.Module:
        """The module of `role`, initialised, float32: "student", "tokenizer", "teacher" or "decoder_NAME".

        Raises `GeometryError` if the recipe does not fit.
        """
        from ddexport.families._small_decoder import small_decoder

        return small_decoder(recipe, role) if role.startswith("decoder") else self._build(recipe, role)

    def layout(self, recipe: Recipe, role: str) -> Layout:
        """How published files spell the weights of `role`."""
        return Layout(lambda key: (key,)) if role.startswith("decoder") else self._layout(recipe, role)

    @abstractmethod
    def _build(self, recipe: Recipe, role: str) -> nn.Module:
        """`build` of the three roles that are the family's own."""

    @abstractmethod
    def _layout(self, recipe: Recipe, role: str) -> Layout:
        """`layout` of these."""


def check_steps(recipe: Recipe, starts: Sequence[int]) -> None:
    """Raises `GeometryError` unless the schedules fit a teacher whose AR steps start at `starts`."""
    for steps, schedule in recipe.schedules.items():
        if fault := schedule_fault(int(steps), schedule, recipe.sequence.length, tuple(starts)):
            raise GeometryError(
                f"recipe {recipe.name}: schedules.{steps}{fault}",
                f"AR steps start at {', '.join(map(str, starts))}",
            )


def renamed(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """`key` after each (regular expression, replacement) in turn."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def compose(
    tokens: Tensor, logits: Tensor, embeddings: Tensor, codebook: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's outputs from its two heads.

    Args:
        tokens: [B, L, Cv] what was fed in.
        logits: [B, S, V] for the positions before the split.
        embeddings: [B, L - S, Cv] regressed, for the positions from the split on.
        codebook: [V, Cv].
        known: [B] int64, the number of leading positions that pass through.

    Returns:
        sequence [B, L, Cv], the tokens [B, S] int64 before the split, the logits.
    """
    codes = logits.argmax(-1)
    drawn = torch.cat([codebook[codes], embeddings], dim=1)
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where((position < known[:, None])[:, :, None], tokens, drawn), codes, logits
