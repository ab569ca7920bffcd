"""Writes graphs, their weights inside, beside them, or in one file for several graphs.

Why not the library: onnx and onnx-ir write one data file for one graph. The students of a bundle differ in
their split alone, and a bundle would hold their weights once for each.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

SMALL = 1024  # bytes; below that a tensor stays in the graph, where engines look for shapes and indices
ALIGNMENT = 1 << 12  # a page: engines map the file into memory
EXTERNAL_DATA_FROM = 1 << 30  # bytes; one protobuf message holds at most 2 GiB


class SharedWeights:
    """A file of weights that holds each array once, however many graphs name it.

    Arrays are told apart by their bytes, so graphs need not agree on names, shapes or order: a second graph
    of the same module adds only what it alone has.

    Args:
        path: the file; it must lie beside its graphs, as engines read no other place. Replaced if it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, tuple[int, int]] = {}
        path.write_bytes(b"")

    def take_from(self, model: ir.Model) -> None:
        """Moves the weights of the model into the file; the model then points at them."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < SMALL:
                continue
            offset, length = self._place(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                self.path.name,
                offset,
                length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name or value.name or "",
                base_dir=self.path.parent,
            )

    def _place(self, content: bytes) -> tuple[int, int]:
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            with self.path.open("ab") as stream:
                stream.write(bytes(-stream.tell() % ALIGNMENT))
                self._places[key] = stream.tell(), len(content)
                stream.write(content)
        return self._places[key]


def save_graph(model: ir.Model, path: Path, weights: SharedWeights | None = None) -> list[Path]:
    """Writes the graph to `path`, and its weights to `weights`, or to `path` + ".data" where they pass 1 GiB.

    Returns the files of the graph, itself first.
    """
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if weights is None and size > EXTERNAL_DATA_FROM:
        weights = SharedWeights(path.with_name(path.name + ".data"))
    if weights is not None:
        weights.take_from(model)
    ir.save(model, path)
    return [path] if weights is None else [path, weights.path]
