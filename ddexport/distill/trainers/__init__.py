"""What training needs to know about a family, one module each, found by the family's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from ddexport.runtime.registry import load_plugin

Choose: TypeAlias = Callable[[Tensor, slice], Tensor]  # (B, n, V) and its positions -> tokens (B, n)
Tokenizer: TypeAlias = Any  # the tokenizers share an interface (docs/architecture.md) and no base class


class Trainer(Protocol):
    """What a module of this package provides. K is the number of the tokenizer's scales."""

    def latent(self, tokenizer: Tokenizer, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> what is quantised (B, Cv, h, w)."""

    def partial_latents(self, tokenizer: Tokenizer, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise with all partial sums: (B, Cv, h, w) -> (K, B, Cv, h, w), tokens (B, L) int64.

        The sums pass gradients to the codes, not to the latent.
        """

    def residual_vectors(self, tokenizer: Tokenizer, latent: Tensor) -> list[Tensor]:
        """The vectors that each scale gets to quantise for `latent`: K tensors (n, Cv)."""

    def settle_codebook(self, tokenizer: Tokenizer) -> object:
        """Bring the trained codes to their final size, in place; every output stays what it was."""

    def initialise_teacher(self, teacher: Any, generator: torch.Generator) -> None:
        """Start values, in place."""

    def teacher_inputs(self, tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
        """What the teacher reads to predict all tokens (B, L) at once, each from the AR steps before."""

    def generate(
        self,
        teacher: Any,
        tokenizer: Tokenizer,
        condition: tuple[Tensor, ...],
        choose: Choose,
        guidance: float,
        prefix: Tensor | None = None,
        end: int | None = None,
    ) -> Tensor:
        """Sample AR step by AR step: tokens (B, L), or those before position `end`.

        condition: labels (B,) alone; or features (B, T, W) and mask (B, T) of texts. `choose` picks from
        logits (B, n, V). prefix: tokens (B, n) that are there already.
        """

    def initialise_student(self, student: Any, teacher: Any, generator: torch.Generator) -> None:
        """Copy the teacher into the student, in place; what the teacher lacks starts small."""


def trainer(family: str) -> Trainer:
    """The trainer of a family. Raises DDError for one that has none."""
    return cast(Trainer, load_plugin(__name__, family, kind="trainer"))
