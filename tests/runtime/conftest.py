"""A toy bundle with the real contract: small enough to be made in a moment, honest enough to draw from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.manifest import (
    FILE_NAME,
    FileInfo,
    Graph,
    ImageSize,
    Manifest,
    Schedule,
    SequenceSize,
    Weights,
    contract,
    file_info,
    sha256_of,
)

SEQUENCE = SequenceSize(length=6, width=4, codebook=5, split=2)
IMAGE = ImageSize(height=8, width=8, channels=3)
NAMES = ("zero", "one", "two")
Edit = Callable[[dict[str, Any]], object]


def make_graph(role: str, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model of the nodes with the inputs and outputs that the contract has for the role."""
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    inputs, outputs = (
        [helper.make_tensor_value_info(spec.name, types[spec.dtype], spec.shape) for spec in side]
        for side in contract(role, SEQUENCE, IMAGE)
    )
    values = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, role, inputs, outputs, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def toy_student() -> onnx.ModelProto:
    """logits = tokens W + label row; regressed = tokens A + sum of the known positions; composed."""
    rng = np.random.default_rng(1)
    split, length, width, codes = SEQUENCE.split, SEQUENCE.length, SEQUENCE.width, SEQUENCE.codebook
    constants = {
        "W": rng.standard_normal((width, codes)).astype(np.float32),
        "A": rng.standard_normal((width, width)).astype(np.float32),
        "label_rows": rng.standard_normal((len(NAMES), 1, codes)).astype(np.float32),
        "codebook": rng.standard_normal((codes, width)).astype(np.float32),
        "places": np.arange(length, dtype=np.int64)[None, :, None],
        "axes": np.array([1, 2]),
        "start": np.array([0]),
        "split": np.array([split]),
        "end": np.array([length]),
        "axis": np.array([1]),
    }
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["known", "axes"], ["known3"]),
        node("Less", ["places", "known3"], ["is_known"]),
        node("Cast", ["is_known"], ["mask"], to=TensorProto.FLOAT),
        node("Mul", ["tokens", "mask"], ["kept"]),
        node("ReduceSum", ["kept", "axis"], ["context"]),
        node("Slice", ["tokens", "start", "split", "axis"], ["front"]),
        node("MatMul", ["front", "W"], ["scores"]),
        node("Gather", ["label_rows", "label"], ["row"], axis=0),
        node("Add", ["scores", "row"], ["logits"]),
        node("ArgMax", ["logits"], ["codes"], axis=2, keepdims=0),
        node("Gather", ["codebook", "codes"], ["quantised"], axis=0),
        node("MatMul", ["tokens", "A"], ["mixed"]),
        node("Add", ["mixed", "context"], ["regressed"]),
        node("Slice", ["regressed", "split", "end", "axis"], ["back"]),
        node("Concat", ["quantised", "back"], ["fresh"], axis=1),
        node("Where", ["is_known", "tokens", "fresh"], ["sequence"]),
    ]
    return make_graph("student", nodes, constants)


def toy_decoder() -> onnx.ModelProto:
    """image = sigmoid of a linear map of the whole sequence."""
    rng = np.random.default_rng(2)
    pixels = IMAGE.channels * IMAGE.height * IMAGE.width
    constants = {
        "D": rng.standard_normal((SEQUENCE.length * SEQUENCE.width, pixels)).astype(np.float32),
        "flat": np.array([0, SEQUENCE.length * SEQUENCE.width]),
        "shape": np.array([0, IMAGE.channels, IMAGE.height, IMAGE.width]),
    }
    node = helper.make_node
    nodes = [
        node("Reshape", ["sequence", "flat"], ["row"]),
        node("MatMul", ["row", "D"], ["values"]),
        node("Sigmoid", ["values"], ["light"]),
        node("Reshape", ["light", "shape"], ["image"]),
    ]
    return make_graph("decoder", nodes, constants)


def write_bundle(root: Path, weights: Weights | None = None) -> Path:
    """Writes the toy bundle."""
    root.mkdir(parents=True)
    graphs = []
    for role, model in (("student", toy_student()), ("decoder", toy_decoder())):
        path = root / f"{role}.onnx"
        onnx.save(model, path)
        info = file_info(path, root)
        graphs.append(Graph(role, "fp32", path.name, (info,), *contract(role, SEQUENCE, IMAGE)))
    labels = root / "labels.json"
    labels.write_text(json.dumps({"names": NAMES, "aliases": {"2": ["a pair"]}}))
    manifest = Manifest(
        name="toy",
        title="A toy",
        created="2026-01-31T12:00:00Z",
        sequence=SEQUENCE,
        image=IMAGE,
        classes=len(NAMES),
        labels=file_info(labels, root),
        schedules={1: Schedule((0,)), 2: Schedule((0, 2)), 3: Schedule((0, 1, 4))},
        graphs=tuple(graphs),
        weights=weights or Weights("embedded", None, ()),
        parity={"fp32": {"image_max": 2}},
        published={},
        licence={"weights": "Apache-2.0"},
        recipe={"name": "toy"},
        tools={"ddexport": "0"},
    )
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
    info = FileInfo(name, sha256_of(root / name), len(data))

    def edit(content: dict[str, Any]) -> None:
        for entry in [content["labels"], *(file for graph in content["graphs"] for file in graph["files"])]:
            if entry["file"] == name:
                entry.update(vars(info))

    change_manifest(root, edit)


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle, not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the toy bundle to tell lies with."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


@pytest.fixture
def random_bundle(tmp_path: Path) -> Path:
    """The toy bundle, saying that its weights are random."""
    return write_bundle(tmp_path / "random", Weights("random", 7, ()))


@pytest.fixture
def edit_manifest(bundle: Path) -> Callable[[Edit], None]:
    """Rewrites bundle.json of the copy after a function has changed its content in place."""
    return partial(change_manifest, bundle)


@pytest.fixture
def replace_file(bundle: Path) -> Callable[[str, bytes], None]:
    """Gives a file of the copy another content, which the manifest then agrees with."""
    return partial(put_file, bundle)
