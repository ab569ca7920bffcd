"""Half precision on an engine that does not round: an honest oracle for the error of fp16 and bf16 graphs.

ONNX Runtime's CPU provider computes half graphs in float32 and does not round between operators, and runs
few operators in bfloat16. `emulate_half` rewrites such a graph to float32 arithmetic that rounds where a half
engine must: at every operator's output. What it still does not show is an engine that adds up products in
half, and an engine that fuses operators and rounds less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

SOURCES = {"Cast", "Constant", "ConstantOfShape"}
"""Operators that make half numbers from other types: they keep their type, and are cast back."""

MOVES = {"Concat", "Expand", "Flatten", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Split",
         "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"}  # fmt: skip
"""Operators that only move numbers: what was rounded stays so."""

FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
ERRORS_ONLY = 3


def emulate_half(model: ir.Model) -> None:
    """Rewrites a half graph to one that computes in float32 and rounds to half after every operator.

    1. A half weight keeps its half value and is cast to float32 before its first use.
    2. An operator with a half output computes in float32; its output is cast to half and back, unless the
    operator only moves numbers.
    3. A cast to half is followed by one back to float32.
    4. Inputs, outputs and what was float32 stay as they are; the weights stay in their files.
    5. A second run changes nothing.
    """
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype in HALF_TYPES:
            _cast_back(graph, value, None)
    for node in list(graph):
        for value in node.outputs:
            if value.dtype not in HALF_TYPES:
                continue
            if node.op_type in SOURCES:
                _cast_back(graph, value, node)
                continue
            half, value.dtype = value.dtype, ir.DataType.FLOAT
            if node.op_type not in MOVES:
                down = _cast(value, half)
                value.replace_all_uses_with(down.outputs[0])
                down.replace_input_with(0, value)
                graph.insert_after(node, down)
                _cast_back(graph, down.outputs[0], down)


class EmulatedGraph:
    """A half graph of a file, run by ONNX Runtime on the CPU with every rounding of a half engine."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Reads and rewrites the graph."""
        model = ir.load(path)
        emulate_half(model)
        self._session = session_of(model, path.parent, threads)
        self._names: Sequence[str] = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named arrays in, named arrays out, as the graph has them."""
        return dict(zip(self._names, self._session.run(None, dict(feeds)), strict=True))


def session_of(model: ir.Model, folder: Path, threads: int | None = None) -> Any:
    """The model in ONNX Runtime on the CPU; the engine reads weights beside it from `folder` itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.enable_mem_pattern = options.enable_cpu_mem_arena = False  # else it holds all values twice
    options.add_session_config_entry(FOLDER_OPTION, str(folder.resolve()))
    if threads is not None:
        options.intra_op_num_threads = threads
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": to.value})
    node.outputs[0].dtype, node.outputs[0].shape = to, value.shape
    return node


def _cast_back(graph: ir.Graph, value: ir.Value, after: ir.Node | None) -> None:
    """Puts a cast to float32 between a half value and its users, unless there is one already."""
    if all(user.op_type == "Cast" for user, _ in value.uses()):
        return
    up = _cast(value, ir.DataType.FLOAT)
    value.replace_all_uses_with(up.outputs[0])
    up.replace_input_with(0, value)
    if after is None:
        graph.insert_before(graph[0], up)
    else:
        graph.insert_after(after, up)
