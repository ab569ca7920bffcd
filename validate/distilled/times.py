"""How long an image takes by each method: PyTorch on the CPU, the modules as they are, without an export."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from ddexport.distill.data import Part
from ddexport.distill.teacher import at_random, log_probabilities
from ddexport.distill.trainers import trainer
from ddexport.validate.distilled.draws import Inputs, Method, Models, student_sequences

ROUNDS = {1: 21, 64: 5}  # by batch size: a short run is more easily disturbed


def time_methods(models: Models, part: Part, rows: Sequence[Method]) -> dict[str, dict[str, float]]:
    """Milliseconds an image by each method's name: `ms_B` in batches of B, of which `network_ms_B` without
    the decoder.

    Every round runs all methods, so that a busy machine slows all of them alike; medians over the rounds.
    """
    times: dict[str, dict[str, float]] = {method.name: {} for method in rows if method.timed}
    for batch, rounds in ROUNDS.items():
        inputs = Inputs.of(models, part, 0, batch)
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in times}
        for number in range(rounds + 1):
            for method in (method for method in rows if method.timed):
                with torch.inference_mode():
                    start = time.perf_counter()
                    sequences = timed_sequences(models, method, inputs)
                    middle = time.perf_counter()
                    models.tokenizer(sequences)
                if number:  # the first round warms up
                    spent[method.name].append((time.perf_counter() - start, middle - start))
        for name, seconds in spent.items():
            image, network = (median(of_rounds) * 1000 / batch for of_rounds in zip(*seconds, strict=True))
            times[name] |= {f"ms_{batch}": image, f"network_ms_{batch}": network}
    return times


def timed_sequences(models: Models, method: Method, inputs: Inputs) -> Tensor:
    """Sequences (N, L, Cv), at the cost that the method has in use.

    Of set prediction that is one pass of a network of the teacher's size over all positions, without
    guidance, and one draw of every position. The pass reads zeros for the tokens, so its images mean nothing.
    """
    labels, sample = inputs.labels, at_random(inputs.generator)
    if method.plan is not None:
        return student_sequences(models, method.plan, inputs)
    if method.kind == "teacher":
        tokens = models.teacher_tokens(inputs.condition, sample)
    else:
        teacher, length = models.teacher, models.recipe.sequence.length
        zeros = labels.new_zeros(len(labels), length)
        logits = teacher(trainer(teacher.family).teacher_inputs(models.tokenizer, zeros), *inputs.condition)
        tokens = sample(log_probabilities(logits, models.pairs.top_k), slice(0, length))
    embedded: Tensor = models.tokenizer.embed(tokens)
    return embedded
