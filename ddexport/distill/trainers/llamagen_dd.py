"""Training LlamaGen: one scale of codes of unit length, start values, and sampling token by token.

The latent is brought to unit length at every place, as the codes are ("Improved VQGAN", arXiv 2110.04627):
only directions are quantised.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddexport.distill.trainers import Choose
from ddexport.families._llamagen_models import LlamaGenStudent, LlamaGenTeacher, guided
from ddexport.families._llamagen_text import CaptionEmbedding
from ddexport.families._llamagen_tokenizer import RasterTokenizer

UNGUIDED = 1.0  # LlamaGen's scale that leaves the conditional model as it is


def latent(tokenizer: RasterTokenizer, images: Tensor) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> what is quantised (B, Cv, h, w), of unit length at every place."""
    return F.normalize(tokenizer.encode(images).float(), dim=1)


def partial_latents(tokenizer: RasterTokenizer, latent: Tensor) -> tuple[Tensor, Tensor]:
    """The quantised latent, which is the only partial sum: (1, B, Cv, h, w), and the tokens (B, L) int64."""
    tokens = tokenizer.tokens(latent.detach())
    return tokenizer.latent(tokenizer.embed(tokens))[None], tokens


def residual_vectors(tokenizer: RasterTokenizer, latent: Tensor) -> list[Tensor]:
    """The vectors of `latent` (B, Cv, h, w): one tensor (B * h*w, Cv)."""
    return [latent.flatten(2).transpose(1, 2).flatten(0, 1)]


@torch.no_grad()
def settle_codebook(tokenizer: RasterTokenizer) -> None:
    """Store the codes as they are used, at unit length, where half precision keeps most of their digits.

    Beside noise of length sqrt(Cv) they are short, as the published ones are. The map does not mind: scaling
    all codes moves the times at which it decides, not its tokens.
    """
    tokenizer.embedding.weight.copy_(tokenizer.codebook)


@torch.no_grad()
def initialise_teacher(teacher: LlamaGenTeacher, generator: torch.Generator) -> None:
    """Start values of LlamaGen: small normal products and tables, and an output head of zeros."""
    for name, p in teacher.named_parameters():
        if p.ndim < 2:
            p.fill_(1.0)  # the gains of the norms; there are no biases
        elif name.startswith("logits_head"):
            p.zero_()
        else:
            p.normal_(0.0, 0.02, generator=generator)
    if isinstance(caption := teacher.condition_embedding, CaptionEmbedding):
        caption.null.normal_(generator=generator)  # as large as the features; it is not trained


def teacher_inputs(tokenizer: RasterTokenizer, tokens: Tensor) -> Tensor:
    """The teacher reads tokens (B, L) as they are, one position late."""
    return tokens


@torch.no_grad()
def generate(
    teacher: Any,
    tokenizer: RasterTokenizer,
    condition: tuple[Tensor, ...],
    choose: Choose,
    guidance: float,
    prefix: Tensor | None = None,
    end: int | None = None,
) -> Tensor:
    """Sample token by token from a `LlamaGenTeacher`: tokens (B, `end` or L). Guidance is the same at all.

    guidance: 1 is none.
    """
    cache, guide = teacher.new_cache(), guidance != UNGUIDED
    pair = teacher.pair(*condition) if guide else condition
    none = torch.empty(len(condition[0]), 0, dtype=torch.int64, device=condition[0].device)
    tokens = [none if prefix is None else prefix]
    for i in range(tokens[0].shape[1], end or teacher.geometry.length):
        logits = teacher.step(torch.cat([tokens[-1]] * 2) if guide else tokens[-1], *pair, cache)
        if guide:
            logits = guided(logits, guidance)
        tokens.append(choose(logits[:, None], slice(i, i + 1)))
    return torch.cat(tokens, 1)


@torch.no_grad()
def initialise_student(
    student: LlamaGenStudent, teacher: LlamaGenTeacher, generator: torch.Generator
) -> None:
    """Copy the teacher into the student; what the teacher lacks starts small.

    The teacher looks tokens up in a table, the student embeds vectors linearly: its embedding starts as the
    linear map that takes the codes to the table's rows with the least squared error. The noise-or-data
    embedding and the regression head are new.
    """
    theirs = teacher.state_dict()
    codes = F.pad(student.codebook, (0, 1), value=1.0)  # (V, Cv + 1): the last column meets the bias
    embedding = torch.linalg.lstsq(codes, theirs.pop("token_embedding.weight")).solution
    student.token_embedding.weight.copy_(embedding[:-1].T)
    student.token_embedding.bias.copy_(embedding[-1])
    for name, p in student.named_parameters():
        if name in theirs:
            p.copy_(theirs[name])
        elif not name.startswith("token_embedding."):
            p.zero_() if name.endswith("bias") else p.normal_(0.0, 0.02, generator=generator)
