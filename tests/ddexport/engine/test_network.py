"""An engine computes in the precision asked for: a float32 graph would build without a word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from ddexport.runtime.errors import BundleError, VerificationError
from ddexport.runtime.manifest import Graph, TensorSpec, read_manifest

from ddexport.engine.builder import BuildError
from ddexport.engine.module import TensorRT
from ddexport.engine.network import (
    by_type,
    check_contract,
    check_precision,
    layers_of_network,
    layers_of_onnx,
)

STUDENT = {
    "fp32": {("product", "float32"): 3},
    "fp16": {("product", "float16"): 2, ("product", "float32"): 1},
    "bf16": {("product", "bfloat16"): 2, ("product", "float32"): 1},
}


@pytest.mark.parametrize("precision", STUDENT)
def test_nodes_are_counted_in_the_graph(toy_bundle: Any, precision: str) -> None:
    """Protects the reading of the ONNX graph, with its weights inside and outside of it."""
    for external in (False, True):
        folder = toy_bundle(f"external-{external}", external=external)
        graph = read_manifest(folder).graph("student", precision)
        assert layers_of_onnx(folder, graph) == STUDENT[precision]
        decoder = read_manifest(folder).graph("decoder", precision)
        half = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
        assert layers_of_onnx(folder, decoder) == {("product", half): 1, ("convolution", half): 1}


@pytest.mark.parametrize("place", ["/etc/hostname", "../outside.data", "unlisted.data"])
def test_weights_from_elsewhere_are_refused(toy_bundle: Any, place: str) -> None:
    """Protects the cache key, which would not see them change, and files that are nobody's weights."""
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
def test_the_real_network_has_the_types_of_the_graph(toy_bundle: Any, rtx: TensorRT, precision: str) -> None:
    """Protects the claim that strong typing holds, and that int64 inputs stay int64."""
    folder = toy_bundle()
    for role in ("student", "decoder"):
        graph = read_manifest(folder).graph(role, precision)
        network, *_alive = parsed(rtx, folder / graph.file)
        in_network = layers_of_network(network)
        assert in_network == layers_of_onnx(folder, graph)
        check_precision(graph, layers_of_onnx(folder, graph), in_network)
        check_contract(graph, network)
        inputs = {
            network.get_input(i).name: network.get_input(i).dtype.name for i in range(network.num_inputs)
        }
        if role == "student":
            assert inputs == {"tokens": "FLOAT", "label": "INT64", "known": "INT64"}


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


def test_what_a_user_kept_in_float32_is_no_lie(fp16: Graph) -> None:
    """Protects --keep-fp32: fewer half layers are allowed where the manifest says so, none never."""
    few, none = {("product", "float16"): 1, ("product", "float32"): 8}, {("product", "float32"): 9}
    kept = replace(fp16, accuracy={"keep_fp32": ["blocks.*"]})
    check_precision(kept, few, few)
    with pytest.raises(VerificationError, match="fp16 was asked for"):
        check_precision(kept, none, none)
    with pytest.raises(VerificationError, match="fp16 was asked for"):
        check_precision(replace(fp16, accuracy={"keep_fp32": []}), few, few)


def test_half_layers_are_not_called_fp32(fp16: Graph) -> None:
    """Protects the float32 engine, the one that others are held against."""
    with pytest.raises(VerificationError, match="fp32 was asked for"):
        check_precision(replace(fp16, precision="fp32"), STUDENT["fp16"], STUDENT["fp16"])


def test_a_single_layer_that_changed_its_type_is_found(fp16: Graph) -> None:
    """Protects against a parser that widens or narrows one layer behind the graph's back."""
    changed = {("product", "float16"): 3}
    with pytest.raises(VerificationError, match="did not take over the types"):
        check_precision(fp16, STUDENT["fp16"], changed)


def test_layers_are_summed_by_type() -> None:
    """Protects what the sidecar says of an engine."""
    layers = {("product", "float32"): 1, ("convolution", "float16"): 2, ("product", "float16"): 3}
    assert by_type(layers) == {"float16": 5, "float32": 1}


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    "lie",
    [
        TensorSpec("label", "float32", ("batch",)),
        TensorSpec("class", "int64", ("batch",)),
        TensorSpec("label", "int64", ("batch", 1)),
    ],
    ids=["type", "name", "shape"],
)
def test_other_tensors_than_the_contract_are_refused(toy_bundle: Any, rtx: TensorRT, lie: TensorSpec) -> None:
    """Protects the runtime, which binds by name, type and shape."""
    folder = toy_bundle()
    graph = read_manifest(folder).graph("student", "fp32")
    network, *_alive = parsed(rtx, folder / graph.file)
    tokens, _, known = graph.inputs
    with pytest.raises(VerificationError, match="but the contract says"):
        check_contract(replace(graph, inputs=(tokens, lie, known)), network)
    with pytest.raises(VerificationError, match="outputs"):
        check_contract(replace(graph, outputs=graph.outputs[:1]), network)


def test_build_errors_are_not_verification_errors() -> None:
    """Protects the exit codes: 3 is for what differs, 1 for what failed."""
    assert VerificationError.exit_code == 3 and BuildError.exit_code == 1
