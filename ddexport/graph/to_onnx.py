"""Tracing: a torch module and its `GraphSpec` in, an ONNX file out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import nn

from ddexport.graph.passes import strip_trace
from ddexport.graph.spec import GraphSpec, sample_inputs
from ddexport.recipe import Recipe
from runtime.errors import DDError

DEFAULT_OPSET = 20
OPSETS = range(18, 24)
FIRST_OPSETS = {"bf16": 22}  # the first whose Conv takes bfloat16
EXTERNAL_DATA_FROM = 1 << 30  # bytes; one protobuf message holds at most 2 GiB
LARGEST_BATCH = 1 << 16


class ExportError(DDError):
    """A graph that cannot be traced as asked."""


def onnx_from_module(
    module: nn.Module,
    spec: GraphSpec,
    recipe: Recipe,
    path: Path,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Traces `module` and writes it to `path`, with its weights in `path` + ".data" where they pass 1 GiB.

    The trace is made with batch 2 and a dynamic batch. Returns the files written, the graph first.

    Raises:
        ExportError: the opset is not supported.
    """
    check_opset(opset)
    inputs = sample_inputs(spec, recipe, batch=2, seed=0)
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(torch.from_numpy(value) for value in inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    strip_trace(program.model)
    program.model.metadata_props.update(metadata or {})
    size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    external = size > EXTERNAL_DATA_FROM
    program.save(str(path), external_data=external)
    return [path, path.with_name(path.name + ".data")] if external else [path]


def check_opset(opset: int, precisions: Iterable[str] = ()) -> None:
    """Raises `ExportError` if graphs of this opset cannot be made, or not in one of the precisions."""
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
