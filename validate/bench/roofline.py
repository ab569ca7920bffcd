"""How much arithmetic an image takes, and how much this machine does at its best.

The peak is the largest rate of a square matrix product, by precision: the best over the installed engines
that can multiply. It is the roof that every row's own rate is held against, so it is measured in the same
run, with the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ddexport.graph.flops import count
from ddexport.runtime.bundle import TEACHER, Manifest, Schedule
from ddexport.runtime.errors import BackendError, BundleError

Product = Callable[[], Any]
SIZE = 2048
SECONDS = 0.4  # for each engine and precision: enough for ten products at 100 GFLOP/s


Peak: TypeAlias = "float | str"  # GFLOP/s, or what stands in the way of measuring them
Peaks: TypeAlias = Mapping[tuple[int, str], Peak]  # by threads and precision


def flops_of(
    root: Path, manifest: Manifest, schedule: Schedule, precision: str | None = None
) -> dict[str, float]:
    """Operations of one image by part, and in all. Raises CountError.

    precision: of the graphs to count; the bundle's first where it is None, or has not all of the graphs. A
    teacher's products with its cache count the whole length of the cache, as the graph computes them.
    """
    parts: dict[str, float] = {}

    def file(role: str, split: int | None = None) -> Path:
        try:
            return root / manifest.graph(role, precision, split).file
        except BundleError:
            return root / manifest.graph(role, None, split).file

    if schedule.known:
        parts["student"] = len(schedule.known) * _flops(file("student", schedule.split), (("batch", 1),))
    span, teacher = schedule.teacher, manifest.teacher
    if span is not None and teacher is not None:
        filled, total = 0, 0
        for _, end in teacher.steps(span):
            sizes = (("batch", 1), ("new", end - filled), ("capacity", span.end))
            total, filled = total + _flops(file(TEACHER), sizes), end
        parts[TEACHER] = total
    parts["decoder"] = _flops(file("decoder"), (("batch", 1),))
    return {**parts, "total": sum(parts.values())}


@cache
def _flops(file: Path, sizes: tuple[tuple[str, int], ...]) -> int:
    flops: int = count(file, dict(sizes)).flops
    return flops


def rate_of(engine: str, precision: str, threads: int, size: int = SIZE, seconds: float = SECONDS) -> float:
    """GFLOP/s of one engine. Raises BackendError if it does not multiply in that precision, and whatever an
    engine raises that is missing or lacks a kernel."""
    product = ENGINES[engine](precision, size, threads)
    if product is None:
        raise BackendError("it does not multiply in this precision")
    return 2 * size**3 / fastest(product, seconds) / 1e9


def best_of(rates: Iterable[Peak]) -> Peak:
    """The largest; without any, all obstacles."""
    known = list(rates)
    obstacles = "; ".join(rate for rate in known if isinstance(rate, str))
    return max((rate for rate in known if not isinstance(rate, str)), default=obstacles)


def fastest(product: Product, seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest time of a product, tried for so many seconds after one that warms up."""
    product()
    spent: list[float] = []
    while not spent or sum(spent) < seconds:
        start = clock()
        product()
        spent.append(clock() - start)
    return min(spent)


def _numpy(precision: str, size: int, threads: int) -> Product | None:
    """By the threads that its environment says: numpy cannot be told."""
    if precision != "fp32":
        return None
    first, second = _matrices(size)
    return lambda: np.matmul(first, second)


def _torch(precision: str, size: int, threads: int) -> Product | None:
    import torch

    torch.set_num_threads(threads)
    first, second = (torch.from_numpy(matrix) for matrix in _matrices(size))
    if precision == "int8":
        left, right = ((matrix * 40).to(torch.int8) for matrix in (first, second))
        return lambda: torch._int_mm(left, right)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    first, second = first.to(dtype), second.to(dtype)
    return lambda: torch.matmul(first, second)


def _onnxruntime(precision: str, size: int, threads: int) -> Product | None:
    import onnxruntime

    if precision == "bf16":
        return None  # its kernels for CPUs have none
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        _graph(precision, size).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {"x": _matrices(size)[0]}
    return lambda: session.run(None, feeds)


def _openvino(precision: str, size: int, threads: int) -> Product | None:
    import openvino

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return None
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.read_model(_graph(precision, size).SerializeToString(), b"")
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    feeds = {"x": _matrices(size)[0]}  # held by the product: a shared tensor does not keep its array alive
    return lambda: request.infer(feeds, share_inputs=True)


ENGINES: dict[str, Callable[[str, int, int], Product | None]] = {
    "numpy": _numpy,
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def _matrices(size: int) -> tuple[Any, Any]:
    first, second = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    return first, second


def _graph(precision: str, size: int) -> Any:
    """y = x @ w; in int8 with the quantisation of both around it, which engines fuse into an integer product.

    Its rate counts the time of quantising x, some percent: it is what a graph can reach.
    """
    from onnx import TensorProto, helper, numpy_helper

    weight = _matrices(size)[1]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in ("x", "y")]
    nodes, stored = [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}
    if precision == "int8":
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "middle"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "scale", "middle"], ["xd"]),
            helper.make_node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"]),
            helper.make_node("MatMul", ["xd", "wd"], ["y"]),
        ]
        stored = {
            "wq": np.clip(np.rint(weight / 0.04), -127, 127).astype(np.int8),
            "scale": np.float32(0.04),
            "middle": np.uint8(128),
            "zero": np.int8(0),
        }
    arrays = [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
