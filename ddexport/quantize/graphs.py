"""The int8 graphs of a bundle, made from the float32 graphs that lie in its folder."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import onnx_ir as ir

from ddexport.graph.external import SharedWeights, save_graph
from ddexport.graph.to_onnx import check_onnx
from ddexport.precision.cast import PrecisionError
from ddexport.precision.policy import FLOAT32, INT8
from ddexport.quantize.calibration import SEED, Observed, Ranges, calibrate
from ddexport.quantize.policy import quantised_products
from ddexport.quantize.qdq import quantised_model
from ddexport.recipe import Recipe
from ddexport.runtime.bundle import PREFIXES, TEACHER, TEXT_ROLES, Graph, file_info

Stage = Callable[[str], AbstractContextManager[None]]


def check_int8(roles: Sequence[str], images: int, keep_float: bool) -> None:
    """Raises `PrecisionError` if a bundle of these roles cannot be had in int8."""
    if images < 1:
        raise PrecisionError(f"int8 cannot be calibrated on {images} images", "use one or more")
    if "student" not in roles:
        raise PrecisionError("a teacher has no int8 graph, and there is no student", "leave int8 out")
    if TEACHER in roles and not keep_float:
        raise PrecisionError(
            "a teacher has no int8 graph: it needs the fp32 graphs",
            "name both precisions, --precision fp32,int8, or leave the teacher out, --teacher none",
        )


def int8_graphs(
    folder: Path, graphs: Sequence[Graph], recipe: Recipe, images: int, stage: Stage, shared: bool = False
) -> list[Graph]:
    """Writes the int8 graphs of student and decoders, and the students of other splits, into `folder`.

    A teacher stays float32: its passes are many and small, and what it draws is the data of all that follows.
    So does what runs once a text.

    Args:
        graphs: of the bundle; those that are not float32, and the teacher's, are passed over.
        images: how many to take the ranges from.
        shared: the weights lie beside every graph.

    Returns them in the order of `graphs`.
    """
    left = (TEACHER, *TEXT_ROLES)
    floats = [graph for graph in graphs if graph.role not in left and graph.precision == FLOAT32]
    with stage(f"calibrating on {images} images of noise"):
        ranges = _ranges(folder, {g.role: g for g in floats if g.split is None}, recipe, images)
    together = {graph.role for graph in floats if shared or graph.split is not None}
    beside = {role: SharedWeights(folder / f"{role}_{INT8}.onnx.data") for role in together}
    made = []
    for graph in floats:
        path = folder / f"{Path(graph.file).stem}_{INT8}.onnx"
        gc.collect()  # graphs that were read are full of cycles, and hold their weights
        with stage(f"quantising {path.name}"):
            products = _products(folder / graph.file)
            nodes, reads = [name for name, *_ in products], {read: ranges[key] for _, read, key in products}
            model = quantised_model(folder / graph.file, nodes, reads)
            model.metadata_props["precision"] = INT8
            model.metadata_props["calibration"] = f"{images} images of noise, seed {SEED}"
            files = save_graph(model, path, beside.get(graph.role))
        with stage(f"checking {path.name}"):
            check_onnx(path)
            infos = tuple(file_info(file, folder) for file in files)
        made.append(msgspec.structs.replace(graph, precision=INT8, file=path.name, files=infos))
    return made


def _ranges(folder: Path, graphs: dict[str, Graph], recipe: Recipe, images: int) -> Ranges:
    """What each quantised product of student and decoders reads, by the SHA-256 of its weight: students of
    other splits have the same weights, whatever their values are called."""
    products = {role: _products(folder / graph.file) for role, graph in graphs.items()}
    observed = {
        role: Observed(folder / graph.file, [read for _, read, _ in products[role]])
        for role, graph in graphs.items()
    }
    decoders = [graph for role, graph in observed.items() if role != "student"]
    prefix = Observed(folder / f"{PREFIXES['student']}.onnx", []) if recipe.condition else None
    calibrate(observed["student"], decoders, recipe, images, prefix)
    return {key: observed[role].ranges[read] for role in graphs for _, read, key in products[role]}


def _products(path: Path) -> list[tuple[str, str, str]]:
    """Name, the value that it reads, and the SHA-256 of the weight, of each product that is quantised."""
    products = []
    for node in quantised_products(ir.load(path).graph):
        read, weight = node.inputs[:2]
        assert read is not None and weight is not None and weight.const_value is not None  # by the policy
        digest = hashlib.sha256(weight.const_value.tobytes()).hexdigest()
        products.append((str(node.name), str(read.name), digest))
    return products
