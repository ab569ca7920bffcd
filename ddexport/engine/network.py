"""What a network must have: the types that were asked for, and the contract's inputs and outputs.

TensorRT 11 and TensorRT-RTX compute in the types that the graph states, and TensorRT 10 is told to. So an
engine has the precision that its graph has, whatever its name says. Hence three readings are compared before
the build: the precision asked for, the ONNX graph, and the network that TensorRT made of it.

Why not `polygraphy inspect model`: it prints layers, and does not count them by type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ddexport.runtime.bundle import Graph
from ddexport.runtime.contract import TensorSpec
from ddexport.runtime.errors import BundleError, VerificationError

TYPE_OF_PRECISION = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LEAST_SHARE = 0.5
"""Of the layers that compute, how many must do so in a half precision. The policy of the exporter keeps a few
matrix products in float32, among them the heads, and never as many as half."""

Layers = Mapping[tuple[str, str], int]
"""(kind, type) -> number of layers; a kind is `product` or `convolution`."""

_KINDS = {"MatMul": "product", "Gemm": "product", "Einsum": "product", "Conv": "convolution",
          "ConvTranspose": "convolution"}  # fmt: skip
_NETWORK_KINDS = {"MATRIX_MULTIPLY": "product", "EINSUM": "product", "CONVOLUTION": "convolution",
                  "DECONVOLUTION": "convolution"}  # fmt: skip
_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # TensorRT's names; ONNX has FLOAT too
_BIG = 1 << 12  # bytes; smaller constants may be shapes, which type inference wants to see


def layers_of_onnx(root: Path, graph: Graph) -> Layers:
    """Counts the nodes of a graph of the bundle `root` that compute, by type. Reads no external data.

    Raises BundleError for what is not an ONNX graph, and for external data that the manifest does not list:
    its hash would be in no key.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(root / graph.file), load_external_data=False)
    except DecodeError as error:
        raise BundleError(f"{graph.file} is not an ONNX graph", "export the bundle again") from error
    listed = {info.file for info in graph.files}
    for tensor in _tensors_of(model.graph):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in listed:
                raise BundleError(
                    f"{graph.file} takes weights from {entry.value!r}, which the manifest does not list",
                    "export the bundle again",
                )
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > _BIG:
            tensor.raw_data = b""  # inference copies the model, weights and all
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        types[value.name] = value.type.tensor_type.elem_type
    counts: Counter[tuple[str, str]] = Counter()
    for node in inferred.node:
        if node.op_type in _KINDS and node.domain in ("", "ai.onnx"):
            # These operators give what they take; inference stops where a shape lies in external data.
            dtype = next(filter(None, (types.get(name) for name in (*node.output, *node.input))), 0)
            counts[_KINDS[node.op_type], _type_name(onnx.TensorProto.DataType.Name(dtype))] += 1
    return counts


def layers_of_network(network: Any) -> Layers:
    """Counts the layers of a TensorRT network definition that compute, by type.

    A layer whose operand has another type than its result counts under both names, as `float16/float32`.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if kind := _NETWORK_KINDS.get(layer.type.name):
            names = (_type_name(tensor.dtype.name) for tensor in (layer.get_input(0), layer.get_output(0)))
            counts[kind, "/".join(dict.fromkeys(names))] += 1
    return counts


def by_type(layers: Layers) -> dict[str, int]:
    """The number of layers in each type, whatever their kind, the most frequent first."""
    total: Counter[str] = Counter()
    for (_, name), count in layers.items():
        total[name] += count
    return dict(total.most_common())


def check_precision(graph: Graph, onnx_layers: Layers, network_layers: Layers) -> None:
    """Raises `VerificationError` unless graph and network compute alike, and in the precision asked for."""
    asked = TYPE_OF_PRECISION[graph.precision]
    # Whoever kept modules in float32 with --keep-fp32 knows that fewer are in half precision.
    least = 0.0 if graph.keep_fp32 or asked == "float32" else LEAST_SHARE
    readings = {f"the graph {graph.file}": onnx_layers, f"TensorRT's network of {graph.file}": network_layers}
    for where, layers in readings.items():
        counts = by_type(layers)
        share = counts.get(asked, 0) / max(sum(counts.values()), 1)
        if not share or share < least or set(counts) - {asked, "float32"}:
            raise VerificationError(
                f"{graph.precision} was asked for, but {where} computes in {_text(layers)}",
                f"export it again: ddexport onnx MODEL --precision {graph.precision} --force",
            )
    if onnx_layers != network_layers:
        raise VerificationError(
            f"TensorRT did not take over the types of {graph.file}: the graph has {_text(onnx_layers)},"
            f" the network {_text(network_layers)}",
            "no engine was built; please report this with the versions that `ddexport doctor` prints",
        )


def check_contract(
    graph: Graph, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], network: Any
) -> None:
    """Raises `VerificationError` unless names, types and shapes are those of the contract, int64 included."""
    for side, contract, tensors in (
        ("inputs", inputs, [network.get_input(index) for index in range(network.num_inputs)]),
        ("outputs", outputs, [network.get_output(index) for index in range(network.num_outputs)]),
    ):
        have = sorted(f"{t.name} {_type_name(t.dtype.name)}{list(t.shape)}" for t in tensors)
        want = sorted(f"{name} {dtype}{[-1, *shape[1:]]}" for name, dtype, shape in contract)
        if have != want:
            raise VerificationError(
                f"TensorRT's network of {graph.file} has the {side} {', '.join(have)},"
                f" but the manifest says {', '.join(want)}",
                "the graph does not match the manifest: export the bundle again",
            )


def _tensors_of(graph: Any) -> Iterator[Any]:
    """Every constant of a graph, also those in nodes and in their subgraphs."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors_of(inner)


def _type_name(name: str) -> str:
    return _TYPES.get(name, name.lower())


def _text(layers: Layers) -> str:
    return ", ".join(f"{n} {kind}s in {name}" for (kind, name), n in sorted(layers.items())) or "nothing"
