"""An engine computes in the precision asked for: a float32 graph would build without a word."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from msgspec.structs import replace

from ddexport.engine.module import TensorRT
from ddexport.engine.network import (
    by_type,
    check_contract,
    check_precision,
    layers_of_network,
    layers_of_onnx,
)
from ddexport.runtime.bundle import Graph, read_manifest
from ddexport.runtime.contract import TensorSpec
from ddexport.runtime.errors import BundleError, VerificationError

STUDENT = {
    "fp32": {("product", "float32"): 3},
    "fp16": {("product", "float16"): 2, ("product", "float32"): 1},
    "bf16": {("product", "bfloat16"): 2, ("product", "float32"): 1},
}
DECODER = {
    precision: {("product", name): 1, ("convolution", name): 1}
    for precision, name in (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16"))
}


def test_weights_from_elsewhere_are_refused(toy_bundle: Any) -> None:
    """The key would not see them change. Those that the manifest lists are not read."""
    folder = toy_bundle(external=True)
    graph = read_manifest(folder).graph("student", "fp16")
    assert layers_of_onnx(folder, graph) == STUDENT["fp16"]
    model = onnx.load(folder / graph.file, load_external_data=False)
    for place in ("/etc/hostname", "../outside.data", "unlisted.data"):
        entries = {entry.key: entry for entry in model.graph.initializer[-1].external_data}
        entries["location"].value = place
        (folder / graph.file).write_bytes(model.SerializeToString())
        with pytest.raises(BundleError):
            layers_of_onnx(folder, graph)


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", STUDENT)
def test_the_real_network_has_types_and_tensors_of_the_graph(
    toy_bundle: Any, rtx: TensorRT, precision: str
) -> None:
    """Strong typing holds, and the runtime can bind by name, type and shape."""
    folder, trt = toy_bundle(), rtx.module
    manifest = read_manifest(folder)
    for role in ("student", "decoder"):
        graph = manifest.graph(role, precision)
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, builder.logger)  # the network lives no longer than these
        assert parser.parse_from_file(str(folder / graph.file))
        in_graph, in_network = layers_of_onnx(folder, graph), layers_of_network(network)
        assert in_network == in_graph == (STUDENT if role == "student" else DECODER)[precision]
        check_precision(graph, in_graph, in_network)
        inputs, outputs = manifest.tensors(graph)
        check_contract(graph, inputs, outputs, network)
        first = inputs[0]
        for lie in (
            TensorSpec(first.name, "int64", first.shape),
            TensorSpec("class", first.dtype, first.shape),
            TensorSpec(first.name, first.dtype, (*first.shape, 1)),
        ):
            with pytest.raises(VerificationError, match="inputs"):
                check_contract(graph, (lie, *inputs[1:]), outputs, network)
        with pytest.raises(VerificationError, match="outputs"):
            check_contract(graph, inputs, outputs[:-1], network)


@pytest.fixture
def fp16(toy_bundle: Any) -> Graph:
    return read_manifest(toy_bundle()).graph("student", "fp16")


def test_what_is_not_fp16_is_not_called_so(fp16: Graph) -> None:
    """All or most in float32, another half, mixed in one layer, nothing: read from the graph, or from the
    network alone."""
    good = STUDENT["fp16"]
    check_precision(fp16, good, good)
    assert by_type({("product", "a"): 1, ("convolution", "b"): 2, ("product", "b"): 3}) == {"b": 5, "a": 1}
    for layers in (
        {("product", "float32"): 3},
        {("product", "float16"): 1, ("product", "float32"): 2},
        {("product", "float16"): 2, ("product", "bfloat16"): 1},
        {("product", "float16"): 9, ("product", "float16/float32"): 1},
        {},
    ):
        with pytest.raises(VerificationError, match="asked for, but the graph"):
            check_precision(fp16, layers, layers)
        with pytest.raises(VerificationError, match="asked for, but TensorRT"):
            check_precision(fp16, good, layers)


def test_other_lies_about_types(fp16: Graph) -> None:
    """With --keep-fp32 fewer half layers are no lie, but none are; a float32 engine has no half layer; and no
    layer is widened behind the graph's back."""
    few, none = {("product", "float16"): 1, ("product", "float32"): 8}, {("product", "float32"): 9}
    kept = replace(fp16, keep_fp32=("blocks.*",))
    check_precision(kept, few, few)
    for graph, layers in ((kept, none), (replace(fp16, precision="fp32"), STUDENT["fp16"])):
        with pytest.raises(VerificationError):
            check_precision(graph, layers, layers)
    with pytest.raises(VerificationError):
        check_precision(fp16, STUDENT["fp16"], {("product", "float16"): 3})
