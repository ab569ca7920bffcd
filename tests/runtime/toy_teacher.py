"""A toy teacher with the real contract, and a bundle that holds it: a sum over all positions before, as a
graph with a cache and as a few lines of NumPy without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ddexport.runtime.manifest import (
    FILE_NAME,
    FileInfo,
    Graph,
    ImageSize,
    Schedule,
    SequenceSize,
    Span,
    Teacher,
    contract,
    file_info,
    read_manifest,
)
from onnx import TensorProto, helper, numpy_helper

STARTS = (0, 1, 2, 4, 6)
LENGTH, WIDTH, CODES, CLASSES, HIDDEN = 6, 4, 5, 3, 2
SEQUENCE = SequenceSize(length=LENGTH, width=WIDTH, codebook=CODES, split=2)
IMAGE = ImageSize(height=8, width=8, channels=3)
# A position reads the last token of the AR step before its own; position 0 reads none.
READS = np.array([0, 0, 1, 1, 3, 3])


def toy_teacher(info: FileInfo, **changes: Any) -> Teacher:
    values: dict[str, Any] = {
        "starts": STARTS,
        "layers": 1,
        "heads": 1,
        "head_width": HIDDEN,
        "guidance": "rising",
        "cfg": 2.0,
        "top_k": 4,
        "top_p": 0.9,
        "temperature": 1.0,
        "codebook": info,
    }
    return Teacher(**(values | changes))


def constants() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "tokens_rows": normal(CODES, HIDDEN),
        "label_rows": normal(CLASSES, 1, HIDDEN),
        "null_row": normal(1, 1, HIDDEN),
        "head": 2 * normal(HIDDEN, CODES),
    }


def without_cache(
    tokens: np.ndarray, labels: np.ndarray, g: float, passes: list[tuple[int, int]]
) -> np.ndarray:
    """Guided logits (N, end, V) of all positions that the passes cover: each from the sum of what it read
    itself and what all positions of earlier passes read."""
    parts, end = constants(), passes[-1][1]
    own = parts["tokens_rows"][tokens[:, READS[:end]]] * (np.arange(end) > 0)[:, None]
    scores = []
    for row in (parts["label_rows"][labels], np.broadcast_to(parts["null_row"], (len(labels), 1, HIDDEN))):
        read = own + row
        sums = [read[:, start:stop] + read[:, :start].sum(1, keepdims=True) for start, stop in passes]
        scores.append(np.concatenate(sums, axis=1) @ parts["head"])
    return np.asarray(scores[0] + np.float32(g) * (scores[0] - scores[1]))


def teacher_graph(teacher: Teacher) -> onnx.ModelProto:
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    inputs, outputs = (
        [helper.make_tensor_value_info(spec.name, types[spec.dtype], spec.shape) for spec in side]
        for side in contract("teacher", SEQUENCE, IMAGE, teacher)
    )
    values = constants() | {
        "reads": READS,
        "zero": np.array(0),
        "one": np.array(1),
        "half": np.array(0.5, np.float32),
        "two": np.array(2, np.float32),
        "axes0": np.array([0]),
        "axes1": np.array([1]),
        "axes2": np.array([2]),
        "axes3": np.array([3]),
        "axes12": np.array([1, 2]),
        "column": np.array([-1, 1]),
        "three": np.array(3),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["reads", "positions"], ["sources"]),
        node("Gather", ["tokens", "sources"], ["ids"], axis=1),
        node("Gather", ["tokens_rows", "ids"], ["read"]),
        node("Greater", ["positions", "zero"], ["later"]),
        node("Cast", ["later"], ["weight_row"], to=TensorProto.FLOAT),
        node("Reshape", ["weight_row", "column"], ["weight"]),
        node("Mul", ["read", "weight"], ["own"]),
        node("Gather", ["label_rows", "label"], ["label_row"]),
        node("Add", ["own", "label_row"], ["conditional"]),
        node("Add", ["own", "null_row"], ["unconditional"]),
        node("Unsqueeze", ["conditional", "axes0"], ["conditional0"]),
        node("Unsqueeze", ["unconditional", "axes0"], ["unconditional0"]),
        node("Concat", ["conditional0", "unconditional0"], ["both"], axis=0),
        node("Unsqueeze", ["both", "axes2"], ["new_value_0"]),
        node("Mul", ["new_value_0", "two"], ["new_key_0"]),
        # Half of the sum from either cache, so that both must be right.
        node("Shape", ["value_0"], ["sizes"]),
        node("Gather", ["sizes", "three"], ["capacity"]),
        node("Range", ["zero", "capacity", "one"], ["places"]),
        node("Less", ["places", "filled"], ["is_filled"]),
        node("Cast", ["is_filled"], ["mask_row"], to=TensorProto.FLOAT),
        node("Reshape", ["mask_row", "column"], ["mask"]),
        node("Mul", ["value_0", "mask"], ["values"]),
        node("Mul", ["key_0", "mask"], ["keys"]),
        node("ReduceSum", ["values", "axes3"], ["value_sum"]),
        node("ReduceSum", ["keys", "axes3"], ["key_sum"]),
        node("Mul", ["key_sum", "half"], ["key_share"]),
        node("Add", ["value_sum", "key_share"], ["doubled"]),
        node("Mul", ["doubled", "half"], ["past"]),
        node("Add", ["new_value_0", "past"], ["hidden4"]),
        node("Squeeze", ["hidden4", "axes2"], ["hidden"]),
        node("MatMul", ["hidden", "head"], ["scores"]),
        node("Split", ["scores"], ["c0", "u0"], axis=0, num_outputs=2),
        node("Squeeze", ["c0", "axes0"], ["c"]),
        node("Squeeze", ["u0", "axes0"], ["u"]),
        node("Sub", ["c", "u"], ["difference"]),
        node("Unsqueeze", ["guidance", "axes12"], ["g"]),
        node("Mul", ["difference", "g"], ["shift"]),
        node("Add", ["c", "shift"], ["logits"]),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "teacher", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def other_split(student: onnx.ModelProto, split: int) -> onnx.ModelProto:
    """The toy student with another split."""
    for value in student.graph.initializer:
        if value.name == "split":
            value.CopyFrom(numpy_helper.from_array(np.array([split]), "split"))
    logits = next(value for value in student.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = split
    return student


def add_teacher(root: Path, **changes: Any) -> Path:
    """Adds the toy teacher, a student of split 4, and schedules that use them, to the toy bundle."""
    student = onnx.load(root / "student.onnx")
    codebook = next(v for v in student.graph.initializer if v.name == "codebook")
    np.save(root / "codebook.npy", numpy_helper.to_array(codebook))
    teacher = toy_teacher(file_info(root / "codebook.npy", root), **changes)
    onnx.save(teacher_graph(teacher), root / "teacher.onnx")
    onnx.save(other_split(student, 4), root / "student_split4.onnx")
    manifest = read_manifest(root)
    graphs = [
        Graph(
            role,
            "fp32",
            file,
            (file_info(root / file, root),),
            *contract(role, SEQUENCE, IMAGE, teacher, split),
            split=split,
        )
        for role, file, split in (("teacher", "teacher.onnx", None), ("student", "student_split4.onnx", 4))
    ]
    schedules = {
        1: Schedule((0,)),
        2: Schedule((0, 4), split=4),
        3: Schedule((0, 4), split=2, teacher=Span(2, 4)),
        4: Schedule((4,), split=4, teacher=Span(0, 4)),
    }
    changed = dataclasses.replace(
        manifest, graphs=(*manifest.graphs, *graphs), teacher=teacher, schedules=schedules
    )
    (root / FILE_NAME).write_text(changed.to_json())
    return root
