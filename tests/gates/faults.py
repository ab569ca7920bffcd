"""Faults that are planted into a copy of a bundle, with sizes and hashes made right again.

Only a comparison with PyTorch, or with what ships, can tell such a bundle from a good one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec import structs
from onnx import helper, numpy_helper

from ddexport.graph.pipeline import write_pipeline
from ddexport.runtime.bundle import file_info, read_manifest

Edit = Callable[[onnx.GraphProto], None]


def rehash(bundle: Path) -> None:
    """Makes every size and hash in bundle.json right."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    infos = [manifest["labels"], manifest["teacher"]["codebook"]]
    infos += [manifest["text"]["tokenizer"]] if manifest.get("text") else []
    for info in [*infos, *(file for graph in manifest["graphs"] for file in graph["files"])]:
        info.update(structs.asdict(file_info(bundle / info["file"], bundle)))
    path.write_text(json.dumps(manifest))


def in_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, str], None]:
    """A fault of bundle.json."""

    def plant(bundle: Path, precision: str) -> None:
        path = bundle / "bundle.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return plant


def in_graph(edit: Edit, role: str = "student") -> Callable[[Path, str], None]:
    """A fault of every graph of a role in one precision."""

    def plant(bundle: Path, precision: str) -> None:
        manifest = json.loads((bundle / "bundle.json").read_text())
        for graph in manifest["graphs"]:
            if (graph["role"], graph["precision"]) == (role, precision):
                path = bundle / graph["file"]
                model = onnx.load(path)  # with its external data, so that any weight can be changed
                edit(model.graph)
                path.unlink()  # a copy may be a hard link
                onnx.save(model, path)
                graph["files"] = [structs.asdict(file_info(path, bundle))]
        (bundle / "bundle.json").write_text(json.dumps(manifest))

    return plant


def in_codebook(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, str], None]:
    """A fault of codebook.npy, by which a teacher's schedules embed tokens."""

    def plant(bundle: Path, precision: str) -> None:
        path = bundle / "codebook.npy"
        table = change(np.load(path))
        path.unlink()
        np.save(path, table)
        rehash(bundle)

    return plant


def in_labels(bundle: Path, precision: str) -> None:
    """Two class names change places."""
    path = bundle / "labels.json"
    labels = json.loads(path.read_text())
    labels["names"][3], labels["names"][7] = labels["names"][7], labels["names"][3]
    path.unlink()
    path.write_text(json.dumps(labels))
    rehash(bundle)


def swapped(rows: np.ndarray) -> np.ndarray:
    """Two entries change places."""
    rows = rows.copy()
    rows[[3, 11]] = rows[[11, 3]]
    return rows


def initializer(graph: onnx.GraphProto, accept: Callable[[onnx.TensorProto], bool]) -> tuple[np.ndarray, Any]:
    """The first constant that is accepted, and how to put another array in its place."""
    tensor = next(tensor for tensor in graph.initializer if accept(tensor))

    def put(array: np.ndarray) -> None:
        tensor.CopyFrom(
            numpy_helper.from_array(array.astype(numpy_helper.to_array(tensor).dtype), tensor.name)
        )

    return numpy_helper.to_array(tensor).copy(), put


def constant(graph: onnx.GraphProto, name: str, value: Any, dtype: Any) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
    return name


def before_use(graph: onnx.GraphProto, value: str, nodes: list[onnx.NodeProto], result: str) -> None:
    """Everything that read the graph's input `value` reads `result` of the new nodes."""
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == value:
                node.input[place] = result
    for node in reversed(nodes):
        graph.node.insert(0, node)


def after_logits(graph: onnx.GraphProto, make: Callable[[str, str], list[onnx.NodeProto]]) -> None:
    """`make(raw, "logits")` gives the nodes between the head and everything that reads the logits."""
    index, producer = next((i, node) for i, node in enumerate(graph.node) if "logits" in node.output)
    producer.output[list(producer.output).index("logits")] = "raw_logits"
    for node in reversed(make("raw_logits", "logits")):
        graph.node.insert(index + 1, node)


def scaled_logits(graph: onnx.GraphProto) -> None:
    factor = constant(graph, "planted_factor", 0.9, np.float32)
    after_logits(graph, lambda raw, out: [helper.make_node("Mul", [raw, factor], [out])])


def every_eighth_code(graph: onnx.GraphProto) -> None:
    """Every eighth code is favoured by 1.4 logits."""
    codes = next(o for o in graph.output if o.name == "logits").type.tensor_type.shape.dim[2].dim_value
    bias = constant(graph, "planted_bias", 1.4 * (np.arange(codes) % 8 == 0), np.float32)
    after_logits(graph, lambda raw, out: [helper.make_node("Add", [raw, bias], [out])])


def runner_up(graph: onnx.GraphProto) -> None:
    """The second best token wherever the two best are less than 1.5 apart: their logits change places."""
    two = constant(graph, "planted_two", [2], np.int64)
    gap = constant(graph, "planted_gap", 1.5, np.float32)
    weights = constant(graph, "planted_difference", [[1.0], [-1.0]], np.float32)
    signs = constant(graph, "planted_signs", [-1.0, 1.0], np.float32)

    def nodes(raw: str, out: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("TopK", [raw, two], ["planted_values", "planted_codes"]),
            helper.make_node("MatMul", ["planted_values", weights], ["planted_margin"]),
            helper.make_node("Less", ["planted_margin", gap], ["planted_close"]),
            helper.make_node("Cast", ["planted_close"], ["planted_weight"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["planted_margin", "planted_weight"], ["planted_moved"]),
            helper.make_node("Mul", ["planted_moved", signs], ["planted_changes"]),
            helper.make_node("GatherElements", [raw, "planted_codes"], ["planted_old"], axis=-1),
            helper.make_node("Add", ["planted_old", "planted_changes"], ["planted_new"]),
            helper.make_node("ScatterElements", [raw, "planted_codes", "planted_new"], [out], axis=-1),
        ]

    after_logits(graph, nodes)


def swapped_classes(graph: onnx.GraphProto) -> None:
    """The student draws class 7 for 3, and 3 for 7."""
    table = constant(graph, "planted_classes", [0, 1, 2, 7, 4, 5, 6, 3, 8, 9], np.int64)
    before_use(
        graph, "label", [helper.make_node("Gather", [table, "label"], ["planted_label"])], "planted_label"
    )


def negated_noise(graph: onnx.GraphProto) -> None:
    before_use(graph, "latents", [helper.make_node("Neg", ["latents"], ["planted"])], "planted")


def next_token(graph: onnx.GraphProto) -> None:
    """The tokens that are told are not those that the sequence was made from."""
    producer = next(node for node in graph.node if "tokens" in node.output)
    readers = [node for node in graph.node if "tokens" in node.input]
    producer.output[list(producer.output).index("tokens")] = "raw_tokens"
    for node in readers:
        node.input[list(node.input).index("tokens")] = "raw_tokens"
    one = constant(graph, "planted_one", 1, np.int64)
    graph.node.append(helper.make_node("BitwiseXor", ["raw_tokens", one], ["tokens"]))


def perturbed_weight(graph: onnx.GraphProto) -> None:
    """One number of a matrix in a block's attention, by twice the largest of it."""
    _perturb(graph, [t for t in graph.initializer if len(t.dims) == 2 and min(t.dims) >= 96])


def perturbed_kernel(graph: onnx.GraphProto) -> None:
    """One number of a convolution's kernel, likewise."""
    _perturb(graph, [t for t in graph.initializer if len(t.dims) == 4 and t.dims[0] >= 24])


def _perturb(graph: onnx.GraphProto, tensors: list[onnx.TensorProto]) -> None:
    types = ("FLOAT", "FLOAT16", "BFLOAT16", "INT8")
    accepted = {getattr(onnx.TensorProto, name) for name in types}
    wide = [tensor for tensor in tensors if tensor.data_type in accepted]
    name = wide[len(wide) // 2].name
    array, put = initializer(graph, lambda tensor: tensor.name == name)
    if array.dtype == np.int8:
        array.flat[array.size // 2] = -127 if array.flat[array.size // 2] > 0 else 127
    else:
        array.flat[array.size // 2] += 2 * np.abs(array).max()
    put(array)


def swapped_codes(graph: onnx.GraphProto) -> None:
    """Two entries of the table that the student embeds its tokens by."""
    for node in (node for node in graph.node if node.op_type.startswith("Gather")):
        tensor = next((t for t in graph.initializer if t.name == node.input[0] and len(t.dims) == 2), None)
        if tensor is not None and tensor.dims[0] in (128, 256) and tensor.dims[1] == 8:
            array, put = initializer(graph, lambda t, name=tensor.name: t.name == name)
            put(swapped(array))
            return
    raise AssertionError("no codebook in the graph")


def brighter(graph: onnx.GraphProto) -> None:
    """Half of the range on every pixel."""
    array, put = initializer(graph, lambda t: t.name.endswith("conv_out.bias"))
    put(array + 0.5)


def counted_once_more(graph: onnx.GraphProto) -> None:
    """A text counts as one row longer than it is."""
    node = next(node for node in graph.node if node.op_type == "Log")
    one = constant(graph, "planted_one", 1, np.float32)
    graph.node.insert(
        list(graph.node).index(node), helper.make_node("Add", [node.input[0], one], ["planted"])
    )
    node.input[0] = "planted"


def without_last_row(graph: onnx.GraphProto) -> None:
    """The last row of a text is missing in the means of its values."""
    sums = [node for node in graph.node if node.op_type == "CumSum"]
    for node in sums[1:]:  # the first counts the rows
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("exclusive", 1))


def without_count(graph: onnx.GraphProto) -> None:
    """A text weighs as one row, however long it is."""
    zero = constant(graph, "planted_zero", 0, np.float32)
    before_use(graph, "log_count", [helper.make_node("Mul", ["log_count", zero], ["planted"])], "planted")


def whole_null_text(graph: onnx.GraphProto) -> None:
    """The null text has all its rows, and not those of the prompt's mask."""
    node = next(node for node in graph.node if list(node.input) == ["features_mask"] * 2)
    one = constant(graph, "planted_one", 1, np.int64)
    graph.node.insert(0, helper.make_node("Max", ["features_mask", one], ["planted"]))
    node.input[1] = "planted"


def swapped_tokens(graph: onnx.GraphProto, first: int = 4, second: int = 18) -> None:
    """Two tokens of the text encoder."""
    array, put = initializer(graph, lambda tensor: "embed_tokens" in tensor.name)
    array[[first, second]] = array[[second, first]]
    put(array)


def in_tokenizer(bundle: Path, precision: str) -> None:
    """Two entries of the vocabulary change places."""
    path = bundle / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary[4], vocabulary[18] = vocabulary[18], vocabulary[4]
    path.unlink()
    path.write_text(json.dumps(data))
    rehash(bundle)


def without_encoder(bundle: Path, precision: str = "fp32") -> None:
    """No fault: a bundle that draws from features."""

    def change(manifest: dict[str, Any]) -> None:
        del manifest["text"]["tokenizer"]
        manifest["graphs"] = [one for one in manifest["graphs"] if one["role"] != "text_encoder"]
        files = manifest["weights"]["files"]
        manifest["weights"]["files"] = [one for one in files if one["role"] != "text_encoder"]

    in_manifest(change)(bundle, precision)


def without_student(bundle: Path, precision: str = "fp32") -> None:
    """No fault: the teacher alone, as the text model is published."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["schedules"] = {}
        kept = [one for one in manifest["graphs"] if one["role"] not in ("student", "text_prefix")]
        files = [one for one in manifest["weights"]["files"] if one["role"] != "student"]
        manifest["graphs"], manifest["weights"]["files"] = kept, files
        recipe = manifest["recipe"]
        del recipe["schedules"], recipe["files"]["student"], recipe["condition"]["vector"]

    in_manifest(change)(bundle, precision)


def one_graph(said: str) -> Callable[[Path, str], None]:
    """Adds a pipeline of one step with the small decoder, of which the manifest says `said`."""

    def plant(bundle: Path, precision: str) -> None:
        manifest = read_manifest(bundle)
        pipeline = write_pipeline(bundle, manifest, 1, precision, "small")
        pipelines = (structs.replace(pipeline, decoder=said),)
        (bundle / "bundle.json").write_text(structs.replace(manifest, pipelines=pipelines).to_json())

    return plant
