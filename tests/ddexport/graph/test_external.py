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

Arrays = dict[str, np.ndarray]


def model_of(arrays: Arrays) -> ir.Model:
    """A model that has these weights and nothing else."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="weights")
    for name, array in arrays.items():
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    return ir.Model(graph, ir_version=10)


def stored(path: Path) -> Arrays:
    return {w.name: numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer}


@pytest.fixture
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((40, 30)).astype(np.float32) for name in ("a", "b", "c")}


def test_two_graphs_share_what_is_equal(arrays: Arrays, tmp_path: Path) -> None:
    """Whatever it is called and whatever its shape; what differs is added. Nothing of an old file is kept, so
    the same graphs give the same bytes. Shapes and indices stay in the graph."""
    one = {"a": arrays["a"], "b": arrays["b"], "shape": np.array([1, 2, 3])}
    other = {"x": arrays["b"], "y": arrays["a"].reshape(30, 40), "z": arrays["c"]}
    contents = []
    for _ in range(2):
        shared, sizes = SharedWeights(tmp_path / "w.data"), []
        for name, weights in (("1.onnx", one), ("2.onnx", other)):
            assert save_graph(model_of(weights), tmp_path / name, shared) == [tmp_path / name, shared.path]
            sizes.append(shared.path.stat().st_size)
        contents.append(shared.path.read_bytes())
    assert contents[0] == contents[1]
    assert 2 * 4800 <= sizes[0] <= 2 * (4800 + ALIGNMENT)
    assert 4800 <= sizes[1] - sizes[0] <= 4800 + ALIGNMENT
    for name, weights in (("1.onnx", one), ("2.onnx", other)):
        found = stored(tmp_path / name)
        assert all(np.array_equal(found[key], weights[key]) for key in weights)
        outside = onnx.load(tmp_path / name, load_external_data=False).graph.initializer
        assert {w.name for w in outside if w.external_data} == weights.keys() - {"shape"}
    assert 24 < SMALL < 4800


def test_large_weights_lie_beside_the_graph(
    arrays: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One protobuf message holds 2 GiB; smaller weights stay inside."""
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    assert save_graph(model_of(arrays), path) == [path]
    assert stored(path).keys() == arrays.keys()
    monkeypatch.setattr(external, "EXTERNAL_DATA_FROM", 3 * 4800 - 1)
    assert save_graph(model_of(arrays), path) == [path, data]
    assert data.stat().st_size >= 3 * 4800 > path.stat().st_size
    assert all(np.array_equal(value, arrays[name]) for name, value in stored(path).items())
