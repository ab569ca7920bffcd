"""The measured accuracy of a bundle's graphs, `parity/graphs.json`, as text: for `onnx`, `inspect` and the
model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddexport.runtime.bundle import Graph
from ddexport.runtime.records import read_json

ACCURACY_FILE = "parity/graphs.json"

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
ERROR_HEADINGS = ("batch", "output", "rms error", "largest", "tokens", "image")


def read_accuracy(bundle: Path) -> dict[str, Any]:
    """What the export measured of each graph, by the graph's file; empty where the bundle does not say."""
    path = bundle / ACCURACY_FILE
    return dict(read_json(path)) if path.is_file() else {}


def accuracy_lines(graph: Graph, accuracy: Mapping[str, Any]) -> list[str]:
    """All that is known of a graph: types, errors at each batch size, what was kept."""
    kept = ", ".join(graph.keep_fp32)
    return [
        f"{graph.file}: {summary(graph, accuracy)}",
        *([f"  kept in fp32: {kept}"] if kept else []),
        *(f"  {line}" for line in operator_table(accuracy["operators"])),
        f"  error against {accuracy['reference']} ({accuracy['oracle']})",
        *(f"  {line}" for line in error_table(accuracy["errors"])),
    ]


def summary(graph: Graph, accuracy: Mapping[str, Any]) -> str:
    """How much of the products computes in half, in words."""
    share = accuracy["half_share"]["weights"]
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
