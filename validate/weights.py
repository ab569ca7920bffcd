"""The numbers in a bundle's reduced graphs, one by one against its float32 graphs, which parity holds to
PyTorch.

Rounding hides one wrong weight among millions from every statistic of the outputs; it cannot hide it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.bundle import PREFIXES, Manifest
from ddexport.validate.report import Measurement

if TYPE_CHECKING:
    from ddexport.validate.reference import TorchReference

Weights: TypeAlias = dict[str, npt.NDArray[Any]]

FLOAT32 = "fp32"
WRAPPED = ("", "student.", "teacher.", "part.")  # what the module of a graph calls the part it was made from
SUFFIX, CALIBRATED = "_quantized", ("_scale", "_zero_point")  # what ONNX Runtime's quantizer adds to names
TOLERANCE = 1e-4  # of a quantization step: float32 arithmetic


def compare_weights(
    root: Path, manifest: Manifest, precision: str, reference: TorchReference
) -> list[Measurement]:
    """How many weights of each graph are not those of the float32 graph, rounded; none of a float32 graph.

    A graph that was traced apart from the float32 graph is compared with the reference's weights, by name;
    so are the graphs that run once a text, which are float32, in a bundle without further float32 graphs.
    """
    if precision == FLOAT32:
        return []
    graphs = {(graph.role, graph.split, graph.precision): root / graph.file for graph in manifest.graphs}
    rows = []
    once = [*PREFIXES.values()] if FLOAT32 not in manifest.precisions else []
    for role, split, own in [key for key in graphs if key[2] == precision or key[0] in once]:
        path = graphs[role, split, own]
        full = graphs.get((role, split, FLOAT32)) if own != FLOAT32 else None
        model, wanted = _load(path), _initializers(_load(full)) if full else {}
        traced_together, note = _names(model) <= set(wanted), ""
        if not traced_together:
            own_names = reference.weights(role).items()
            wanted = {prefix + name: array for name, array in own_names for prefix in WRAPPED}
            note = "only weights that PyTorch has by name: there is no float32 graph of the same trace"
        wrong = dict(_wrong(model, wanted, traced_together))
        worst = max(wrong, key=lambda weight: wrong[weight], default="")
        scope, count = f"{path.name}, against float32", float(sum(wrong.values()))
        rows.append(Measurement("weights", scope, "weights that differ", count, 0.0, where=worst, note=note))
    return rows


def _names(model: Any) -> set[str]:
    """Of the weights, as the float32 graph has them; the numbers of a quantization are not among them."""
    names = {tensor.name for tensor in model.graph.initializer}
    return {name.removesuffix(SUFFIX) for name in names if not name.endswith(CALIBRATED)}


def _wrong(model: Any, wanted: Weights, exact: bool) -> Iterator[tuple[str, int]]:
    """Name and number of wrong values of every weight that has some. exact: one without its like counts
    whole."""
    for name, array, tolerance in _stored(model):
        like = wanted.get(name.removesuffix(SUFFIX))
        if like is None or like.shape != array.shape:
            count = array.size if exact else 0
        elif tolerance is None:
            count = int((like.astype(array.dtype) != array).sum())
        else:
            count = int((np.abs(array - like) > tolerance).sum())
        if count:
            yield name, count


def _stored(model: Any) -> Iterator[tuple[str, npt.NDArray[Any], npt.NDArray[Any] | None]]:
    """Name and values of every weight; of a quantized one what it stands for, and how far rounding goes."""
    stored, quantized = _initializers(model), set[str]()
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            quantized.update(node.input)
            values, scale, zero = (stored[name] for name in node.input)
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            others = tuple(number for number in range(values.ndim) if number != axis % values.ndim)
            scale, zero = (np.expand_dims(one, others) if one.ndim else one for one in (scale, zero))
            step = np.abs(scale.astype(np.float64))
            yield node.input[0], (values.astype(np.float64) - zero) * step, (0.5 + TOLERANCE) * step + 1e-12
    for name, array in stored.items():
        # Those of activations are calibrated: only the outputs can tell.
        if name not in quantized and not name.endswith(CALIBRATED):
            yield name, array, None


def _load(path: Path) -> Any:
    import onnx

    return onnx.load(path)


def _initializers(model: Any) -> Weights:
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
