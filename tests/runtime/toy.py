"""A toy bundle with the contract of a real one, made in a moment, and functions that change it.

Its teacher is a sum over all positions before: as a graph with a cache, and as a few lines of NumPy without.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import numpy_helper

from ddexport.runtime import bundle as module
from ddexport.runtime.bundle import FILE_NAME, TEACHER, Graph, file_info
from ddexport.runtime.schedule import Schedule, Span

# logits = latents W + label row; regressed = latents A + sum of the known positions; composed.
STUDENT = """<ir_version: 8, opset_import: ["": 18]>
student (float[batch,6,4] latents, int64[batch] label, int64[batch] known)
     => (float[batch,6,4] sequence, int64[batch,2] tokens, float[batch,2,5] logits) {
  known3 = Unsqueeze (known, axes)  is_known = Less (places, known3)  mask = Cast <to = 1> (is_known)
  kept = Mul (latents, mask)  context = ReduceSum (kept, axis)
  front = Slice (latents, start, split, axis)  scores = MatMul (front, W)
  row = Gather <axis = 0> (label_rows, label)  logits = Add (scores, row)
  tokens = ArgMax <axis = 2, keepdims = 0> (logits)  quantised = Gather (codebook, tokens)
  mixed = MatMul (latents, A)  regressed = Add (mixed, context)  back = Slice (regressed, split, end, axis)
  fresh = Concat <axis = 1> (quantised, back)  sequence = Where (is_known, latents, fresh)
}"""

# image = sigmoid of a linear map of the whole sequence.
DECODER = """<ir_version: 8, opset_import: ["": 18]>
decoder (float[batch,6,4] sequence) => (float[batch,3,8,8] image) {
  row = Reshape (sequence, flat)  values = MatMul (row, D)
  light = Sigmoid (values)  image = Reshape (light, shape)
}"""

STARTS = (0, 1, 2, 4, 6)
# A position reads the last token of the AR step before its own; position 0 reads none.
READS = np.array([0, 0, 1, 1, 3, 3])

# Half of the past comes from either cache, so that both must be right.
TEACHER_GRAPH = """<ir_version: 8, opset_import: ["": 18]>
teacher (int64[batch,6] tokens, int64[batch] label, int64[new] positions, float[batch] guidance,
         int64[1] filled, float[2,batch,1,capacity,2] key_0, float[2,batch,1,capacity,2] value_0)
     => (float[batch,new,5] logits, float[2,batch,1,new,2] new_key_0, float[2,batch,1,new,2] new_value_0) {
  sources = Gather (reads, positions)  ids = Gather <axis = 1> (tokens, sources)
  read = Gather (tokens_rows, ids)  later = Greater (positions, zero)  weight_row = Cast <to = 1> (later)
  weight = Reshape (weight_row, column)  own = Mul (read, weight)
  label_row = Gather (label_rows, label)  conditional = Add (own, label_row)
  unconditional = Add (own, null_row)
  conditional0 = Unsqueeze (conditional, axes0)  unconditional0 = Unsqueeze (unconditional, axes0)
  both = Concat <axis = 0> (conditional0, unconditional0)
  new_value_0 = Unsqueeze (both, axes2)  new_key_0 = Mul (new_value_0, two)
  sizes = Shape (value_0)  capacity = Gather (sizes, three)  places = Range (zero, capacity, one)
  is_filled = Less (places, filled)  mask_row = Cast <to = 1> (is_filled)  mask = Reshape (mask_row, column)
  values = Mul (value_0, mask)  value_sum = ReduceSum (values, axes3)
  keys = Mul (key_0, mask)  key_sum = ReduceSum (keys, axes3)  key_share = Mul (key_sum, half)
  doubled = Add (value_sum, key_share)  past = Mul (doubled, half)
  hidden4 = Add (new_value_0, past)  hidden = Squeeze (hidden4, axes2)  scores = MatMul (hidden, head)
  c0, u0 = Split <axis = 0, num_outputs = 2> (scores)  c = Squeeze (c0, axes0)  u = Squeeze (u0, axes0)
  difference = Sub (c, u)  g = Unsqueeze (guidance, axes12)  shift = Mul (difference, g)
  logits = Add (c, shift)
}"""


def _drawn(seed: int, **shapes: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _model(text: str, constants: dict[str, Any]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model)
    return model


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def student(*edit: str, split: int = 2) -> onnx.ModelProto:
    """The toy student, or with one text in the place of another, or with another split."""
    values = _drawn(1, W=(4, 5), A=(4, 4), label_rows=(3, 1, 5), codebook=(5, 4))
    values |= {"places": np.arange(6)[None, :, None], "axes": [1, 2], "axis": [1]}
    text = STUDENT.replace("[batch,2", f"[batch,{split}")
    text = text.replace(*edit) if edit else text
    return _model(text, values | {"start": [0], "split": [split], "end": [6]})


def decoder(int8: bool = False) -> onnx.ModelProto:
    """The toy decoder, or with both sides of its product quantised."""
    values = _drawn(2, D=(24, 192)) | {"flat": [0, 24], "shape": [0, 3, 8, 8]}
    if not int8:
        return _model(DECODER, values)
    pair = "{0}_q = QuantizeLinear ({0}, s, z) {0}_d = DequantizeLinear ({0}_q, s, z)"
    quantised = f"{pair.format('row')} {pair.format('D')} values ="
    text = DECODER.replace("values =", quantised).replace("(row, D)", "(row_d, D_d)")
    return _model(text, values | {"s": np.float32(0.04), "z": np.int8(0)})


def _teacher_weights() -> dict[str, Any]:
    return _drawn(3, tokens_rows=(5, 2), label_rows=(3, 1, 2), null_row=(1, 1, 2), head=(2, 5))


def without_cache(
    tokens: np.ndarray, labels: np.ndarray, g: float, passes: list[tuple[int, int]]
) -> np.ndarray:
    """Guided logits (N, end, V) of all positions that the passes cover: each from the sum of what it read
    itself and what all positions of earlier passes read."""
    parts, end = _teacher_weights(), passes[-1][1]
    own = parts["tokens_rows"][tokens[:, READS[:end]]] * (np.arange(end) > 0)[:, None]
    scores = []
    for row in (parts["label_rows"][labels], np.broadcast_to(parts["null_row"], (len(labels), 1, 2))):
        read = own + row
        sums = [read[:, start:stop] + read[:, :start].sum(1, keepdims=True) for start, stop in passes]
        scores.append(np.concatenate(sums, axis=1) @ parts["head"])
    return np.asarray(scores[0] + np.float32(g) * (scores[0] - scores[1]))


def _graph(root: Path, role: Any, model: onnx.ModelProto, split: int | None = None) -> Graph:
    path = root / (f"{role}_split{split}.onnx" if split else f"{role}.onnx")
    onnx.save(model, path)
    return Graph(role=role, precision="fp32", file=path.name, files=(file_info(path, root),), split=split)


def write_bundle(root: Path) -> Path:
    """Writes the toy bundle, which has no teacher."""
    root.mkdir(parents=True)
    labels = root / "labels.json"
    labels.write_text(json.dumps({"names": ["zero", "one", "two"], "aliases": {"2": ["a pair"]}}))
    manifest = module.Manifest(
        schema=2, name="toy", title="A toy", created="2026-01-31T12:00:00Z",
        sequence=module.SequenceSize(length=6, width=4, codebook=5, split=2),
        image=module.ImageSize(height=8, width=8, channels=3), classes=3, labels=file_info(labels, root),
        schedules={1: Schedule(known=(0,)), 2: Schedule(known=(0, 2)), 3: Schedule(known=(0, 1, 4))},
        graphs=(_graph(root, "student", student()), _graph(root, "decoder", decoder())),
        weights=module.Weights(kind="embedded"), licence={"weights": "Apache-2.0"}, published={},
        parity={"fp32": {"image_max": 2}}, recipe={"name": "toy"}, tools={"ddexport": "0"},
    )  # fmt: skip
    (root / FILE_NAME).write_text(manifest.to_json())
    return root


def add_teacher(root: Path) -> Path:
    """Adds the toy teacher, a student of split 4, and schedules that use them."""
    np.save(root / "codebook.npy", constants(student())["codebook"])
    teacher = module.Teacher(
        starts=STARTS, layers=1, heads=1, head_width=2, guidance="rising", cfg=2.0, top_k=4, top_p=0.9,
        temperature=1.0, codebook=file_info(root / "codebook.npy", root),
    )  # fmt: skip
    values = _teacher_weights() | {"zero": 0, "one": 1, "three": 3, "column": [-1, 1], "reads": READS}
    values |= {"axes0": [0], "axes2": [2], "axes3": [3], "axes12": [1, 2]}
    values |= {"half": np.float32(0.5), "two": np.float32(2)}
    manifest = module.read_manifest(root)
    changed = replace(
        manifest,
        graphs=(
            *manifest.graphs,
            _graph(root, "teacher", _model(TEACHER_GRAPH, values)),
            _graph(root, "student", student(split=4), 4),
        ),
        teacher=teacher,
        schedules={
            1: Schedule(known=(0,)),
            2: Schedule(known=(0, 4), split=4),
            3: Schedule(known=(0, 4), split=2, teacher=Span(start=2, end=4)),
            4: Schedule(known=(4,), split=4, teacher=Span(start=0, end=4)),
        },
    )
    (root / FILE_NAME).write_text(changed.to_json())
    return root


def change(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites bundle.json after `edit` has changed its content in place."""
    content = json.loads((root / FILE_NAME).read_text())
    edit(content)
    (root / FILE_NAME).write_text(json.dumps(content))


def put_file(root: Path, name: str, data: bytes) -> None:
    """Gives a file of the bundle another content that the manifest agrees with."""
    (root / name).write_bytes(data)
    info = file_info(root / name, root)

    def edit(content: dict[str, Any]) -> None:
        listed = [content["labels"], *(file for graph in content["graphs"] for file in graph["files"])]
        for entry in listed + ([content[TEACHER]["codebook"]] if TEACHER in content else []):
            if entry["file"] == name:
                entry.update(sha256=info.sha256, bytes=info.bytes)

    change(root, edit)


def add_precision(root: Path, precision: str, first: bool = False) -> None:
    """Gives the bundle graphs of another precision, but no teacher: in truth the same ones."""

    def edit(content: dict[str, Any]) -> None:
        more = []
        for graph in content["graphs"]:
            if graph["precision"] == "fp32" and graph["role"] != TEACHER:
                file = graph["file"].replace(".onnx", f"_{precision}.onnx")
                shutil.copyfile(root / graph["file"], root / file)
                files = [graph["files"][0] | {"file": file}]
                more.append(graph | {"precision": precision, "file": file, "files": files})
        content["graphs"] = [*more, *content["graphs"]] if first else [*content["graphs"], *more]

    change(root, edit)
