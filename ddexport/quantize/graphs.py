"""The int8 graphs of a bundle, made from the float32 graphs that lie in its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import onnx_ir as ir

from ddexport.graph.external import SharedWeights
from ddexport.graph.to_onnx import EXTERNAL_DATA_FROM, check_onnx
from ddexport.precision.cast import PrecisionError
from ddexport.precision.policy import FLOAT32, INT8
from ddexport.quantize.calibration import SEED, Observed, Ranges, calibrate
from ddexport.quantize.policy import quantised_products
from ddexport.quantize.qdq import quantised_model
from ddexport.recipe import Recipe
from ddexport.runtime.bundle import TEACHER, Graph, file_info

Stage = Callable[[str], AbstractContextManager[None]]
ROLES = ("student", "decoder")
"""The parts that are quantised. A teacher stays float32: its passes are many and small, and what it draws is
the data of all that follows."""


def check_int8(roles: Sequence[str], images: int, keep_float: bool) -> None:
    """Raises `PrecisionError` if a bundle of these roles cannot be had in int8."""
    if images < 1:
        raise PrecisionError(f"int8 cannot be calibrated on {images} images", "take one at least")
    if TEACHER in roles and not keep_float:
        raise PrecisionError(
            "a teacher has no int8 graph: it runs in float32 beside the int8 student",
            "name both precisions, --precision fp32,int8, or leave the teacher out, --teacher none",
        )


def with_int8(
    graphs: Sequence[Graph], folder: Path, recipe: Recipe, images: int, keep_float: bool, stage: Stage
) -> list[Graph]:
    """The graphs with their int8 ones behind them, and unless `keep_float`, without the float32 ones, whose
    files are removed."""
    floats = [graph for graph in graphs if graph.precision == FLOAT32]
    all_graphs = [*graphs, *int8_graphs(folder, floats, recipe, images, stage)]
    if keep_float:
        return all_graphs
    for file in {info.file for graph in floats for info in graph.files}:
        (folder / file).unlink()
    return [graph for graph in all_graphs if graph.precision != FLOAT32]


def int8_graphs(
    folder: Path, graphs: Sequence[Graph], recipe: Recipe, images: int, stage: Stage
) -> list[Graph]:
    """Writes the int8 graphs of student and decoder, and the students of other splits, into `folder`.

    Args:
        graphs: of the bundle, in float32; those of other roles are passed over.
        images: how many to take the ranges from.

    Returns them in the order of `graphs`.
    """
    floats = [graph for graph in graphs if graph.role in ROLES]
    plain = {graph.role: graph for graph in floats if graph.split is None}
    products = {role: _Products(folder / graph.file) for role, graph in plain.items()}
    observed = {role: Observed(folder / plain[role].file, products[role].reads) for role in ROLES}
    with stage(f"calibrating on {images} images of noise"):
        calibrate(observed["student"], observed["decoder"], recipe, images)
    by_weight = {role: products[role].by_weight(observed[role].ranges) for role in ROLES}
    del observed
    students = [graph for graph in floats if graph.role == "student"]
    shared = SharedWeights(folder / "student_int8.onnx.data") if len(students) > 1 else None
    return [
        _write(folder, graph, by_weight[graph.role], images, stage, shared if graph in students else None)
        for graph in floats
    ]


class _Products:
    """The products of a graph that are quantised, and the SHA-256 of their weights: graphs of one part have
    the same, whatever their values are called."""

    def __init__(self, path: Path) -> None:
        nodes = quantised_products(ir.load(path).graph)
        self.nodes = [str(node.name) for node in nodes]
        self.reads = [str(node.inputs[0].name) for node in nodes]  # type: ignore[union-attr]
        self._weights = [_digest(node) for node in nodes]

    def by_weight(self, ranges: Ranges) -> Ranges:
        return {weight: ranges[name] for weight, name in zip(self._weights, self.reads, strict=True)}

    def by_value(self, ranges: Ranges) -> Ranges:
        return {name: ranges[weight] for weight, name in zip(self._weights, self.reads, strict=True)}


def _digest(node: ir.Node) -> str:
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None  # the policy has seen to it
    return hashlib.sha256(weight.const_value.tobytes()).hexdigest()


def _write(
    folder: Path, graph: Graph, by_weight: Ranges, images: int, stage: Stage, shared: SharedWeights | None
) -> Graph:
    source = folder / graph.file
    path = folder / f"{source.stem}_{INT8}.onnx"
    with stage(f"quantising {path.name}"):
        products = _Products(source)
        model = quantised_model(source, products.nodes, products.by_value(by_weight))
        model.metadata_props.update(
            {"precision": INT8, "calibration": f"{images} images of noise, seed {SEED}"}
        )
        values = model.graph.initializers.values()
        size = sum(value.const_value.nbytes for value in values if value.const_value is not None)
        if shared is None and size > EXTERNAL_DATA_FROM:
            shared = SharedWeights(path.with_name(path.name + ".data"))
        if shared is not None:
            shared.take_from(model)
        ir.save(model, path)
    with stage(f"checking {path.name}"):
        check_onnx(path)
        files = (path,) if shared is None else (path, shared.path)
        infos = tuple(file_info(file, folder) for file in files)
    return msgspec.structs.replace(graph, precision=INT8, file=path.name, files=infos)
