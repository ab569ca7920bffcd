"""A toy bundle with the real contract: small enough to be made in a moment, honest enough to draw from."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from ddexport import runtime
from ddexport.runtime.bundle import (
    FILE_NAME,
    TEACHER,
    ImageSize,
    Manifest,
    Schedule,
    SequenceSize,
    Weights,
    file_info,
)

_spec = importlib.util.spec_from_file_location("toy_teacher", Path(__file__).with_name("toy_teacher.py"))
assert _spec and _spec.loader
toys = importlib.util.module_from_spec(_spec)  # this folder is no package
_spec.loader.exec_module(toys)

NAMES = ("zero", "one", "two")
Edit = Callable[[dict[str, Any]], object]

# logits = latents W + label row; regressed = latents A + sum of the known positions; composed.
STUDENT = """<ir_version: 8, opset_import: ["": 18]>
student (float[batch,6,4] latents, int64[batch] label, int64[batch] known)
     => (float[batch,6,4] sequence, int64[batch,2] tokens, float[batch,2,5] logits) {
  known3 = Unsqueeze (known, axes)
  is_known = Less (places, known3)
  mask = Cast <to = 1> (is_known)
  kept = Mul (latents, mask)
  context = ReduceSum (kept, axis)
  front = Slice (latents, start, split, axis)
  scores = MatMul (front, W)
  row = Gather <axis = 0> (label_rows, label)
  logits = Add (scores, row)
  tokens = ArgMax <axis = 2, keepdims = 0> (logits)
  quantised = Gather (codebook, tokens)
  mixed = MatMul (latents, A)
  regressed = Add (mixed, context)
  back = Slice (regressed, split, end, axis)
  fresh = Concat <axis = 1> (quantised, back)
  sequence = Where (is_known, latents, fresh)
}"""

# image = sigmoid of a linear map of the whole sequence.
DECODER = """<ir_version: 8, opset_import: ["": 18]>
decoder (float[batch,6,4] sequence) => (float[batch,3,8,8] image) {
  row = Reshape (sequence, flat)
  values = MatMul (row, D)
  light = Sigmoid (values)
  image = Reshape (light, shape)
}"""


def student(*edit: str) -> onnx.ModelProto:
    """The toy student, or with one text in the place of another."""
    constants = toys.drawn(1, W=(4, 5), A=(4, 4), label_rows=(3, 1, 5), codebook=(5, 4))
    constants |= {"places": np.arange(6)[None, :, None], "axes": [1, 2], "axis": [1]}
    text = STUDENT.replace(*edit) if edit else STUDENT
    return toys.make_graph(text, constants | {"start": [0], "split": [2], "end": [6]})


def decoder(int8: bool = False) -> onnx.ModelProto:
    """The toy decoder, or with both sides of its product quantised."""
    constants = toys.drawn(2, D=(24, 192)) | {"flat": [0, 24], "shape": [0, 3, 8, 8]}
    if not int8:
        return toys.make_graph(DECODER, constants)
    pair = "{0}_q = QuantizeLinear ({0}, s, z) {0}_d = DequantizeLinear ({0}_q, s, z)"
    quantised = f"{pair.format('row')} {pair.format('D')} values ="
    text = DECODER.replace("values =", quantised).replace("(row, D)", "(row_d, D_d)")
    return toys.make_graph(text, constants | {"s": np.float32(0.04), "z": np.int8(0)})


def write_bundle(root: Path) -> Path:
    """Writes the toy bundle."""
    root.mkdir(parents=True)
    onnx.save(student(), root / "student.onnx")
    onnx.save(decoder(), root / "decoder.onnx")
    labels = root / "labels.json"
    labels.write_text(json.dumps({"names": NAMES, "aliases": {"2": ["a pair"]}}))
    manifest = Manifest(
        schema=2, name="toy", title="A toy", created="2026-01-31T12:00:00Z",
        sequence=SequenceSize(length=6, width=4, codebook=5, split=2),
        image=ImageSize(height=8, width=8, channels=3), classes=len(NAMES), labels=file_info(labels, root),
        schedules={1: Schedule(known=(0,)), 2: Schedule(known=(0, 2)), 3: Schedule(known=(0, 1, 4))},
        graphs=tuple(toys.graph_of(root, role, f"{role}.onnx") for role in ("student", "decoder")),
        weights=Weights(kind="embedded"), licence={"weights": "Apache-2.0"}, published={},
        parity={"fp32": {"image_max": 2}}, recipe={"name": "toy"}, tools={"ddexport": "0"},
    )  # fmt: skip
    (root / FILE_NAME).write_text(manifest.to_json())
    return root


def change_manifest(root: Path, edit: Edit) -> None:
    """Rewrites bundle.json after `edit` has changed its content in place."""
    path = root / FILE_NAME
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def put_file(root: Path, name: str, data: bytes) -> None:
    """Gives a file of the bundle another content that the manifest agrees with."""
    (root / name).write_bytes(data)
    info = file_info(root / name, root)

    def edit(content: dict[str, Any]) -> None:
        listed = [content["labels"], *(file for graph in content["graphs"] for file in graph["files"])]
        for entry in listed + ([content[TEACHER]["codebook"]] if TEACHER in content else []):
            if entry["file"] == name:
                entry.update(sha256=info.sha256, bytes=info.bytes)

    change_manifest(root, edit)


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

    change_manifest(root, edit)


@pytest.fixture(scope="session")
def toy() -> Any:
    """The functions of this module that change a bundle, and the module `toy_teacher.py`."""
    made = {"put_file": put_file, "add_precision": add_precision, "change": change_manifest}
    return SimpleNamespace(**made, student=student, decoder=decoder, teacher=toys)


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle, not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the toy bundle to tell lies with."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def shared_teacher_bundle(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle with a teacher, not to be changed."""
    copied = shutil.copytree(shared_bundle, tmp_path_factory.mktemp("teacher") / "bundle")
    return Path(toys.add_teacher(Path(copied)))


@pytest.fixture
def teacher_bundle(shared_teacher_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the toy bundle with a teacher."""
    return Path(shutil.copytree(shared_teacher_bundle, tmp_path / "teacher"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that ONNX Runtime opens from now on."""
    import onnxruntime

    files: list[str] = []
    session = onnxruntime.InferenceSession

    def open_session(path: Path, *arguments: Any, **named: Any) -> Any:
        files.append(path.name)
        return session(path, *arguments, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    return files


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], tuple[str, ...] | None]]:
    """Every run of a graph from now on: its file, its inputs and the outputs asked for."""
    seen: list[tuple[str, dict[str, Any], tuple[str, ...] | None]] = []
    original = runtime.backends.Backend.run

    def run(self: Any, graph: Any, feeds: Any, names: Any = None) -> Any:
        seen.append((graph.file, {name: array.copy() for name, array in feeds.items()}, names))
        return original(self, graph, feeds, names)

    monkeypatch.setattr(runtime.backends.Backend, "run", run)
    return seen
