"""Casts a module by the policy: a copy that computes its regions in half, and shares every float32 tensor.

The borders of a region are hooks, so that the model code names no type and a float32 module has none.

Why not the library: NVIDIA's AutoCast needs 14 GB, and onnxconverter-common casts to fp16 alone, by the
operator's name. Both cast graphs; PyTorch in half, which `ddexport bench` times and the emulation is tested
with, needs a cast of modules anyway.
"""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddexport.precision.policy import BORROWED, FLOAT32, ISLANDS, REGIONS, lies_in, matches
from ddexport.runtime.errors import DDError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PrecisionError(DDError):
    """A precision that the weights do not fit, or a request for float32 that no module answers to."""


def in_precision(
    module: nn.Module, precision: str, keep_fp32: Iterable[str] = (), part: str = "module"
) -> nn.Module:
    """A copy of `module` that computes in `precision`, with the same inputs and outputs.

    Args:
        module: a student, tokenizer or teacher, float32. It is not changed; its float32 tensors are shared.
        precision: "fp32" (`module` itself is returned), "fp16" or "bf16".
        keep_fp32: patterns of module paths that stay float32, with everything in them.
        part: its name, for an error.

    Raises:
        PrecisionError: a weight is not finite in that precision.
    """
    if precision == FLOAT32:
        return module
    dtype, keep = DTYPES[precision], tuple(keep_fp32)
    result = shared_copy(module)
    for path, name, owner, tensor in _half_tensors(result, keep):
        half = tensor.to(dtype)
        if not half.isfinite().equal(tensor.isfinite()):
            raise _overflow(f"{path}.{name}".lstrip("."), path, tensor, precision, part)
        if name in owner._parameters:
            owner._parameters[name] = nn.Parameter(half, requires_grad=False)
        else:
            owner._buffers[name] = half
    for path, region in regions(result, keep):
        _set_border(region, dtype, torch.float32)
        for inner, island in region.named_modules():
            if inner and matches(f"{path}.{inner}", keep) and _holds_weights(island):
                _set_border(island, torch.float32, dtype)
    return result


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy whose structure can be changed, with the same tensors."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def regions(module: nn.Module, keep_fp32: Iterable[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of what computes in half."""
    keep = tuple(keep_fp32)
    for path, candidate in module.named_modules():
        if matches(path, REGIONS) and not lies_in(path, keep) and _holds_weights(candidate):
            yield path, candidate


def check_patterns(modules: Iterable[nn.Module], keep_fp32: Iterable[str]) -> None:
    """Raises `PrecisionError` for a pattern that keeps nothing in float32 that would be half."""
    names: dict[str, None] = {}
    for module in modules:
        for path, region in regions(module):
            inside = (f"{path}.{inner}" for inner, m in region.named_modules() if inner and _holds_weights(m))
            for name in (path, *inside):
                parts = name.split(".")
                names.update(dict.fromkeys(".".join(parts[:n]) for n in range(1, len(parts) + 1)))
    for pattern in keep_fp32:
        if not any(matches(name, [pattern]) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
            guess = f"did you mean {', '.join(near)}? " if near else ""
            example = next((name for name in names if "." in name), "blocks.0")
            raise PrecisionError(
                f"--keep-fp32 {pattern} matches no module that would be half",
                f"{guess}give module paths such as {example}; * matches any part",
            )


def _half_tensors(module: nn.Module, keep: tuple[str, ...]) -> list[tuple[str, str, nn.Module, Tensor]]:
    """Path of the owner, name, owner and tensor of all that becomes half."""
    inside = [path for path, _ in regions(module, keep)]
    tensors = []
    for path, owner in module.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            full = f"{path}.{name}".lstrip(".")
            half = matches(full, BORROWED) if not lies_in(path, inside) else not matches(full, ISLANDS)
            if tensor is not None and tensor.is_floating_point() and half and not lies_in(path, keep):
                tensors.append((path, name, owner, tensor))
    return tensors


def _holds_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _set_border(module: nn.Module, inside: torch.dtype, outside: torch.dtype) -> None:
    """The first argument is cast to `inside`, the output to `outside`."""

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0].to(inside), *arguments[1:])

    def leave(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(outside)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _overflow(name: str, path: str, tensor: Tensor, precision: str, part: str) -> PrecisionError:
    largest = float(tensor[tensor.isfinite()].abs().max())
    limit = torch.finfo(DTYPES[precision]).max
    advice = f"keep it in float32 with --keep-fp32 '{path}'" if path else "leave this precision out"
    other = ", or take --precision bf16" if precision == "fp16" else ""
    return PrecisionError(
        f"{part}: {name} holds {largest:.6g}, past the largest number of {precision}, {limit:.6g}",
        f"{advice}{other}",
    )
