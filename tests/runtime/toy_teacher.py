"""A toy teacher with the real contract, and a bundle that holds it: a sum over all positions before, as a
graph with a cache and as a few lines of NumPy without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import numpy_helper

from ddexport.runtime.bundle import FILE_NAME, Graph, Schedule, Span, Teacher, file_info, read_manifest

STARTS = (0, 1, 2, 4, 6)
# A position reads the last token of the AR step before its own; position 0 reads none.
READS = np.array([0, 0, 1, 1, 3, 3])

# Half of the past comes from either cache, so that both must be right.
GRAPH = """<ir_version: 8, opset_import: ["": 18]>
teacher (int64[batch,6] tokens, int64[batch] label, int64[new] positions, float[batch] guidance,
         int64[1] filled, float[2,batch,1,capacity,2] key_0, float[2,batch,1,capacity,2] value_0)
     => (float[batch,new,5] logits, float[2,batch,1,new,2] new_key_0, float[2,batch,1,new,2] new_value_0) {
  sources = Gather (reads, positions)
  ids = Gather <axis = 1> (tokens, sources)
  read = Gather (tokens_rows, ids)
  later = Greater (positions, zero)
  weight_row = Cast <to = 1> (later)
  weight = Reshape (weight_row, column)
  own = Mul (read, weight)
  label_row = Gather (label_rows, label)
  conditional = Add (own, label_row)
  unconditional = Add (own, null_row)
  conditional0 = Unsqueeze (conditional, axes0)
  unconditional0 = Unsqueeze (unconditional, axes0)
  both = Concat <axis = 0> (conditional0, unconditional0)
  new_value_0 = Unsqueeze (both, axes2)
  new_key_0 = Mul (new_value_0, two)
  sizes = Shape (value_0)
  capacity = Gather (sizes, three)
  places = Range (zero, capacity, one)
  is_filled = Less (places, filled)
  mask_row = Cast <to = 1> (is_filled)
  mask = Reshape (mask_row, column)
  values = Mul (value_0, mask)
  keys = Mul (key_0, mask)
  value_sum = ReduceSum (values, axes3)
  key_sum = ReduceSum (keys, axes3)
  key_share = Mul (key_sum, half)
  doubled = Add (value_sum, key_share)
  past = Mul (doubled, half)
  hidden4 = Add (new_value_0, past)
  hidden = Squeeze (hidden4, axes2)
  scores = MatMul (hidden, head)
  c0, u0 = Split <axis = 0, num_outputs = 2> (scores)
  c = Squeeze (c0, axes0)
  u = Squeeze (u0, axes0)
  difference = Sub (c, u)
  g = Unsqueeze (guidance, axes12)
  shift = Mul (difference, g)
  logits = Add (c, shift)
}"""


def drawn(seed: int, **shapes: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make_graph(text: str, constants: dict[str, Any]) -> onnx.ModelProto:
    """A model of the text with the constants."""
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model)
    return model


def graph_of(root: Path, role: Any, file: str, split: int | None = None) -> Graph:
    files = (file_info(root / file, root),)
    return Graph(role=role, precision="fp32", file=file, files=files, split=split)


def weights() -> dict[str, Any]:
    return drawn(3, tokens_rows=(5, 2), label_rows=(3, 1, 2), null_row=(1, 1, 2), head=(2, 5))


def without_cache(
    tokens: np.ndarray, labels: np.ndarray, g: float, passes: list[tuple[int, int]]
) -> np.ndarray:
    """Guided logits (N, end, V) of all positions that the passes cover: each from the sum of what it read
    itself and what all positions of earlier passes read."""
    parts, end = weights(), passes[-1][1]
    own = parts["tokens_rows"][tokens[:, READS[:end]]] * (np.arange(end) > 0)[:, None]
    scores = []
    for row in (parts["label_rows"][labels], np.broadcast_to(parts["null_row"], (len(labels), 1, 2))):
        read = own + row
        sums = [read[:, start:stop] + read[:, :start].sum(1, keepdims=True) for start, stop in passes]
        scores.append(np.concatenate(sums, axis=1) @ parts["head"])
    return np.asarray(scores[0] + np.float32(g) * (scores[0] - scores[1]))


def other_split(student: onnx.ModelProto, split: int) -> onnx.ModelProto:
    """The toy student with another split."""
    for value in student.graph.initializer:
        if value.name == "split":
            value.CopyFrom(numpy_helper.from_array(np.array([split]), "split"))
    for output in student.graph.output[1:]:
        output.type.tensor_type.shape.dim[1].dim_value = split
    return student


def add_teacher(root: Path) -> Path:
    """Adds the toy teacher, a student of split 4, and schedules that use them, to the toy bundle."""
    student = onnx.load(root / "student.onnx")
    codebook = next(value for value in student.graph.initializer if value.name == "codebook")
    np.save(root / "codebook.npy", numpy_helper.to_array(codebook))
    teacher = Teacher(
        starts=STARTS, layers=1, heads=1, head_width=2, guidance="rising", cfg=2.0, top_k=4, top_p=0.9,
        temperature=1.0, codebook=file_info(root / "codebook.npy", root),
    )  # fmt: skip
    constants = {
        "zero": 0,
        "one": 1,
        "three": 3,
        "column": [-1, 1],
        "reads": READS,
        "axes0": [0],
        "axes2": [2],
    }
    constants |= {"axes2": [2], "axes3": [3], "axes12": [1, 2], "half": np.float32(0.5), "two": np.float32(2)}
    onnx.save(make_graph(GRAPH, weights() | constants), root / "teacher.onnx")
    onnx.save(other_split(student, 4), root / "student_split4.onnx")
    schedules = {
        1: Schedule(known=(0,)),
        2: Schedule(known=(0, 4), split=4),
        3: Schedule(known=(0, 4), split=2, teacher=Span(start=2, end=4)),
        4: Schedule(known=(4,), split=4, teacher=Span(start=0, end=4)),
    }

    manifest = read_manifest(root)
    more = graph_of(root, "teacher", "teacher.onnx"), graph_of(root, "student", "student_split4.onnx", 4)
    changed = replace(manifest, graphs=manifest.graphs + more, teacher=teacher, schedules=schedules)
    (root / FILE_NAME).write_text(changed.to_json())
    return root
