"""Training VAR: residual quantisation over the scales, start values, and sampling scale by scale.

Scale k takes the area-downsampled view of what the scales before have left of the latent, picks the nearest
codes and adds their contribution to the partial sum f_k (VAR, arXiv 2404.02905, section 3.2).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ddexport.distill.trainers import Choose
from ddexport.families._var_tokenizer import MultiScaleTokenizer
from ddexport.families.var_dd import VarStudent, VarTeacher, guided


def latent(tokenizer: MultiScaleTokenizer, images: Tensor) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> what is quantised (B, Cv, h, w)."""
    return tokenizer.encode(images)


def partial_latents(tokenizer: MultiScaleTokenizer, latent: Tensor) -> tuple[Tensor, Tensor]:
    """Residual quantisation with all partial sums.

    latent: (B, Cv, h, w). Returns f_1 .. f_K stacked (K, B, Cv, h, w), with gradients to codes and phis, and
    the tokens (B, L) int64.
    """
    rest, total = latent.detach(), torch.zeros_like(latent)
    sums, tokens = [], []
    for k in range(len(tokenizer.scales)):
        indices = tokenizer.nearest(tokenizer.next_features(rest, k))
        added = tokenizer.contribution(tokenizer.embed(indices), k)
        total, rest = total + added, rest - added.detach()
        sums.append(total)
        tokens.append(indices)
    return torch.stack(sums), torch.cat(tokens, 1)


def residual_vectors(tokenizer: MultiScaleTokenizer, latent: Tensor) -> list[Tensor]:
    """The vectors that each scale gets to quantise for `latent` (B, Cv, h, w): K tensors (B * s*s, Cv)."""
    sums, _ = partial_latents(tokenizer, latent)
    before = [torch.zeros_like(latent), *sums[:-1]]
    return [tokenizer.next_features(latent - total, k).flatten(0, 1) for k, total in enumerate(before)]


@torch.no_grad()
def settle_codebook(tokenizer: MultiScaleTokenizer) -> float:
    """Divide the codes by their global standard deviation; every output stays what it was. Returns the
    divisor.

    The map and the student compare codes with N(0, I), so the two should be of one size. The latent is scaled
    with the codes (`quant_conv`, the phis' biases), and scaled back by `post_quant_conv`.
    """
    divisor = tokenizer.codebook.std()
    tokenizer.embedding.weight.div_(divisor)
    tokenizer.quant_conv.weight.div_(divisor)
    tokenizer.quant_conv.bias.div_(divisor)  # type: ignore[union-attr]
    for phi in tokenizer.phis:
        phi.conv.bias.div_(divisor)
    tokenizer.post_quant_conv.weight.mul_(divisor)
    return float(divisor)


def initialise_teacher(teacher: VarTeacher, generator: torch.Generator) -> None:
    """Start values of VAR: small normal products and tables, gates that let a tenth through, a quiet output
    head.
    """
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if name.endswith("log_scale"):
                continue
            if p.ndim < 2 or name.endswith("bias"):
                p.zero_()
            else:
                p.normal_(0.0, 0.02, generator=generator)
            if ".conditioning.blocks." in f".{name}" and name.endswith("bias"):
                width = p.shape[0] // 6
                p[: 2 * width] = 0.1


def teacher_inputs(tokenizer: MultiScaleTokenizer, tokens: Tensor) -> Tensor:
    """What the teacher reads to predict tokens (B, L), every scale from those before: (B, L, Cv)."""
    return tokenizer.teacher_features(tokenizer.embed(tokens))


@torch.no_grad()
def generate(
    teacher: VarTeacher,
    tokenizer: MultiScaleTokenizer,
    condition: tuple[Tensor, ...],
    choose: Choose,
    guidance: float,
    prefix: Tensor | None = None,
    end: int | None = None,
) -> Tensor:
    """Sample scale by scale: tokens (B, `end` or L). Guidance grows with it: g * k / (K - 1).

    `prefix`, tokens (B, n) of whole scales, is read in one pass with the first scale drawn, in which all
    positions see each other, as in the published sampler.
    """
    (labels,) = condition
    scales, prefix_length = len(tokenizer.scales), 0 if prefix is None else prefix.shape[1]
    cache = teacher.new_cache()
    pair = torch.cat([labels, torch.full_like(labels, teacher.geometry.classes)]) if guidance else labels
    unread = [torch.zeros(len(labels), 1, tokenizer.codebook.shape[1], device=labels.device)]
    f_hat = torch.zeros((), device=labels.device)
    tokens: list[Tensor] = []
    for k, (a, b) in enumerate(pairwise(tokenizer.starts)):
        if a == end:
            break
        if prefix is not None and a < prefix_length:
            tokens.append(prefix[:, a:b])
        else:
            features = torch.cat(unread, 1)
            doubled = torch.cat([features, features]) if guidance else features
            logits = teacher.step(doubled, pair, b - features.shape[1], cache)[:, a - b :]
            unread = []
            if guidance:
                logits = guided(logits, guidance * k / max(1, scales - 1))
            tokens.append(choose(logits, slice(a, b)))
        f_hat = f_hat + tokenizer.contribution(tokenizer.embed(tokens[-1]), k)
        if k + 1 < scales:
            unread.append(tokenizer.next_features(f_hat, k + 1))
    return torch.cat(tokens, 1)


@torch.no_grad()
def initialise_student(student: VarStudent, teacher: VarTeacher, generator: torch.Generator) -> None:
    """Copy the teacher into the student; what the teacher lacks starts small.

    The class position is new in front: the tables of positions and levels get one new leading row, and the
    teacher's rows follow. The start vector stays at the class position. New are also the noise-or-data
    embedding with its projections and the regression head.
    """
    theirs = teacher.state_dict()
    for name, p in student.named_parameters():
        if name not in theirs:
            p.zero_() if name.endswith("bias") else p.normal_(0.0, 0.02, generator=generator)
        elif p.shape == theirs[name].shape:
            p.copy_(theirs[name])
        else:
            rows = p[0] if name == "positions" else p
            rows[:1].normal_(0.0, 0.02, generator=generator)
            rows[1:] = theirs[name].view(-1, rows.shape[-1])
