"""How the PyTorch reference samples: student steps, the teacher's AR steps and the choice of their tokens.

What the runtime computes in numpy is computed here a second time, in torch and from the papers, so that a
fault of the runtime's sampler shows as a difference. Nothing but the noise and the errors may come from
`runtime` (an import contract in pyproject.toml); `contents` checks the noise by
the vectors of docs/bundle.md.

Shapes: N images, L positions, Cv width of a code, S split, V codebook. Source: arXiv 2412.17153, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddexport.runtime.noise import gaussian_noise, uniform_numbers

FloatArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]
Given: TypeAlias = tuple[Tensor, ...]
Module: TypeAlias = Any  # torch.nn.Module: its stubs are not analysed
# (teacher, tokenizer, labels or what stands for texts, choose, guidance, prefix, end) -> tokens (N, end):
# `generate` of ddexport.distill.trainers.
GenerateTokens: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class TokenChoice:
    """How a teacher's tokens are chosen: guidance scale, and which tokens can be drawn."""

    cfg: float
    top_k: int
    top_p: float
    temperature: float


@dataclass(frozen=True)
class Plan:
    """One schedule. known: of each student step, the positions that hold data. teacher: from where to
    where."""

    known: tuple[int, ...]
    split: int
    teacher: tuple[int, int] | None = None

    @property
    def passes(self) -> list[tuple[str, int]]:
        """("student" or "teacher", known positions) in order: the student starts where the teacher does
        not."""
        passes = [("student", known) for known in self.known]
        if self.teacher is not None:
            passes.insert(1 if self.teacher[0] else 0, ("teacher", self.teacher[0]))
        return passes


@dataclass(frozen=True)
class Pass:
    """One student step, or all AR steps of the teacher together.

    inputs: float32 (N, L, Cv), what the student was given; of the teacher its prefix as tokens, int64 (N,
    known). logits: float32 (N, S, V), or guided logits (N, end - start, V). tokens: int64 (N, S) or (N, end).
    sequence: float32 (N, L, Cv).
    """

    role: str
    known: int
    inputs: npt.NDArray[Any]
    logits: FloatArray
    tokens: IntArray
    sequence: FloatArray

    @staticmethod
    def joined(parts: Sequence[Pass]) -> Pass:
        """The same pass of several batches in one."""
        names = ("inputs", "logits", "tokens", "sequence")
        arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        return Pass(parts[0].role, parts[0].known, *arrays)


def noise_of(seeds: npt.NDArray[np.uint64], length: int, width: int) -> FloatArray:
    """The noise (N, L, Cv) of image 0 of every seed (N,)."""
    return np.concatenate([gaussian_noise(int(seed), [0], length, width) for seed in seeds])


def uniforms_of(seeds: npt.NDArray[np.uint64], length: int) -> npt.NDArray[np.float64]:
    """The numbers (N, L) by which a teacher draws image 0 of every seed (N,)."""
    return np.concatenate([uniform_numbers(int(seed), [0], length) for seed in seeds])


def pixels_of(images: FloatArray) -> npt.NDArray[np.uint8]:
    """Images (N, 3, H, W) in [0, 1] as they are written to a file: (N, H, W, 3)."""
    values = np.round(np.clip(images, 0, 1) * np.float32(255))
    return np.ascontiguousarray(values.transpose(0, 2, 3, 1).astype(np.uint8))


class Sampler:
    """Samples from the reference's modules, which lie on `device`; arrays in and out are numpy's."""

    def __init__(
        self, student: Module, tokenizer: Module, teacher: Module | None = None,
        generate: GenerateTokens | None = None, choice: TokenChoice | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.student, self.tokenizer, self.teacher = student, tokenizer, teacher
        self.generate, self.choice, self.device = generate, choice, device

    def sample(
        self, noise: FloatArray, condition: Sequence[npt.NDArray[Any]], plan: Plan,
        uniforms: npt.NDArray[np.float64] | None = None,
    ) -> list[Pass]:  # fmt: skip
        """All passes of a schedule. noise (N, L, Cv), uniforms (N, L) where a teacher draws.

        condition: what the modules are given between tokens and known: labels (N,), or features (N, T, W) of
        texts and their mask (N, T).
        """
        with torch.inference_mode():
            start, given = self._tensor(noise), tuple(map(self._tensor, condition))
            tokens = torch.zeros(len(start), 0, dtype=torch.int64, device=start.device)
            sequence = start
            passes: list[Pass] = []
            for role, known in plan.passes:
                if role == "student":
                    step = self._student(start, given, plan.split, known, tokens, sequence)
                else:
                    assert uniforms is not None
                    step = self._teacher(start, given, plan, tokens, sequence, self._tensor(uniforms))
                tokens, sequence = step[2:]
                passes.append(Pass(role, known, *(tensor.cpu().numpy() for tensor in step)))
            return passes

    def decode(self, sequence: FloatArray) -> FloatArray:
        """sequence (N, L, Cv) float32 -> images (N, 3, H, W) float32 in [0, 1]."""
        with torch.inference_mode():
            images: FloatArray = self.tokenizer(self._tensor(sequence)).cpu().numpy()
        return images

    def _student(
        self, noise: Tensor, given: Given, split: int, known: int, tokens: Tensor, sequence: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first `known` positions as they were left, and the original noise behind them."""
        position = torch.arange(noise.shape[1], device=noise.device)
        inputs = torch.where((position < known)[None, :, None], sequence, noise)
        counts = torch.full((len(noise),), known, device=noise.device)
        sequence, _, logits = self.student.at_split(split)(inputs, *given, counts)
        chosen = logits.argmax(-1)
        kept = min(known, chosen.shape[1])
        return inputs, logits, torch.cat([tokens[:, :kept], chosen[:, kept:]], 1), sequence

    def _teacher(
        self, noise: Tensor, given: Given, plan: Plan, tokens: Tensor, sequence: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """AR steps behind the student's prefix, of which the regressed embeddings count as the nearest
        codes."""
        assert plan.teacher is not None and self.choice is not None and self.generate is not None
        (first, end), choice, codebook = plan.teacher, self.choice, self.tokenizer.codebook
        own = tokens[:, :first]
        nearest = torch.cdist(sequence[:, own.shape[1] : first].double(), codebook.double()).argmin(-1)
        prefix = torch.cat([own, nearest], 1)
        guided: list[Tensor] = []

        def choose(logits: Tensor, positions: slice) -> Tensor:
            guided.append(logits)
            return chosen_tokens(logits, uniforms[:, positions], choice)

        tokens = self.generate(self.teacher, self.tokenizer, given, choose, choice.cfg, prefix, end)
        return prefix, torch.cat(guided, 1), tokens, torch.cat([codebook[tokens], noise[:, end:]], 1)

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)


def chosen_tokens(logits: Tensor, uniforms: Tensor, choice: TokenChoice) -> Tensor:
    """One token a position: logits (N, n, V), uniforms (N, n) float64 -> int64 (N, n).

    The k most likely tokens are kept, and of them the fewest whose mass reaches p. The token drawn is the
    first, in index order, at which the cumulated mass exceeds the uniform share of the whole.
    """
    if choice.top_k == 1:
        return logits.argmax(-1)
    scaled = logits.double() / choice.temperature
    if choice.top_k < scaled.shape[-1]:
        smallest = scaled.topk(choice.top_k).values[..., -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    mass = scaled.softmax(-1)
    if choice.top_p < 1:
        falling = mass.sort(-1, descending=True).values
        before = falling.cumsum(-1) - falling
        last = (before < choice.top_p).sum(-1, keepdim=True) - 1
        mass = mass.masked_fill(mass < falling.gather(-1, last), 0.0)
    cumulated = mass.cumsum(-1)
    share = uniforms[..., None] * cumulated[..., -1:]
    return torch.searchsorted(cumulated, share, right=True)[..., 0]
