"""The most that this machine multiplies: on a CPU the fastest square matrix product of ONNX Runtime and
OpenVINO, on a GPU PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ddexport.validate.bench.clock import clock_of

SIZE, GPU_SIZE, SECONDS = 2048, 8192, 0.4
ENGINES = {"cpu": ("onnxruntime", "openvino"), "cuda": ("torch",)}


def measure_rate(engine: str, precision: str, threads: int, device: str = "cpu", size: int = 0) -> float:
    """GFLOP/s of an engine of `ENGINES`: the shortest of the products that fit into 0.4 s, after a first one.

    Raises ValueError where it does not multiply in that precision, and whatever the engine raises.
    """
    size = size or (SIZE if device == "cpu" else GPU_SIZE)
    of_engine = {"onnxruntime": _onnxruntime, "openvino": _openvino, "torch": _torch}[engine]
    product, clock = of_engine(precision, size, threads, device), clock_of(device)
    product()
    spent: list[float] = []
    while sum(spent) < SECONDS:
        spent.append(clock.measure(product)[1])
    return 2 * size**3 / min(spent) / 1e9


def _torch(precision: str, size: int, threads: int, device: str) -> Callable[[], Any]:
    import torch

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision not in dtypes:
        raise ValueError(f"its product has no {precision}")
    a, b = (torch.randn(size, size, device=device).to(dtypes[precision]) for _ in range(2))
    return lambda: a @ b


def _onnxruntime(precision: str, size: int, threads: int, _: str) -> Callable[[], Any]:
    import onnxruntime

    if precision not in ("fp32", "int8"):
        raise ValueError(f"its kernels for CPUs have no {precision}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    model, x = _model(precision, size)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def _openvino(precision: str, size: int, threads: int, _: str) -> Callable[[], Any]:
    import openvino

    core, hint = openvino.Core(), {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}[precision]
    if precision != "fp32" and precision.upper() not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError(f"this CPU has no {precision}")
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    model, x = _model(precision, size)
    request = core.compile_model(core.read_model(model, b""), "CPU", settings).create_infer_request()
    return lambda: request.infer({"x": x}, share_inputs=True)


def _model(precision: str, size: int) -> tuple[bytes, Any]:
    """y = x @ w and an x; in int8 both are quantized, which engines fuse into an integer product.

    Its rate counts the time of quantizing x, some percent: it is what a graph can reach.
    """
    from onnx import TensorProto, helper, numpy_helper

    x, weight = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    x_info, y_info = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in "xy")
    nodes, stored = [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}
    if precision == "int8":
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "middle"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "scale", "middle"], ["xd"]),
            helper.make_node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"]),
            helper.make_node("MatMul", ["xd", "wd"], ["y"]),
        ]
        quantized = np.clip(np.rint(weight / 0.04), -127, 127).astype(np.int8)
        stored = {"wq": quantized, "scale": np.float32(0.04), "middle": np.uint8(128), "zero": np.int8(0)}
    arrays = [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "product", [x_info], [y_info], arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model.SerializeToString(), x
