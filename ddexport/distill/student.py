"""Stage 5: the few-step student, started from the teacher and trained on pairs.

At timestep t the first t AR steps of the input hold the pair's codes, the rest its noise; the student
predicts the whole sequence. Cross entropy on the logits and squared error on the embeddings are taken at
every position that is not known, also where sampling would use the other head: each loss teaches the shared
trunk the map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddexport.distill.loop import Run, fit
from ddexport.distill.machine import bfloat16, compiled
from ddexport.distill.settings import StudentSettings
from ddexport.distill.trainers import trainer
from ddexport.families._base import Student, Teacher


def student_loss(
    student: Student, noise: Tensor, tokens: Tensor, labels: Tensor, known: Tensor, regression: float
) -> tuple[Tensor, Tensor, Tensor]:
    """noise (B, L, Cv), tokens (B, L), labels (B,), known (B,) -> the loss, and its two parts."""
    codes = student.codebook[tokens]
    unknown = torch.arange(tokens.shape[1]) >= known[:, None]
    with bfloat16():
        logits, embeddings = student.heads(torch.where(unknown[..., None], noise, codes), labels, known)
    weight = unknown / unknown.sum()
    entropy = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
    entropy = (entropy * weight.flatten()).sum()
    error = ((embeddings.float() - codes).square().mean(-1) * weight).sum()
    return entropy + regression * error, entropy, error


def train_student(
    student: Student,
    teacher: Teacher,
    codebook: Tensor,
    pairs: dict[str, Tensor],
    settings: StudentSettings,
    run: Run,
    key: str,
) -> None:
    """Train `student` in place."""
    student.codebook.copy_(codebook.detach())
    trainer(teacher.family).initialise_student(student, teacher, run.generator("student-init"))
    starts = torch.tensor(student.geometry.starts)[list(settings.timesteps)]

    def losses(noise: Tensor, tokens: Tensor, labels: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return student_loss(student, noise, tokens, labels, known, settings.regression)

    losses_compiled = compiled(losses, run.compile)

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(pairs["labels"]), (settings.batch,), generator=generator)
        known = starts[torch.randint(len(starts), (settings.batch,), generator=generator)]
        value, entropy, error = losses_compiled(
            pairs["noise"][index], pairs["tokens"][index].long(), pairs["labels"][index], known
        )
        return value, {"cross_entropy": entropy, "squared_error": error}

    fit("student", run, settings, student, loss, key)
