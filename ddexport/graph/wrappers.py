"""Modules that exist for their graphs: a part in the form that its graph has, where its own is another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddexport.families._base import Student, Teacher
from ddexport.families._explicit_cache import ExplicitCache
from ddexport.families._llamagen_blocks import SwiGlu
from ddexport.families._llamagen_text import TextCache
from ddexport.graph.spec import GraphSpec
from ddexport.precision.cast import in_precision, shared_copy
from ddexport.runtime.bundle import PREFIXES


class TeacherGraph(nn.Module):
    """One pass of an auto-regressive model with guidance inside and its cache outside: `teacher.onnx`.

    The weights are shared with the teacher and the tokenizer that it was trained with.
    """

    def __init__(self, teacher: Teacher, tokenizer: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.reader = teacher.reader(tokenizer)

    def forward(
        self,
        tokens: Tensor,
        label: Tensor,
        positions: Tensor,
        guidance: Tensor,
        filled: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, ...]:
        """The distributions of n consecutive positions, given the tokens before them.

        Args:
            tokens: [B, L] int64; those of the positions not yet drawn are not read, but must be valid.
            label: [B] int64.
            positions: [n] int64, behind the `filled` ones.
            guidance: [B] float32, the scale g of logits c + g (c - u).
            filled: [1] int64, how many positions of the cache are valid.
            cache: key_0, value_0, key_1, ...: [2, B, heads, capacity, D] float32 each, finite everywhere.

        Returns:
            logits [B, n, V] float32, then new_key_0, new_value_0, ...: [2, B, heads, n, D] float32 each.
        """
        past = [ExplicitCache(k, v, filled) for k, v in zip(cache[::2], cache[1::2], strict=True)]
        [pair] = self.teacher.pair(label)
        return self._pass(tokens, pair, positions, guidance, past)

    def _pass(
        self, tokens: Tensor, pair: Tensor, positions: Tensor, guidance: Tensor, past: Sequence[ExplicitCache]
    ) -> tuple[Tensor, ...]:
        inputs = self.reader(tokens, positions)
        logits = self.teacher.extend(torch.cat([inputs, inputs]), pair, positions, past)
        conditional, unconditional = logits.unflatten(0, (2, -1)).unbind()
        mixed = conditional + guidance[:, None, None] * (conditional - unconditional)
        return (mixed, *(rows for layer in past for rows in layer.new or ()))


class TextTeacherGraph(TeacherGraph):
    """The same behind a text."""

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        values: Tensor,
        log_count: Tensor,
        condition: Tensor,
        positions: Tensor,
        guidance: Tensor,
        filled: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, ...]:
        """values [B, 2, layers, heads, D], log_count [B], condition [B, 2, C]: what `TextPrefix` gives."""
        beside = values.transpose(0, 1).flatten(0, 1).unbind(1)  # [2B, heads, D] of each layer
        past = [
            TextCache(k, v, filled, positions, value, log_count)
            for k, v, value in zip(cache[::2], cache[1::2], beside, strict=True)
        ]
        pair = condition.transpose(0, 1).flatten(0, 1)
        return self._pass(tokens, pair, positions, guidance, past)


class TextPrefix(nn.Module):
    """What a student or a teacher sees of a text: `text_prefix.onnx`, `teacher_prefix.onnx`."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """features [B, T, W] left-padded, mask [B, T] -> values, log_count, condition, [B, ...] each."""
        prefix: tuple[Tensor, Tensor, Tensor] = self.part.prefix(features, mask)
        return prefix


class TextStudentGraph(nn.Module):
    """A student behind what `TextPrefix` gives of the text: the `student.onnx` of a text model."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student = student

    def forward(
        self, tokens: Tensor, values: Tensor, log_count: Tensor, condition: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, L, Cv], known [B] -> sequence [B, L, Cv], tokens [B, S], logits [B, S, V]."""
        outputs: tuple[Tensor, Tensor, Tensor] = self.student.behind(
            tokens, values, log_count, condition, known
        )
        return outputs


def graph_part(
    part: nn.Module,
    precision: str,
    keep_fp32: Sequence[str] = (),
    role: str = "module",
    group_norm: str = "reduce",
) -> nn.Module:
    """A copy of a part in the form that graphs of a precision are traced from; it shares what it can.

    It computes what `part` computes, stated so that engines are faster at it (docs/export.md), and in half
    where the policy says so (docs/export.md).

    Args:
        part: a student, tokenizer or teacher, float32, as it was loaded.
        precision, keep_fp32, role: as those of `precision.cast.in_precision`, where `role` is `part`.
        group_norm: that of the recipe.

    Raises:
        PrecisionError: a weight is not finite in that precision.
    """
    form: Any = shared_copy(part)
    if isinstance(form, (Student, Teacher)):
        form.tabulate()
    if isinstance(form, Student):
        form.attend_in_groups()
    for module in form.modules():
        if isinstance(module, SwiGlu):
            module.separate()
    if hasattr(form, "decoder"):
        if group_norm == "reduce":
            form.decoder.norm_by_channel()
        if precision != "bf16":  # TensorRT-RTX 1.7 has no transposed convolution in bfloat16
            form.decoder.fold_upsampling()
    return in_precision(form, precision, keep_fp32, role)


def graph_module(spec: GraphSpec, part: nn.Module, tokenizer: nn.Module) -> nn.Module:
    """The module that a graph is traced from or compared with; it shares the weights of `part`."""
    if spec.role in PREFIXES.values():
        return TextPrefix(part).eval()
    of_text = any(tensor.name == "values" for tensor in spec.inputs)
    if isinstance(part, Teacher):
        return (TextTeacherGraph if of_text else TeacherGraph)(part, tokenizer).eval()
    if isinstance(part, Student) and spec.split is not None:
        part = part.at_split(spec.split)
    return TextStudentGraph(part).eval() if of_text else part
