"""Stage 5: the few-step student, started from the teacher and trained on pairs.

At timestep t the first t AR steps of the input hold the pair's codes, the rest its noise; the student
predicts the whole sequence. Cross entropy on the logits and squared error on the embeddings are taken at
every position that is not known, also where sampling would use the other head: each loss teaches the shared
trunk the map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddexport.distill.conditions import Condition
from ddexport.distill.loop import Run, fit
from ddexport.distill.machine import bfloat16, compiled
from ddexport.distill.settings import StudentSettings
from ddexport.distill.trainers import trainer
from ddexport.families._base import Student, Teacher


def student_loss(
    student: Any,
    noise: Tensor,
    tokens: Tensor,
    condition: tuple[Tensor, ...],
    known: Tensor,
    regression: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """noise (B, L, Cv), tokens (B, L), what the student reads of each image, known (B,) -> the loss, and its
    two parts."""
    codes = student.codebook[tokens]
    unknown = torch.arange(tokens.shape[1], device=tokens.device) >= known[:, None]
    with bfloat16(tokens.device.type):
        logits, embeddings = student.heads(torch.where(unknown[..., None], noise, codes), *condition, known)
    weight = unknown / unknown.sum()
    entropy = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
    entropy = (entropy * weight.flatten()).sum()
    error = ((embeddings.float() - codes).square().mean(-1) * weight).sum()
    return entropy + regression * error, entropy, error


def train_student(
    student: Student,
    teacher: Teacher,
    codebook: Tensor,
    condition: Condition,
    pairs: dict[str, Tensor],
    settings: StudentSettings,
    run: Run,
    key: str,
) -> None:
    """Train `student` in place, on the run's device. Student, teacher and codebook are on the CPU."""
    student.codebook.copy_(codebook.detach())
    trainer(teacher.family).initialise_student(student, teacher, run.generator("student-init"))
    student.to(run.device)
    share = condition.images
    starts = torch.tensor(student.geometry.starts)[list(settings.timesteps)]

    def losses(
        noise: Tensor, tokens: Tensor, known: Tensor, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return student_loss(student, noise, tokens, inputs, known, settings.regression)

    losses_compiled = compiled(losses, run.compile)

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(pairs["noise"]) // share, (settings.batch // share,), generator=generator)
        index = (index[:, None] * share + torch.arange(share)).flatten()
        known = starts[torch.randint(len(starts), (settings.batch,), generator=generator)]
        rows = {name: column[index] for name, column in pairs.items()}
        with torch.no_grad():
            inputs = condition.inputs({name: row[::share] for name, row in rows.items()})
        noise, tokens, known = (x.to(run.device) for x in (rows["noise"], rows["tokens"].long(), known))
        given = tuple(x.to(run.device) for x in inputs)
        value, entropy, error = losses_compiled(noise, tokens, known, given)
        return value, {"cross_entropy": entropy, "squared_error": error}

    fit("student", run, settings, student, loss, key)
