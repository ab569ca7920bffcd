"""How far a graph is from the float32 module, in the terms of `validate parity`, and how much of it computes
in half or in integers: what parity/graphs.json says of each graph (docs/precision.md)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ddexport.precision.policy import INT8
from ddexport.recipe import Limits
from ddexport.runtime.errors import VerificationError

Arrays = Mapping[str, np.ndarray]

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
"""The operators that the time goes into."""

TYPE_NAMES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}
QUANTISER = ("QuantizeLinear", "DequantizeLinear")
FIND_LAYER = (
    "`ddexport debug layers` on a float32 bundle of these weights finds where error enters: give that to"
    " --keep-fp32"
)
LARGEST_PSNR = 200.0  # of equal images, which JSON has no number for


@dataclass(frozen=True)
class OperatorCount:
    """How many nodes of an operator compute in a type, and how many weights they multiply with."""

    operator: str
    type: str
    nodes: int
    weights: int


@dataclass(frozen=True)
class OutputError:
    """One output at one batch size against float32.

    rms: rms error over rms of the reference in the worst row; of `sequence`, where it is regressed. largest:
    the largest difference. differing, excused: of `compared` tokens, those that are not float32's, and those
    among them that float32 itself was undecided about. psnr: of the worst image, dB. bits8: the largest
    difference of an 8-bit value.
    """

    output: str
    batch: int
    rms: float
    largest: float
    compared: int | None = None
    differing: int | None = None
    excused: int | None = None
    psnr: float | None = None
    bits8: int | None = None

    def faults(self, limits: Limits) -> list[str]:
        """What is past its limit, in words."""
        checks = {
            "logits": [
                ("largest error of a logit", self.largest, limits.token_margin, 1),
                ("tokens that differ", self.differing or 0, self.excused or 0, 1),
            ],
            "sequence": [("relative error of the embeddings", self.rms, limits.embedding_error, 1)],
            "image": [
                ("PSNR of an image", self.psnr or 0.0, limits.image_psnr, -1),
                ("largest 8-bit difference", self.bits8 or 0, limits.image_max, 1),
            ],
        }
        return [
            f"{what} {value:.3g} at batch {self.batch}, limit {limit:g}"
            for what, value, limit, sign in checks.get(self.output, ())
            if not sign * value <= sign * limit  # so that what is not a number fails
        ]


@dataclass(frozen=True)
class Accuracy:
    """What is known about one graph. `oracle`: what computed it."""

    oracle: str
    reference: str
    operators: tuple[OperatorCount, ...]
    errors: tuple[OutputError, ...]

    def half_share(self) -> dict[str, float]:
        """The share of the matrix products and convolutions that compute in less than float32: of nodes, of
        weights."""
        products = [count for count in self.operators if count.operator in PRODUCTS]
        half = [count for count in products if count.type != "fp32"]
        nodes, weights = sum(c.nodes for c in products), sum(c.weights for c in products)
        return {
            "nodes": sum(c.nodes for c in half) / max(nodes, 1),
            "weights": sum(c.weights for c in half) / max(weights, 1),
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for parity/graphs.json."""
        data = asdict(self)
        data["operators"] = [asdict(count) for count in self.operators]
        data["errors"] = [
            {key: value for key, value in asdict(error).items() if value is not None} for error in self.errors
        ]
        return {**data, "half_share": self.half_share()}


def operator_counts(path: Path) -> tuple[OperatorCount, ...]:
    """The graph's float nodes by operator and type; products between quantisers count as int8.

    Casts and the quantisers themselves are left out: they compute nothing.
    """
    nodes: defaultdict[tuple[str, str], int] = defaultdict(int)
    weights: defaultdict[tuple[str, str], int] = defaultdict(int)
    for node in ir.load(path).graph.all_nodes():
        kind = TYPE_NAMES.get(node.outputs[0].dtype)  # type: ignore[arg-type]
        if kind is None or node.op_type in ("Cast", *QUANTISER):
            continue
        product = node.op_type in PRODUCTS
        kind = INT8 if product and _is_quantised(node) else kind
        nodes[node.op_type, kind] += 1
        if product:
            weights[node.op_type, kind] += sum(_constant_size(value) for value in node.inputs[:2])
    return tuple(OperatorCount(*key, nodes[key], weights[key]) for key in sorted(nodes))


def _is_quantised(node: ir.Node) -> bool:
    producers = [None if value is None else value.producer() for value in node.inputs[:2]]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def _constant_size(value: ir.Value | None) -> int:
    """The number of elements of a weight, quantised or not; 0 of what is computed."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        value = producer.inputs[0]
    return 0 if value is None or value.const_value is None else value.const_value.size


def check_sane(got: Arrays, file: str) -> None:
    """Raises `VerificationError` for an output that is not finite, or an image or output that is constant."""
    batch = len(next(iter(got.values())))
    for name, value in got.items():
        rows = value.reshape(batch, -1)
        for row in range(batch):
            wrong = int((~np.isfinite(rows[row])).sum())
            what = f"holds {wrong} numbers that are not finite" if wrong else "is constant"
            if wrong or rows[row].min() == rows[row].max():
                raise VerificationError(
                    f"{file}: {name} {what} (row {row} of a batch of {batch})",
                    "nothing was written; `ddexport debug layers` on a float32 bundle of these weights finds"
                    " where it begins: give that to --keep-fp32, or take bf16",
                )


def output_errors(got: Arrays, wanted: Arrays, known: np.ndarray | None, margin: float) -> list[OutputError]:
    """The errors of all outputs of one batch.

    Args:
        got, wanted: the outputs by name, of the graph and of the float32 module.
        known: [B] the student's input, None for other graphs.
        margin: float32's own choice of a token counts as undecided below this difference of logits.
    """
    batch, errors = len(next(iter(got.values()))), []
    for name, value in wanted.items():
        error, rest = got[name].astype(np.float64) - value, {}
        mask = np.ones(value.shape[:2], dtype=bool)
        if name == "sequence" and known is not None:
            split = wanted["logits"].shape[1]
            mask = np.arange(value.shape[1]) >= np.maximum(known, split)[:, None]
        if name == "logits" and known is not None:
            rest = _tokens(got[name], value, known, margin)
        if name == "image":
            psnr = -10 * math.log10(max(float((error**2).reshape(batch, -1).mean(1).max()), 1e-20))
            bits = np.abs(_bits8(got[name]) - _bits8(value)).max()
            rest = {"psnr": min(psnr, LARGEST_PSNR), "bits8": int(bits)}
        rms = max(_rms(error[b][mask[b]]) / max(_rms(value[b][mask[b]]), 1e-30) for b in range(batch))
        errors.append(OutputError(name, batch, rms, float(np.abs(error[mask]).max(initial=0.0)), **rest))
    return errors


def check_limits(errors: Iterable[OutputError], limits: Limits, file: str, remedy: str = FIND_LAYER) -> None:
    """Raises `VerificationError` that names what is past its limit, and `remedy`."""
    faults = [fault for error in errors for fault in error.faults(limits)]
    if faults:
        raise VerificationError(
            f"{file} is too far from float32: {'; '.join(faults[:3])}", f"nothing was written; {remedy}"
        )


def _tokens(got: np.ndarray, wanted: np.ndarray, known: np.ndarray, margin: float) -> dict[str, int]:
    decided = np.arange(wanted.shape[1]) >= known[:, None]
    chosen = got.argmax(-1)
    differing = (chosen != wanted.argmax(-1)) & decided
    lost = wanted.max(-1) - np.take_along_axis(wanted, chosen[..., None], -1)[..., 0]
    return {
        "compared": int(decided.sum()),
        "differing": int(differing.sum()),
        "excused": int((differing & (lost < margin)).sum()),
    }


def _rms(values: np.ndarray) -> float:
    return math.sqrt(float(np.square(values, dtype=np.float64).mean())) if values.size else 0.0


def _bits8(image: np.ndarray) -> np.ndarray:
    return np.rint(image.astype(np.float64) * 255).clip(0, 255)
