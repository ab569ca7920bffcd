"""Passes over a traced graph. Each keeps the graph's contract and numbers, and returns whether it changed
anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def strip_trace(model: ir.Model) -> bool:
    """Removes what the tracer notes about itself, so that a graph says nothing about the machine it was made
    on.

    1. Nodes, values and the graph lose their metadata (stack traces with file paths, module names) and doc
    strings.
    2. Inputs, outputs, initialisers, operators and attributes stay as they are.
    3. A second run changes nothing.
    """
    changed = False
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        values.extend(node.outputs)
        changed |= _clear(node)
    for owner in (*values, model.graph):
        changed |= _clear(owner)
    return changed


def _clear(owner: ir.Node | ir.Value | ir.Graph) -> bool:
    changed = bool(owner.metadata_props) or bool(owner.doc_string)
    owner.metadata_props.clear()
    owner.doc_string = None
    return changed
