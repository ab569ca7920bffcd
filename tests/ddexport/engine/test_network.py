"""An engine computes in the precision asked for: a float32 graph would build without a word."""

from __future__ import annotations

from pathlib import Path
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
from ddexport.runtime.bundle import Graph, TensorSpec, read_manifest
from ddexport.runtime.errors import BundleError, VerificationError

HALVES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
STUDENT = {
    "fp32": {("product", "float32"): 3},
    "fp16": {("product", "float16"): 2, ("product", "float32"): 1},
    "bf16": {("product", "bfloat16"): 2, ("product", "float32"): 1},
}


def test_nodes_are_counted_in_the_graph(toy_bundle: Any) -> None:
    """Protects the reading of the ONNX graph, with its weights inside and outside of it."""
    for external in (False, True):
        folder = toy_bundle(f"external-{external}", external=external)
        for precision, half in HALVES.items():
            graph = read_manifest(folder).graph("student", precision)
            assert layers_of_onnx(folder, graph) == STUDENT[precision]
            decoder = read_manifest(folder).graph("decoder", precision)
            assert layers_of_onnx(folder, decoder) == {("product", half): 1, ("convolution", half): 1}
    assert by_type({("product", "a"): 1, ("convolution", "b"): 2, ("product", "b"): 3}) == {"b": 5, "a": 1}


@pytest.mark.parametrize("place", ["/etc/hostname", "../outside.data", "unlisted.data"])
def test_weights_from_elsewhere_are_refused(toy_bundle: Any, place: str) -> None:
    """Protects the key, which would not see them change, and files that are nobody's weights."""
    folder = toy_bundle(external=True)
    graph = read_manifest(folder).graph("student", "fp16")
    model = onnx.load(folder / graph.file, load_external_data=False)
    for entry in model.graph.initializer[-1].external_data:
        if entry.key == "location":
            entry.value = place
    (folder / graph.file).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="which the manifest does not list"):
        layers_of_onnx(folder, graph)


def parsed(rtx: TensorRT, path: Path) -> tuple[Any, ...]:
    trt = rtx.module
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse_from_file(str(path))
    return network, parser, builder  # the network lives no longer than these


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", STUDENT)
def test_the_real_network_has_types_and_tensors_of_the_graph(
    toy_bundle: Any, rtx: TensorRT, precision: str
) -> None:
    """Protects the claim that strong typing holds, and the runtime, which binds by name, type and shape."""
    folder = toy_bundle()
    manifest = read_manifest(folder)
    for role in ("student", "decoder"):
        graph = manifest.graph(role, precision)
        network, *_alive = parsed(rtx, folder / graph.file)
        in_network = layers_of_network(network)
        assert in_network == layers_of_onnx(folder, graph)
        check_precision(graph, layers_of_onnx(folder, graph), in_network)
        inputs, outputs = manifest.tensors(graph)
        check_contract(graph, inputs, outputs, network)
        with pytest.raises(VerificationError, match="outputs"):
            check_contract(graph, inputs, outputs[:-1], network)
        for lie in (
            TensorSpec(inputs[0].name, "int64", inputs[0].shape),
            TensorSpec("class", inputs[0].dtype, inputs[0].shape),
            TensorSpec(inputs[0].name, inputs[0].dtype, (*inputs[0].shape, 1)),
        ):
            with pytest.raises(VerificationError, match="but the manifest says"):
                check_contract(graph, (lie, *inputs[1:]), outputs, network)


@pytest.fixture
def fp16(toy_bundle: Any) -> Graph:
    return read_manifest(toy_bundle()).graph("student", "fp16")


@pytest.mark.parametrize(
    "layers",
    [
        {("product", "float32"): 3},
        {("product", "float16"): 1, ("product", "float32"): 2},
        {("product", "float16"): 2, ("product", "bfloat16"): 1},
        {("product", "float16"): 9, ("product", "float16/float32"): 1},
        {},
    ],
    ids=["all float32", "mostly float32", "another half", "mixed in one layer", "nothing"],
)
def test_what_is_not_fp16_is_not_called_so(fp16: Graph, layers: dict[tuple[str, str], int]) -> None:
    """Protects against an engine named fp16 that computes in something else, read from graph and network."""
    good = STUDENT["fp16"]
    with pytest.raises(VerificationError, match="fp16 was asked for, but the graph") as caught:
        check_precision(fp16, layers, layers)
    assert "--precision fp16" in caught.value.hint
    with pytest.raises(VerificationError, match="fp16 was asked for, but TensorRT's network"):
        check_precision(fp16, good, layers)
    check_precision(fp16, good, good)


def test_other_lies_about_types(fp16: Graph) -> None:
    """Protects --keep-fp32, with which fewer half layers are no lie, the float32 engine that others are held
    against, and against a parser that widens or narrows one layer behind the graph's back."""
    few, none = {("product", "float16"): 1, ("product", "float32"): 8}, {("product", "float32"): 9}
    kept = replace(fp16, keep_fp32=("blocks.*",))
    check_precision(kept, few, few)
    for graph, layers in ((kept, none), (fp16, few), (replace(fp16, precision="fp32"), STUDENT["fp16"])):
        with pytest.raises(VerificationError, match="was asked for"):
            check_precision(graph, layers, layers)
    with pytest.raises(VerificationError, match="did not take over the types"):
        check_precision(fp16, STUDENT["fp16"], {("product", "float16"): 3})
