"""Where error enters: every block of the student and every stage of the decoder, float32 against half, on the
same inputs (`ddexport debug layers`)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddexport.precision.cast import DTYPES, in_precision
from ddexport.runtime.noise import gaussian_noise

STAGES = (
    r"blocks\.\d+|logits_head|embedding_head",
    r"post_quant_conv",
    r"decoder\.conv_in",
    r"decoder\.mid\.\d+",
    r"decoder\.levels\.\d+\.(blocks|attentions)\.\d+",
    r"decoder\.levels\.\d+\.resample",
    r"decoder\.conv_out",
)
"""The modules whose outputs are compared."""

ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default,
            ATEN.convolution.default}  # fmt: skip
HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layer:
    """One stage: its output in half against float32.

    rms, largest: of the difference. relative: rms of the difference over rms of the output. own: relative
    error of the stage alone, given float32's input. range_share: the largest number it made in half, over the
    largest that half can hold. infinite: numbers that are not finite.
    """

    part: str
    layer: str
    rms: float
    largest: float
    relative: float
    own: float
    range_share: float
    infinite: int


@dataclass
class _Sums:
    """Running sums of one stage over the images."""

    error: float = 0.0
    norm: float = 0.0
    own: float = 0.0
    count: int = 0
    largest: float = 0.0
    half: float = 0.0
    infinite: int = 0

    def add(self, wanted: Tensor, got: Tensor, own: Tensor) -> None:
        finite = got.isfinite()
        difference = torch.where(finite, got.double() - wanted, 0.0)
        self.infinite += int((~finite).sum())
        self.error += float(difference.square().sum())
        self.norm += float(wanted.double().square().sum())
        self.own += float(torch.where(own.isfinite(), own.double() - wanted, 0.0).square().sum())
        self.count += wanted.numel()
        self.largest = max(self.largest, float(difference.abs().max()))

    def layer(self, part: str, name: str, limit: float) -> Layer:
        norm = math.sqrt(max(self.norm, 1e-300))
        relative, own = math.sqrt(self.error) / norm, math.sqrt(self.own) / norm
        rms = math.sqrt(self.error / self.count)
        return Layer(part, name, rms, self.largest, relative, own, self.half / limit, self.infinite)


@dataclass
class HalfArithmetic(TorchDispatchMode):
    """Half products add up in float32 and round once, as GPUs do it; a CPU is slow or different at them.

    Also notes the largest half number that each stage makes.
    """

    stage: str = ""
    largest: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        half = next((a.dtype for a in args if isinstance(a, Tensor) and a.dtype in HALF_TYPES), None)
        if func in PRODUCTS and half is not None:
            wide = [a.float() if isinstance(a, Tensor) and a.dtype == half else a for a in args]
            out = func(*wide, **kwargs).to(half)
        else:
            out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.dtype in HALF_TYPES and out.numel() and self.stage:
            finite = out[out.isfinite()] if func not in PRODUCTS else out.nan_to_num()
            value = float(finite.abs().max()) if finite.numel() else 0.0
            self.largest[self.stage] = max(self.largest.get(self.stage, 0.0), value)
        return out


def compare_layers(
    parts: Mapping[str, nn.Module],
    precision: str,
    keep_fp32: Sequence[str],
    labels: np.ndarray,
    noise: np.ndarray,
) -> Iterator[Layer]:
    """The stages of student and decoder in the order of computation.

    Args:
        parts: student and tokenizer, float32, connected.
        precision: "fp16" or "bf16".
        keep_fp32: as in the export.
        labels: [N] int64.
        noise: [N, L, Cv] float32. The decoder is given the sequences that the float32 student makes of it.

    Raises:
        PrecisionError: a weight does not fit the precision.
    """
    student, tokenizer = parts["student"], parts["tokenizer"]
    inputs = []
    for label, row in zip(labels, noise, strict=True):
        inputs.append((torch.from_numpy(row[None]), torch.tensor([label]), torch.zeros(1, dtype=torch.int64)))
    with torch.no_grad():
        sequences = [(student(*row)[0],) for row in inputs]
    for name, module, rows in (("student", student, inputs), ("decoder", tokenizer, sequences)):
        half = in_precision(module, precision, keep_fp32, name)
        sums = _compare(module, half, rows)
        limit = torch.finfo(DTYPES[precision]).max
        yield from (total.layer(name, stage, limit) for stage, total in sums.items())


def inputs_of(classes: int, length: int, width: int, images: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Labels spread over the classes, and the seed's noise, as `compare_layers` takes them."""
    labels = np.arange(images, dtype=np.int64) * classes // images
    return {"labels": labels, "noise": gaussian_noise(seed, range(images), length, width)}


@torch.no_grad()
def _compare(module: nn.Module, half: nn.Module, rows: Sequence[tuple[Tensor, ...]]) -> dict[str, _Sums]:
    sums: dict[str, _Sums] = {}
    arithmetic = HalfArithmetic()
    stages = dict(half.named_modules())
    for row in rows:
        with _recorded(module) as wanted:
            module(*row)
        with _recorded(half, arithmetic) as got, arithmetic:
            half(*row)
        for name, (arguments, output) in wanted.items():
            with arithmetic:
                own = stages[name](*arguments).float()
            sums.setdefault(name, _Sums()).add(output, got[name][1].float(), own)
    for name, total in sums.items():
        total.half = arithmetic.largest.get(name, 0.0)
    return sums


@contextmanager
def _recorded(
    module: nn.Module, arithmetic: HalfArithmetic | None = None
) -> Iterator[dict[str, tuple[tuple[Any, ...], Tensor]]]:
    """Arguments and output of each stage, filled while the module runs; tells `arithmetic` the stage."""
    records: dict[str, tuple[tuple[Any, ...], Tensor]] = {}
    handles = []
    for name, stage in module.named_modules():
        if not any(re.fullmatch(pattern, name) for pattern in STAGES) or not _computes(stage):
            continue

        def enter(_: nn.Module, __: Any, name: str = name) -> None:
            if arithmetic is not None:
                arithmetic.stage = name

        def leave(_: nn.Module, arguments: tuple[Any, ...], output: Tensor, name: str = name) -> None:
            records[name] = (arguments, output)
            if arithmetic is not None:
                arithmetic.stage = ""

        # Before the casts at the border of a region, and after them.
        handles.append(stage.register_forward_pre_hook(enter, prepend=True))
        handles.append(stage.register_forward_hook(leave))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _computes(stage: nn.Module) -> bool:
    return next(stage.parameters(), None) is not None
