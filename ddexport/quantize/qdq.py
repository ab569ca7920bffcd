"""A float32 graph and the ranges of its values in, a graph with quantised products out.

The quantiser is ONNX Runtime's; which products, and the ranges, are ours (`policy`, `calibration`). The form
is that of QuantizeLinear and DequantizeLinear pairs, which ONNX Runtime and OpenVINO both turn into integer
arithmetic: weights are int8, symmetric, with a scale for each output channel; what a product reads is uint8,
with one scale and zero point for the whole tensor; what it gives stays float32.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ddexport.graph.to_onnx import strip_trace
from ddexport.quantize.calibration import Ranges
from ddexport.quantize.policy import PRODUCTS


def quantised_model(path: Path, nodes: Sequence[str], ranges: Ranges) -> ir.Model:
    """The graph at `path` with int8 arithmetic in the named nodes.

    Args:
        path: a float32 graph, its weights in it or beside it.
        nodes: names of products whose second input is a weight.
        ranges: the smallest and largest number of every value that these products read, by its name.

    Producer, opset and metadata stay those of the graph.
    """
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    proto = onnx.load(path)
    producer, version = proto.producer_name, proto.producer_version
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    add_infer_metadata(proto)  # its values have types: else the quantiser writes and reads all to infer them
    extremes = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, extremes),
        nodes_to_quantize=list(nodes),
        nodes_to_exclude=[],
        op_types_to_quantize=list(PRODUCTS),
        extra_options={
            "WeightSymmetric": True,
            "ActivationSymmetric": False,
            "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
        },
    )
    with _quiet():
        quantizer.quantize_model()
    model: ir.Model = ir.from_proto(quantizer.model.model)
    _spare_others(model.graph, frozenset(nodes))
    model.graph.sort()
    model.producer_name, model.producer_version = producer, version
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    strip_trace(model)
    return model


def _spare_others(graph: ir.Graph, nodes: frozenset[str]) -> None:
    """The quantiser hands rounded values to all that read them; only the named nodes shall get them."""
    for node in graph:
        before = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        rounding = None if before is None else before.producer()
        if rounding is None:  # a weight
            continue
        for user, place in tuple(node.outputs[0].uses()):
            if user.name not in nodes:
                user.replace_input_with(place, rounding.inputs[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser warns on the root logger about choices that are made here on purpose."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
