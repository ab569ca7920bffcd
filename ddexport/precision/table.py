"""The measured accuracy of a bundle's graphs as text, read from the manifest: for `onnx`, `inspect` and the
model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ddexport.runtime.manifest import Graph

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
ERROR_HEADINGS = ("batch", "output", "rms error", "largest", "tokens", "image")


def accuracy_lines(graph: Graph) -> list[str]:
    """All that is known of a graph: types, errors at each batch size, what was kept. Empty if nothing is."""
    accuracy = graph.accuracy
    if not accuracy:
        return []
    kept = ", ".join(accuracy["keep_fp32"])
    return [
        f"{graph.file}: {summary(graph)}",
        *([f"  kept in fp32: {kept}"] if kept else []),
        *(f"  {line}" for line in operator_table(accuracy["operators"])),
        f"  error against {accuracy['reference']} ({accuracy['oracle']})",
        *(f"  {line}" for line in error_table(accuracy["errors"])),
    ]


def summary(graph: Graph) -> str:
    """How much of the products computes in half, in words."""
    share = graph.accuracy.get("half_share", {"weights": 0.0})["weights"]
    if not share:
        return "float32"
    return f"{share:.1%} of the weights of its products in {graph.precision}"


def operator_table(operators: Iterable[Mapping[str, Any]]) -> list[str]:
    """Nodes by operator and type; for products their weights too."""
    operators = list(operators)
    types = sorted({row["type"] for row in operators}, key=lambda name: (name == "fp32", name))
    cells = {(row["operator"], row["type"]): row for row in operators}
    names = sorted({row["operator"] for row in operators}, key=lambda name: (name not in PRODUCTS, name))
    rows = [["operator", *types]]
    for name in names:
        row = [name]
        for kind in types:
            cell = cells.get((name, kind), {"nodes": 0, "weights": 0})
            weights = f" ({cell['weights'] / 1e6:.1f} M weights)" if cell["weights"] else ""
            row.append(f"{cell['nodes']}{weights}")
        rows.append(row)
    return columns(rows)


def error_table(errors: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line a batch size and output."""
    rows = [list(ERROR_HEADINGS)]
    for error in errors:
        tokens = f"{error['differing']} of {error['compared']} differ" if "differing" in error else ""
        tokens += f", {error['excused']} excused" if error.get("excused") else ""
        image = f"{error['psnr']:.1f} dB, {error['bits8']} of 255" if "psnr" in error else ""
        cells = (error["batch"], error["output"], f"{error['rms']:.1e}", f"{error['largest']:.1e}")
        rows.append([*map(str, cells), tokens, image])
    return columns(rows)


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
