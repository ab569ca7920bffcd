"""The one training loop all stages share: it can be killed at any time and goes on with the same batches.

The batch of iteration i is drawn by a generator seeded with (seed, stage, i), never by a running state. With
the weights, the optimiser and the averages saved every so often, a run that was killed and started again
takes the steps that were left. Where arrays lie in memory decides the last bit of some sums, so that two runs
agree to rounding, on one thread too (docs/log.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddexport.distill.settings import Loop
from ddexport.runtime.console import progress
from ddexport.runtime.files import atomic_write

SAVE_SECONDS = 60.0
LOG_EVERY = 25

Loss = Callable[[int, torch.Generator], "tuple[Tensor, dict[str, Tensor]]"]


@dataclass(frozen=True)
class Run:
    """Where a run keeps its files, and how it computes."""

    folder: Path
    seed: int
    compile: bool = True
    device: str = "cpu"

    def generator(self, stage: str, number: int = 0) -> torch.Generator:
        """The random numbers of one iteration (or chunk, or use) of one stage."""
        digest = hashlib.sha256(f"{self.seed}/{stage}/{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def log(self, stage: str, **values: Any) -> None:
        """Append one line of JSON to log.jsonl."""
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, **values}) + "\n")


def save_atomically(value: Any, path: Path) -> None:
    """torch.save: `path` holds the old content or the new, never half, after a power cut as well."""
    with atomic_write(path) as stream:
        torch.save(value, stream)
        stream.flush()
        os.fsync(stream.fileno())


def rate_at(loop: Loop, iteration: int) -> float:
    """Learning rate: linear warm-up, then half a cosine to zero."""
    if iteration < loop.warmup:
        return loop.rate * (iteration + 1) / loop.warmup
    done = (iteration - loop.warmup) / max(1, loop.iterations - loop.warmup)
    return loop.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def fit(
    stage: str,
    run: Run,
    loop: Loop,
    module: nn.Module,
    loss: Loss,
    key: str,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train the parameters of `module` that want gradients; on return it holds the averaged (or last)
    weights.

    `loss(i, generator)` computes one batch's loss, which reads `module`, and named figures for the log.
    `after_step(i)` runs after each step. `key` names everything the training depends on: a saved state with
    another key is ignored.
    """
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in weights.items()} if loop.ema else {}
    # vectors and tables (biases, gains, embeddings of one row a thing) are not decayed, products are
    matrices = [p for p in weights.values() if p.ndim >= 2 and min(p.shape[:2]) > 1]
    others = [p for p in weights.values() if not (p.ndim >= 2 and min(p.shape[:2]) > 1)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": loop.decay}, {"params": others, "weight_decay": 0.0}],
        lr=loop.rate,
        betas=(0.9, loop.beta2),
        foreach=True,
    )
    state_file = run.folder / f"{stage}.state.pt"
    first, spent = _resume(state_file, key, module, average, optimizer)
    module.train()
    start = saved = time.monotonic()
    with progress(loop.iterations, stage) as bar:
        bar.advance(first)
        for i in range(first, loop.iterations):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(loop, i)
            value, figures = loss(i, run.generator(stage, i))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            norm = nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
            optimizer.step()
            if after_step:
                after_step(i)
            if loop.ema:
                # early on the average forgets faster, or it would still hold the initial weights
                decay = min(loop.ema, (1 + i) / (10 + i))
                torch._foreach_lerp_(list(average.values()), list(weights.values()), 1 - decay)
            bar.advance()
            now = time.monotonic()
            if (i + 1) % LOG_EVERY == 0 or i + 1 == loop.iterations:
                figures = {"loss": value, "gradient": norm, **figures}
                numbers = {name: round(v.item(), 5) for name, v in figures.items()}
                run.log(stage, iteration=i + 1, seconds=round(spent + now - start, 1), **numbers)
            if now - saved > SAVE_SECONDS and i + 1 < loop.iterations:
                saved = now
                _save(state_file, key, i + 1, spent + now - start, module, average, optimizer)
    with torch.no_grad():
        for name, value in average.items():
            weights[name].copy_(value)
    module.eval()
    # what remains is the caller's result, written when this returns; the state is then removed by `finish`


def finish(stage: str, run: Run) -> None:
    """Remove the state of a loop whose result is safely written."""
    (run.folder / f"{stage}.state.pt").unlink(missing_ok=True)


def _save(
    path: Path,
    key: str,
    iteration: int,
    seconds: float,
    module: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    state = {
        "key": key,
        "iteration": iteration,
        "seconds": seconds,
        "module": module.state_dict(),
        "average": average,
        "optimizer": optimizer.state_dict(),
    }
    save_atomically(state, path)


def _resume(
    path: Path, key: str, module: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Restore a saved state; returns the iteration to go on with and the seconds already spent."""
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True, map_location="cpu")
    if state["key"] != key:
        return 0, 0.0
    module.load_state_dict(state["module"])
    for name, value in state["average"].items():
        average[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return state["iteration"], state["seconds"]
