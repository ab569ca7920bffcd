"""Weights beside graphs: each array once, every byte where the graph says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from ddexport.graph import external
from ddexport.graph.external import ALIGNMENT, SMALL, SharedWeights, save_graph


def model_of(**arrays: np.ndarray) -> ir.Model:
    """A model that has these weights and nothing else."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="weights")
    for name, array in arrays.items():
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        graph.register_initializer(value)
    return ir.Model(graph, ir_version=10)


def stored(path: Path) -> dict[str, np.ndarray]:
    return {w.name: numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((40, 30)).astype(np.float32) for name in ("a", "b", "c")}


def test_two_graphs_share_what_is_equal(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Whatever it is called and whatever its shape; what differs is added."""
    shared = SharedWeights(tmp_path / "w.data")
    first, second = tmp_path / "1.onnx", tmp_path / "2.onnx"
    one = {"a": arrays["a"], "b": arrays["b"]}
    other = {"x": arrays["b"], "y": arrays["a"].reshape(30, 40), "z": arrays["c"]}
    for path, content in ((first, one), (second, other)):
        model = model_of(**content)
        shared.take_from(model)
        ir.save(model, path)
        if path == first:
            size = shared.path.stat().st_size
    assert 2 * 4800 <= size <= 2 * (4800 + ALIGNMENT)
    assert 4800 <= shared.path.stat().st_size - size <= 4800 + ALIGNMENT
    for path, content in ((first, one), (second, other)):
        found = stored(path)
        assert all(np.array_equal(found[name], content[name]) for name in content)
    assert shared.path.read_bytes()[:4800] == arrays["a"].tobytes()


def test_small_tensors_stay_in_the_graph(tmp_path: Path) -> None:
    """Shapes and indices, which engines read when they build."""
    shared = SharedWeights(tmp_path / "w.data")
    model = model_of(shape=np.array([1, 2, 3]), table=np.zeros(SMALL, np.float32))
    shared.take_from(model)
    ir.save(model, tmp_path / "m.onnx")
    weights = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    assert {w.name for w in weights if w.external_data} == {"table"}


def test_an_old_file_is_replaced(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Nothing of a file of that name is kept, so the same graphs give the same bytes."""
    path = tmp_path / "w.data"
    contents = []
    for _ in range(2):
        SharedWeights(path).take_from(model_of(**arrays))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_large_weights_lie_beside_the_graph(
    arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One protobuf message holds 2 GiB; smaller weights stay inside."""
    path = tmp_path / "m.onnx"
    assert save_graph(model_of(**arrays), path) == [path]
    assert stored(path).keys() == arrays.keys()
    monkeypatch.setattr(external, "EXTERNAL_DATA_FROM", 3 * 4800 - 1)
    data = tmp_path / "m.onnx.data"
    assert save_graph(model_of(**arrays), path) == [path, data]
    assert data.stat().st_size >= 3 * 4800 > path.stat().st_size
    assert all(np.array_equal(value, arrays[name]) for name, value in stored(path).items())
