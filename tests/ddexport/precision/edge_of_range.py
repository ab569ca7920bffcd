"""Models at the edge of the half range that draw the same images as before.

    python tests/ddexport/precision/edge_of_range.py

Norms do not see the scale of what they are given. So the residual stream can be multiplied by any factor, if
everything that is added to it is, and nothing changes but the range: numbers that float32 does not mind
overflow in a module that is half throughout. Weights at the edge are found the same way: queries and keys
are brought to unit length, and a gate can take back what a matrix was multiplied with.

One label, no known positions: the class position's share of the stream is set for that label.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddexport.export import WeightRequest, load_parts
from ddexport.precision.cast import in_precision
from ddexport.recipe import Recipe, load_recipe

GOLDEN = Path(__file__).parents[2] / "golden"
LABEL = 3
EDGE = 0.95 * 65504
SETS = {"var": "vae.pth", "llamagen": "vq.pth"}
ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default,
            ATEN.convolution.default}  # fmt: skip


class HalfArithmetic(TorchDispatchMode):
    """Half products add up in float32 and round once, as GPUs do it; a CPU is slow or different at them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        halves = (torch.float16, torch.bfloat16)
        half = next((a.dtype for a in args if isinstance(a, Tensor) and a.dtype in halves), None)
        if func in PRODUCTS and half is not None:
            wide = [a.float() if isinstance(a, Tensor) and a.dtype == half else a for a in args]
            return func(*wide, **(kwargs or {})).to(half)
        return func(*args, **(kwargs or {}))


def golden_parts(family: str) -> tuple[Recipe, dict[str, nn.Module]]:
    """The golden checkpoint of a family, tabulated as for an export."""
    folder = GOLDEN / f"{family}-dd-small"
    recipe = load_recipe(str(folder / "recipe.yaml"))
    files = {"student": folder / "student.pth", "tokenizer": folder / SETS[family]}
    parts = load_parts(recipe, WeightRequest(files))
    parts["student"].tabulate()  # type: ignore[operator]
    return recipe, parts


def inputs(recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    size = recipe.sequence
    noise = torch.randn(2, size.length, size.width, generator=torch.Generator().manual_seed(0))
    return noise, torch.full((2,), LABEL), torch.zeros(2, dtype=torch.int64)


@contextmanager
def largest(module: nn.Module) -> Iterator[dict[str, float]]:
    """The largest number of every sub-module's output, while the module runs."""
    found: dict[str, float] = {}
    handles = []
    for name, part in module.named_modules():

        def note(_: nn.Module, __: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor):
                found[name] = float(output.abs().max())

        handles.append(part.register_forward_hook(note))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def stretched_var_student(student: nn.Module, recipe: Recipe, stream: float = 1e4) -> nn.Module:
    """The stream times `stream`; queries, keys and the branches' outputs at the edge of half."""
    student = copy.deepcopy(student)
    with largest(student) as before:
        student(*inputs(recipe))
    class_row = student.conditioning.embedding.weight[LABEL]
    student.start.copy_(stream * (class_row + student.start) - class_row)
    for tensor in (student.token_embedding.weight, student.token_embedding.bias, student.positions,
                   student.level_embedding.weight, *student.noise_or_data.rows):  # fmt: skip
        tensor.mul_(stream)
    C = recipe.model["width"]
    for i, block in enumerate(student.blocks):
        table = student.conditioning.blocks[i].weight  # [classes, 6C]: the gates are first
        queries_and_keys = block.attention.qkv.weight[: 2 * C]
        # No output is larger than a row's sum of sizes times the largest input, which a norm keeps below 10.
        factor = EDGE / float(10 * queries_and_keys.abs().sum(1).max())
        queries_and_keys.mul_(factor)
        block.attention.q_bias.mul_(factor)
        for branch, last, gate in (("attention", block.attention.proj, slice(0, C)),
                                   ("mlp", block.mlp.fc2, slice(C, 2 * C))):  # fmt: skip
            factor = EDGE / before[f"blocks.{i}.{branch}"]
            last.weight.mul_(factor)
            last.bias.mul_(factor)
            table[:, gate].mul_(stream / factor)
    return student


@torch.no_grad()
def stretched_llamagen_student(student: nn.Module, recipe: Recipe) -> nn.Module:
    """All that is added to the stream times one factor, the largest branch at the edge of half."""
    student = copy.deepcopy(student)
    with largest(student) as before:
        student(*inputs(recipe))
    branches = [v for k, v in before.items() if k.endswith((".attention", ".mlp"))]
    factor = EDGE / max(branches)
    class_row = student.class_embedding.weight[LABEL]
    noise, data = student.noise_or_data_embedding.weight
    data.copy_(factor * (class_row + data) - class_row)
    for tensor in (noise, student.token_embedding.weight, student.token_embedding.bias):
        tensor.mul_(factor)
    for block in student.blocks:
        block.attention.proj.weight.mul_(factor)
        block.mlp.output.weight.mul_(factor)
    return student


@torch.no_grad()
def stretched_tokenizer(tokenizer: nn.Module, sequence: Tensor) -> nn.Module:
    """The decoder's stream times one factor: its largest convolution is at the edge of half."""
    tokenizer = copy.deepcopy(tokenizer)
    with largest(tokenizer) as before:
        tokenizer(sequence)
    adds = (".shortcut", ".resample.conv", ".conv2", ".proj")  # what puts the stream into half
    factor = 1.04 * EDGE / max(v for k, v in before.items() if k.endswith(adds))
    for name, part in tokenizer.decoder.named_modules():
        if not isinstance(part, nn.Conv2d):
            continue
        if name == "conv_in" or name.endswith(("conv2", "proj")):
            part.weight.mul_(factor)
        if name == "conv_in" or name.endswith(("conv2", "proj", "shortcut", "resample.conv")):
            part.bias.mul_(factor)
    return tokenizer


STUDENTS: dict[str, Callable[[nn.Module, Recipe], nn.Module]] = {
    "var": stretched_var_student,
    "llamagen": stretched_llamagen_student,
}


@dataclass(frozen=True)
class Result:
    """A stretched module in one precision: the largest number of a block, and what came out."""

    stream: float
    all_half_infinite: int
    all_half_error: float  # relative rms, to the module that was not stretched
    policy_infinite: int
    policy_error: float


@torch.no_grad()
def all_half(module: nn.Module, dtype: torch.dtype, feeds: tuple[Tensor, ...]) -> Tensor:
    """Everything in half, inputs too: what a blind cast of the whole module gives."""
    half = copy.deepcopy(module).to(dtype)
    with HalfArithmetic():
        out = half(*(feed.to(dtype) if feed.is_floating_point() else feed for feed in feeds))
    return (out[0] if isinstance(out, tuple) else out).float()


@torch.no_grad()
def run(stretched: nn.Module, wanted: Tensor, feeds: tuple[Tensor, ...], precision: str) -> Result:
    first = lambda out: (out[0] if isinstance(out, tuple) else out).float()  # noqa: E731
    with largest(stretched) as sizes:
        stretched(*feeds)
    with HalfArithmetic():
        got = first(in_precision(stretched, precision)(*feeds))
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    blind = all_half(stretched, dtype, feeds)
    blocks = [v for k, v in sizes.items() if k.startswith(("blocks.", "decoder."))]
    return Result(
        max(blocks),
        int((~blind.isfinite()).sum()),
        _relative(blind, wanted),
        int((~got.isfinite()).sum()),
        _relative(got, wanted),
    )


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@torch.no_grad()
def experiment(family: str, part: str, precision: str) -> tuple[Result, Result]:
    """A golden module as it is, and the same at the edge of the half range."""
    recipe, parts = golden_parts(family)
    feeds: tuple[Tensor, ...] = inputs(recipe)
    module = parts["student"]
    if part == "student":
        stretched = STUDENTS[family](module, recipe)
    else:
        feeds = (module(*feeds)[0],)
        module = parts["tokenizer"]
        stretched = stretched_tokenizer(module, feeds[0])
    out = module(*feeds)
    wanted = (out[0] if isinstance(out, tuple) else out).float()
    return run(module, wanted, feeds, precision), run(stretched, wanted, feeds, precision)


if __name__ == "__main__":
    for family in SETS:
        for part in ("student", "decoder"):
            for precision in ("fp16", "bf16"):
                for name, one in zip(
                    ("as it is", "stretched"), experiment(family, part, precision), strict=True
                ):
                    print(f"{family:9}{part:8}{precision}  {name:10}{one}")  # noqa: T201
