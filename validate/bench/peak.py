"""What this machine multiplies at its best: the largest rate of a square matrix product, by precision.

The best over the installed engines that can multiply: numpy, PyTorch, ONNX Runtime, OpenVINO. It is the roof
that every row's own rate is held against, so it is measured in the same run, with the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

Product = Callable[[], Any]
SIZE = 2048
SECONDS = 0.4  # for each engine and precision: enough for ten products at 100 GFLOP/s
PRECISIONS = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Peak:
    """gflops: the largest rate, by which engine; None with the reason if nothing could be measured."""

    precision: str
    gflops: float | None
    engine: str = ""
    why: str = ""


class PeakSession:
    """A worker's session that measures one engine: see `bench/worker.py`. Each has a process of its
    own, because the libraries of several do not always go together."""

    def __init__(self, engine: str, threads: int) -> None:
        self._engine, self._threads = engine, threads
        self.hello = {"version": "", "provider": None}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The engine's rate in every precision."""
        return {"peaks": [asdict(peak) for peak in rates_of(self._engine, self._threads)]}


def rates_of(engine: str, threads: int, size: int = SIZE, seconds: float = SECONDS) -> list[Peak]:
    """The rate of one engine in each of `PRECISIONS`, or why it has none."""
    found = []
    for precision in PRECISIONS:
        try:
            product = ENGINES[engine](precision, size, threads)
            if product is None:
                found.append(Peak(precision, None, engine, f"{engine} does not multiply in it"))
            else:
                rate = 2 * size**3 / fastest(product, seconds) / 1e9
                found.append(Peak(precision, rate, engine))
        except Exception as error:  # an engine that lacks a kernel, or is missing, says so in its own way
            text = str(error).strip() or type(error).__name__
            found.append(Peak(precision, None, engine, f"{engine}: {text.splitlines()[0][:120]}"))
    return found


def best_of(found: Iterable[Peak], precision: str) -> Peak:
    """The largest rate in a precision; without any, all reasons."""
    own = [peak for peak in found if peak.precision == precision]
    able = [peak for peak in own if peak.gflops is not None]
    if able:
        return max(able, key=lambda peak: peak.gflops or 0.0)
    return Peak(precision, None, why="; ".join(peak.why for peak in own) or "no engine was tried")


def fastest(product: Product, seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest time of a product, tried for so many seconds, three times at least, once to warm up."""
    product()
    spent: list[float] = []
    while len(spent) < 3 or sum(spent) < seconds:
        start = clock()
        product()
        spent.append(clock() - start)
    return min(spent)


def _numpy(precision: str, size: int, threads: int) -> Product | None:
    """By the threads that its environment says: numpy cannot be told."""
    import numpy as np

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
        return None  # its processor kernels have none
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
    hint = openvino.Type.bf16 if precision == "bf16" else openvino.Type.f32
    settings = {
        openvino.properties.hint.inference_precision(): hint,
        openvino.properties.inference_num_threads(): threads,
        openvino.properties.hint.performance_mode(): openvino.properties.hint.PerformanceMode.LATENCY,
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
    import numpy as np

    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, size, size), dtype=np.float32)
    return first, second


def _graph(precision: str, size: int) -> Any:
    """y = x @ w; in int8 with the quantisation of both around it, which engines fuse into an integer product.

    Its rate counts the time of quantising x, some percent: it is what a graph can reach.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weight = _matrices(size)[1]
    shape = [size, size]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    if precision != "int8":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        stored = [numpy_helper.from_array(weight, "w")]
    else:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "middle"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "scale", "middle"], ["xd"]),
            helper.make_node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"]),
            helper.make_node("MatMul", ["xd", "wd"], ["y"]),
        ]
        quantised = np.clip(np.rint(weight / 0.04), -127, 127).astype(np.int8)
        stored = [
            numpy_helper.from_array(quantised, "wq"),
            numpy_helper.from_array(np.float32(0.04), "scale"),
            numpy_helper.from_array(np.uint8(128), "middle"),
            numpy_helper.from_array(np.int8(0), "zero"),
        ]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
