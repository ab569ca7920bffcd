"""At the edge of the half range a module that is half throughout fails, and the policy does not.

Norms do not see the scale of what they are given. So the residual stream can be multiplied by any factor, if
everything that is added to it is, and nothing changes but the range: numbers that float32 does not mind
overflow in a module that is half throughout. Weights at the edge are found the same way: queries and keys
are brought to unit length, and a gate can take back what a matrix was multiplied with.

One label, no known positions: the class position's share of the stream is set for that label.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddexport.precision.cast import DTYPES, in_precision
from ddexport.recipe import Recipe
from tests.goldens import BOTH, VAR, Golden

LABEL = 3
EDGE = 0.95 * 65504
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


def first(module: nn.Module, feeds: tuple[Tensor, ...]) -> Tensor:
    out = module(*feeds)
    return (out[0] if isinstance(out, tuple) else out).float()


def largest(module: nn.Module, feeds: tuple[Tensor, ...]) -> dict[str, float]:
    """The largest number of every sub-module's output."""
    found: dict[str, float] = {}
    handles = []
    for name, part in module.named_modules():

        def note(_: nn.Module, __: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor):
                found[name] = float(output.abs().max())

        handles.append(part.register_forward_hook(note))
    module(*feeds)
    for handle in handles:
        handle.remove()
    return found


def stretch_var(student: Any, recipe: Recipe, sizes: dict[str, float], stream: float = 1e4) -> None:
    """The stream times `stream`; queries, keys and the branches' outputs at the edge of half."""
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
            factor = EDGE / sizes[f"blocks.{i}.{branch}"]
            last.weight.mul_(factor)
            last.bias.mul_(factor)
            table[:, gate].mul_(stream / factor)


def stretch_llamagen(student: Any, recipe: Recipe, sizes: dict[str, float]) -> None:
    """All that is added to the stream times one factor, the largest branch at the edge of half."""
    factor = EDGE / max(v for k, v in sizes.items() if k.endswith((".attention", ".mlp")))
    class_row = student.condition_embedding.weight[LABEL]
    noise, data = student.noise_or_data_embedding.weight
    data.copy_(factor * (class_row + data) - class_row)
    for tensor in (noise, student.token_embedding.weight, student.token_embedding.bias):
        tensor.mul_(factor)
    for block in student.blocks:
        block.attention.proj.weight.mul_(factor)
        block.mlp.output.weight.mul_(factor)


def stretch_tokenizer(tokenizer: Any, recipe: Recipe, sizes: dict[str, float]) -> None:
    """The decoder's stream times one factor: its largest convolution is at the edge of half."""
    adds = (".shortcut", ".resample.conv", ".conv2", ".proj")  # what puts the stream into half
    factor = 1.04 * EDGE / max(v for k, v in sizes.items() if k.endswith(adds))
    for name, part in tokenizer.decoder.named_modules():
        if isinstance(part, nn.Conv2d) and (name == "conv_in" or name.endswith(("conv2", "proj"))):
            part.weight.mul_(factor)
            part.bias.mul_(factor)
        elif isinstance(part, nn.Conv2d) and name.endswith(("shortcut", "resample.conv")):
            part.bias.mul_(factor)


@pytest.mark.parametrize("part", ["student", "tokenizer"])
@BOTH
@torch.no_grad()
def test_stretched_models(family: Golden, part: str) -> None:
    """The stretched model computes the same: all in half it overflows, the policy is as good as ever. bf16
    has float32's range: nothing overflows, and the islands still make it better."""
    recipe, student = family.recipe(), family.student()
    student.tabulate()
    size = recipe.sequence
    noise = torch.randn(2, size.length, size.width, generator=torch.Generator().manual_seed(0))
    feeds: tuple[Tensor, ...] = (noise, torch.full((2,), LABEL), torch.zeros(2, dtype=torch.int64))
    plain, stretch = student, stretch_var if family is VAR else stretch_llamagen
    if part == "tokenizer":
        feeds = (first(student, feeds),)
        plain, stretch = family.tokenizer, stretch_tokenizer
    stretched = copy.deepcopy(plain)
    stretch(stretched, recipe, largest(plain, feeds))
    wanted = first(plain, feeds)
    stream = [max(v for k, v in largest(module, feeds).items() if k.startswith(("blocks.", "decoder.")))
              for module in (plain, stretched)]  # fmt: skip
    assert stream[0] < 100 and stream[1] > 65504

    def errors(module: nn.Module, precision: str) -> tuple[float, float]:
        """Relative rms errors: all in half, inputs too, as a blind cast gives it; and of the policy."""
        dtype = DTYPES[precision]
        half = [feed.to(dtype) if feed.is_floating_point() else feed for feed in feeds]
        with HalfArithmetic():
            outputs = (
                first(copy.deepcopy(module).to(dtype), tuple(half)),
                first(in_precision(module, precision), feeds),
            )
        assert outputs[1].isfinite().all()
        blind, policy = (
            float((o - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()) for o in outputs
        )
        return blind, policy

    (blind, policy), (blind_edge, policy_edge) = errors(plain, "fp16"), errors(stretched, "fp16")
    assert blind < 0.01
    assert not blind_edge < 1  # nan where it overflowed, or nothing to do with the result
    assert policy_edge < 2 * policy < 0.01
    (_, policy), (blind_edge, policy_edge) = errors(plain, "bf16"), errors(stretched, "bf16")
    assert policy_edge < blind_edge < float("inf")
    assert policy_edge < 2 * policy < 0.1
