"""Tracing: a torch module and its `GraphSpec` in, an ONNX file out."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import rewriter
from onnxscript.function_libs.torch_lib.ops import core
from onnxscript.onnx_opset import opset18 as op
from torch import nn
from torch.onnx._internal.exporter import _fx_passes

from ddexport.graph.external import SharedWeights, save_graph
from ddexport.graph.spec import LARGEST, GraphSpec, sample_inputs
from ddexport.recipe import Recipe
from ddexport.runtime.errors import DDError

DEFAULT_OPSET = 20
OPSETS = range(18, 24)
FIRST_OPSETS = {"bf16": 22}  # the first whose Conv takes bfloat16


class ExportError(DDError):
    """A graph that cannot be traced as asked."""


def onnx_from_module(
    module: nn.Module,
    spec: GraphSpec,
    recipe: Recipe,
    path: Path,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
    weights: SharedWeights | None = None,
) -> list[Path]:
    """Traces `module` and writes it with `external.save_graph`; returns the files of the graph, itself first.

    The trace is made with batch 2; every dimension with a name in the spec is dynamic. opset: one that
    `check_opset` lets pass.
    """
    inputs = sample_inputs(spec, recipe, batch=2, seed=0)
    with torch.no_grad(), _quiet(), _one_trace():
        program = torch.onnx.export(
            module.eval(),
            tuple(torch.from_numpy(value) for value in inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            dynamic_shapes=_dynamic_shapes(module, spec),
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert program is not None
    strip_trace(program.model)
    program.model.metadata_props.update(metadata or {})
    return save_graph(program.model, path, weights)


def strip_trace(model: ir.Model) -> None:
    """Removes what the tracer notes about itself (stack traces with file paths, module names, doc strings):
    a graph says nothing about the machine it was made on. A second run changes nothing."""
    owners: list[ir.Node | ir.Value | ir.Graph] = [model.graph, *model.graph.inputs]
    owners += model.graph.initializers.values()
    for node in model.graph.all_nodes():
        owners += [node, *node.outputs]
    for owner in owners:
        owner.metadata_props.clear()
        owner.doc_string = None


def _dynamic_shapes(module: nn.Module, spec: GraphSpec) -> tuple[Any, ...]:
    """For each input the axes that have a name, by that name; those of a `*` parameter of `forward` together,
    as the tracer wants them."""
    names = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
    dimensions = {name: torch.export.Dim(name, min=1, max=LARGEST) for name in names}
    shapes = [
        {axis: dimensions[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    ]
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    plain = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:plain], tuple(shapes[plain:]))


def check_opset(opset: int | None, precisions: Iterable[str] = ()) -> None:
    """Raises `ExportError` if graphs of this opset cannot be made, or not in one of the precisions. None, the
    default of each precision, can."""
    if opset is None:
        return
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported", f"use {OPSETS.start} to {OPSETS.stop - 1}")
    for precision in precisions:
        first = FIRST_OPSETS.get(precision, opset)
        if opset < first:
            raise ExportError(f"opset {opset} has no convolution in {precision}", f"use {first} or later")


def default_opset(precision: str) -> int:
    """The opset of a graph where none is asked for."""
    return max(DEFAULT_OPSET, FIRST_OPSETS.get(precision, DEFAULT_OPSET))


def check_onnx(path: Path) -> None:
    """The ONNX checker, shape inference included, on a file with its external data beside it."""
    onnx.checker.check_model(str(path), full_check=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The tracer warns about things that concern its own internals; a user can do nothing about them."""
    loggers = {name: logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def _to(
    self: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None
) -> Any:
    return core.aten__to_copy(self, dtype)


def _conv_transpose2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> Any:
    return core.aten_convolution(input, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _adaptive_avg_pool2d(self: Any, output_size: Sequence[int]) -> Any:
    """The means of areas as two products with constant matrices, for rows and for columns."""
    rows, columns = (_means(int(old), int(new)) for old, new in zip(self.shape[2:], output_size, strict=True))
    return op.MatMul(
        op.Constant(value=ir.tensor(rows)), op.MatMul(self, op.Constant(value=ir.tensor(columns.T)))
    )


def _means(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that takes `old` numbers to the means of `new` areas, as PyTorch cuts them."""
    matrix = np.zeros((new, old), np.float32)
    for row in range(new):
        start, end = row * old // new, -(-(row + 1) * old // new)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


# Operators that the exporter does not know, or under another name alone.
TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    torch.ops.aten.to.dtype: _to,
    torch.ops.aten.conv_transpose2d.input: _conv_transpose2d,
}


@contextmanager
def _one_trace() -> Iterator[None]:
    """Leaves out two steps of the exporter that change no graph here and take more than half of its time.

    One traces the traced program again, to take apart operators that have no translation: it is done where
    there is one. One is a rule of the optimiser that makes a split of two slices that are halves, of which no
    graph has any, and compares all pairs of slices.
    """
    rules, decompose = rewriter._DEFAULT_REWRITE_RULES, _fx_passes.decompose_with_registry

    def where_needed(program: Any, registry: Any) -> Any:
        calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
        known = all(registry.is_registered(call) or "_assert" in str(call) for call in calls)
        if not known:
            return decompose(program, registry)
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype):
            given = any(user.op == "output" for user in node.users)
            if node.args[0].meta["val"].dtype == node.args[1] and not given:  # it would rename its constant
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
        return program

    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name != "SlicesSplit")
    _fx_passes.decompose_with_registry = where_needed
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES, _fx_passes.decompose_with_registry = rules, decompose
