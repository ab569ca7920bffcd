"""A toy bundle with the real contract: small enough to be made in a moment, honest enough to draw from."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from ddexport.runtime.engines import Engine, Profile, SizeRange, engine_folder, graph_digest, this_platform
from ddexport.runtime.machine import Machine, Package
from ddexport.runtime.manifest import (
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
    read_manifest,
    sha256_of,
)
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture(autouse=True)
def without_openvino(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes ONNX Runtime on the CPU, OpenVINO installed or not, except where that is tested."""
    if request.module.__name__.rpartition(".")[2] != "test_openvino":
        missing = Package("openvino", None, "openvino is not installed: pip install openvino", missing=True)
        fact = cached_property(lambda machine: missing)
        fact.__set_name__(Machine, "openvino")
        monkeypatch.setattr(Machine, "openvino", fact)


def _beside(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake_cuda, fake_tensorrt = _beside("fake_cuda"), _beside("fake_tensorrt")

_teacher_spec = importlib.util.spec_from_file_location(
    "toy_teacher", Path(__file__).with_name("toy_teacher.py")
)
assert _teacher_spec and _teacher_spec.loader
toy_teacher_module = importlib.util.module_from_spec(_teacher_spec)
_teacher_spec.loader.exec_module(toy_teacher_module)

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


@pytest.fixture(scope="session")
def toy_teacher() -> Any:
    """The module `toy_teacher.py`."""
    return toy_teacher_module


@pytest.fixture(scope="session")
def shared_teacher_bundle(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle with a teacher, not to be changed."""
    copied = shutil.copytree(shared_bundle, tmp_path_factory.mktemp("teacher") / "bundle")
    return Path(toy_teacher_module.add_teacher(Path(copied)))


@pytest.fixture
def teacher_bundle(shared_teacher_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the toy bundle with a teacher."""
    return Path(shutil.copytree(shared_teacher_bundle, tmp_path / "teacher"))


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


VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}


def write_engines(
    root: Path,
    backend: str = "tensorrt-rtx",
    precision: str = "fp32",
    profiles: tuple[tuple[int, int, int], ...] = ((1, 4, 8),),
    roles: tuple[str, ...] = ("student", "decoder"),
    others: tuple[tuple[SizeRange, ...], ...] = (),
    **changes: Any,
) -> Path:
    """Puts engines for the fake packages into a bundle; `changes` are fields of their sidecars.

    roles: keys of graphs. others: of the teacher's profiles, each with every batch of `profiles`.
    """
    targets = changes.get("targets", ("default",) if backend == "tensorrt-rtx" else ("sm89",))
    version = changes.get("version", VERSIONS[backend])
    folder = root / engine_folder(backend, version, targets)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(root, verify=False)
    for role in roles:
        graph = manifest.graph(role, precision)
        more = others if role == "teacher" else ((),)
        made = tuple(Profile(*profile, each) for profile in profiles for each in more)
        plan = folder / f"{role.replace('@', '_split')}_{precision}.plan"
        plan.write_bytes(fake_tensorrt.plan_of(root / graph.file, made))
        engine = Engine(
            role=role,
            precision=precision,
            file=plan.name,
            sha256=sha256_of(plan),
            bytes=plan.stat().st_size,
            source=graph_digest(graph),
            backend=backend,
            version=version,
            platform=this_platform(),
            targets=targets,
            hardware=None,
            version_compatible=False,
            profiles=made,
            inputs=graph.inputs,
            outputs=graph.outputs,
            layers={"float32": 3},
            options={"strip_plan": False},
            key="0" * 64,
            made_with={},
            seconds=1.0,
        )
        plan.with_suffix(".json").write_text(replace(engine, **changes).to_json())
    return folder


def add_precision(root: Path, precision: str, first: bool = False) -> None:
    """Gives the bundle graphs of another precision: in truth the same ones."""

    def edit(content: dict[str, Any]) -> None:
        more = []
        for graph in [graph for graph in content["graphs"] if graph["precision"] == "fp32"]:
            file = f"{graph['role']}_{precision}.onnx"
            shutil.copyfile(root / graph["file"], root / file)
            files = [vars(file_info(root / file, root))]
            more.append(graph | {"precision": precision, "file": file, "files": files})
        content["graphs"] = [*more, *content["graphs"]] if first else [*content["graphs"], *more]

    change_manifest(root, edit)


@pytest.fixture(name="write_engines")
def _write_engines() -> Callable[..., Path]:
    """The function `write_engines`."""
    return write_engines


@pytest.fixture
def build(bundle: Path) -> Callable[..., Path]:
    """Puts engines into the copy of the toy bundle: see `write_engines`."""
    return partial(write_engines, bundle)


@pytest.fixture
def add_graphs(bundle: Path) -> Callable[..., None]:
    """Gives the copy of the toy bundle graphs of another precision."""
    return partial(add_precision, bundle)


@dataclass
class FakeGpu:
    """The fake device and packages that a test has in place of the real ones."""

    cuda: Any
    full: Any
    rtx: Any

    def package(self, backend: str) -> Any:
        return self.full if backend == "tensorrt" else self.rtx


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    """One fake GPU of capability 8.9, with both TensorRT packages for CUDA 13."""
    cuda = fake_cuda.FakeCuda()
    fakes = FakeGpu(
        cuda,
        fake_tensorrt.FakeTensorRt("tensorrt", VERSIONS["tensorrt"], cuda),
        fake_tensorrt.FakeTensorRt("tensorrt_rtx", VERSIONS["tensorrt-rtx"], cuda),
    )
    for module in (cuda, fakes.full, fakes.rtx):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    distributions = {"tensorrt-cu13": "11.4", "tensorrt-rtx-cu13": "1.7", "cuda-bindings": "13.5.0"}
    monkeypatch.setattr("ddexport.runtime.machine.installed", lambda: distributions)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fakes


@pytest.fixture
def machine(gpu: FakeGpu) -> Machine:
    """The machine with the fake GPU."""
    return Machine()


def rename_input(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "label":
                node.input[place] = "klass"
    model.graph.input[1].name = "klass"


def fix_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


@pytest.fixture(params=[rename_input, fix_batch], ids=lambda lie: lie.__name__)
def lying_bundle(
    request: pytest.FixtureRequest, bundle: Path, replace_file: Callable[[str, bytes], None]
) -> Path:
    """The bundle with a student whose inputs or shapes are not those of the manifest; its hash is right."""
    model = onnx.load(bundle / "student.onnx")
    request.param(model)
    replace_file("student.onnx", model.SerializeToString())
    return bundle
