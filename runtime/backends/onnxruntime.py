"""ONNX Runtime, on the CPU (extra `cpu`) and on NVIDIA GPUs (extra `gpu`): https://onnxruntime.ai."""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from ddexport.runtime.backends import CPU, CUDA, SLOW, Arrays, Backend, Configuration, check_signature, said
from ddexport.runtime.bundle import Graph, Manifest, Teacher
from ddexport.runtime.contract import TensorSpec
from ddexport.runtime.errors import BackendError
from ddexport.runtime.machine import gpu_fault, import_fault, version_of
from ddexport.runtime.teacher import Cache, HostCache

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}
HALVES = ("fp16", "bf16")
ERRORS_ONLY = 3
SLOW_INT8 = "its int8 decoder is slower than its fp32 one: openvino is faster in int8"
RECORD_NODES = "session.record_ep_graph_assignment_info"
GPU_PACKAGE = 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "ddexport[gpu]"'
# ONNX Runtime itself keeps arithmetic of shapes on the CPU. Any other operator there is a fallback.
ON_THE_CPU = frozenset(
    [
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Floor",
        "Gather",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Max",
        "MemcpyFromHost",
        "MemcpyToHost",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Range",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Squeeze",
        "Sub",
        "Tile",
        "Unsqueeze",
        "Where",
    ]
)

logger = logging.getLogger(__name__)


class OnnxRuntime(Backend):
    """One session a graph. The only engine of the teacher, whose cache stays on the device."""

    name = "onnxruntime"

    @classmethod
    def configurations(
        cls, root: Path, manifest: Manifest, precision: str | None, device: str | None
    ) -> list[Configuration]:
        wanted = precision or manifest.precisions[0]
        obstacle = ""
        if version_of("onnxruntime") and version_of("onnxruntime-gpu"):
            obstacle = f"onnxruntime and onnxruntime-gpu overwrite each other's files: {GPU_PACKAGE}"
        elif wanted not in manifest.precisions:
            obstacle = f"the bundle has no graphs in {wanted}"
        configurations = []
        on_cpu = SLOW if wanted == "int8" else CPU
        for place, rank, extra in (("cuda", CUDA, "gpu"), ("cpu", on_cpu, "cpu")):
            if device is None or device.startswith(place):
                where = device or ("cuda:0" if place == "cuda" else "cpu")
                missing = import_fault("onnxruntime", extra)
                fault = missing or obstacle or (_cuda_fault(where) if place == "cuda" else _cpu_fault(wanted))
                note = SLOW_INT8 if rank == SLOW else ""
                configurations.append(Configuration(cls.name, where, wanted, wanted, rank, fault, note))
        return configurations

    def new_cache(self, teacher: Teacher, count: int, capacity: int) -> Cache:
        """A teacher's cache for so many images and positions, on the device that computes."""
        if self.configuration.device == "cpu":
            return HostCache(teacher, count, capacity)
        from ddexport.runtime.backends._cuda import CudaDevice

        gpu = CudaDevice(self.configuration.gpu)
        return DeviceCache(teacher, count, capacity, "cuda", gpu.index, gpu.copy_rows)

    def _open(self, graph: Graph, closing: ExitStack) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        providers: list[Any] = [PROVIDERS["cpu"]]
        on_gpu = self.configuration.device != "cpu"
        if on_gpu:
            options.add_session_config_entry(RECORD_NODES, "1")
            _load_libraries()
            providers.insert(0, (PROVIDERS["cuda"], cuda_options(graph, self.configuration.gpu)))
        try:
            with _named_in_utf8(self.root) as root:
                session = onnxruntime.InferenceSession(root / graph.file, options, providers=providers)
        except Exception as error:  # the engine's own exception types share no base class
            raise BackendError(
                f"onnxruntime cannot load {graph.file}: {said(error)}",
                "The graph is damaged, or needs a newer onnxruntime.",
            ) from error
        session.disable_fallback()  # else a failing run starts again on the CPU
        if on_gpu:
            _check_on_gpu(session, graph)
        inputs, outputs = self.manifest.tensors(graph)
        check_signature(graph.file, "inputs", map(_spec, session.get_inputs()), inputs)
        check_signature(graph.file, "outputs", map(_spec, session.get_outputs()), outputs)
        return session

    def _run(self, session: Any, feeds: Arrays, names: Sequence[str]) -> Arrays:
        if all(isinstance(array, np.ndarray) for array in feeds.values()):
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))
        return run_bound(session, feeds, names, "cuda", self.configuration.gpu)


class DeviceCache:
    """A teacher's cache in the memory of a device: OrtValues float32 (2, N, heads, capacity, width)."""

    def __init__(
        self, teacher: Teacher, count: int, capacity: int, kind: str, device: int, copy_rows: Any
    ) -> None:
        """kind: ONNX Runtime's name of the device. copy_rows: `CudaDevice.copy_rows`, or its like."""
        import onnxruntime

        host, self._copy_rows, self._row = (
            HostCache(teacher, count, capacity),
            copy_rows,
            teacher.head_width * 4,
        )
        self._rows, self._capacity = 2 * count * teacher.heads, capacity
        self.feeds: Mapping[str, Any] = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array, kind, device)
            for name, array in host.feeds.items()
        }

    def append(self, outputs: Mapping[str, Any], start: int, end: int) -> None:
        """Copies new rows, OrtValues (2, N, heads, end - start, width), to their positions."""
        pitch, width = self._capacity * self._row, (end - start) * self._row
        for name, value in self.feeds.items():
            target = value.data_ptr() + start * self._row
            self._copy_rows(target, pitch, outputs[f"new_{name}"].data_ptr(), width, width, self._rows)


def cuda_options(graph: Graph, device: int) -> dict[str, str]:
    """How ONNX Runtime computes a graph on a GPU.

    TF32 keeps 10 bits of mantissa: what is float32, in a half student too, needs all 23. But to forbid TF32
    forbids tensor cores to all convolutions, float16 ones as well: a half decoder would be the slower one.
    """
    tf32 = graph.role.startswith("decoder") and graph.precision in HALVES
    return {"device_id": str(device), "use_tf32": "1" if tf32 else "0"}


def run_bound(session: Any, feeds: Arrays, names: Sequence[str], kind: str, device: int) -> dict[str, Any]:
    """Runs a session some of whose feeds lie on the device: `logits` to the host, the rest stays there."""
    binding = session.io_binding()
    for name, array in feeds.items():
        if isinstance(array, np.ndarray):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        else:
            binding.bind_ortvalue_input(name, array)
    for name in names:
        binding.bind_output(name, *(("cpu",) if name == "logits" else (kind, device)))
    session.run_with_iobinding(binding)
    values = dict(zip(names, binding.get_outputs(), strict=True))
    return {name: value.numpy() if name == "logits" else value for name, value in values.items()}


@contextmanager
def _named_in_utf8(root: Path) -> Iterator[Path]:
    """A directory under a name that ONNX Runtime takes: Linux has names that are not UTF-8."""
    if str(root).encode(errors="ignore").decode() == str(root):
        yield root
        return
    number = os.open(root, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{number}")
    finally:
        os.close(number)


def _cuda_fault(device: str) -> str:
    import onnxruntime

    if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        return f"the installed onnxruntime has no {PROVIDERS['cuda']}: {GPU_PACKAGE}"
    return gpu_fault(int(device.partition(":")[2]))


def _cpu_fault(precision: str) -> str:
    # Sigmoid is the first operator that it lacks.
    return "ONNX Runtime's CPU provider has no bf16 operators" if precision == "bf16" else ""


def _load_libraries() -> None:
    """Loads CUDA and cuDNN out of their Python packages, where ONNX Runtime can and they are there."""
    import onnxruntime

    if not hasattr(onnxruntime, "preload_dlls"):
        return
    printed = io.StringIO()
    with redirect_stdout(printed):  # it prints what it does not find, which may lie elsewhere
        onnxruntime.preload_dlls()
    logger.info("onnxruntime: %s", " ".join(printed.getvalue().split()))


def _check_on_gpu(session: Any, graph: Graph) -> None:
    """Raises BackendError if the session computes on the CPU what the GPU was asked for.

    ONNX Runtime only logs that a provider could not be loaded (cuDNN is missing, say) and goes on without.
    """
    if PROVIDERS["cuda"] not in session.get_providers():
        used = ", ".join(session.get_providers())
        raise BackendError(
            f"onnxruntime could not load {PROVIDERS['cuda']} and fell back to {used}",
            "Install the CUDA and cuDNN versions that this onnxruntime-gpu needs: pip install"
            " 'onnxruntime-gpu[cuda,cudnn]'. Or ask for the CPU: --device cpu.",
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        logger.info("this onnxruntime does not tell where it runs the nodes of %s", graph.file)
        return
    fallen = Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == PROVIDERS["cpu"]
        for node in part.get_nodes()
        if node.op_type not in ON_THE_CPU
    )
    if fallen:
        listed = ", ".join(f"{count} {name}" for name, count in fallen.most_common(8))
        raise BackendError(
            f"{PROVIDERS['cuda']} leaves nodes of {graph.file} to the CPU: {listed}",
            "This onnxruntime-gpu lacks these operators in this precision: use another precision, a newer"
            " onnxruntime-gpu, a TensorRT engine (ddexport trt), or --device cpu.",
        )


def _spec(value: Any) -> TensorSpec:
    return TensorSpec(value.name, DTYPES.get(value.type, value.type), tuple(value.shape))


ENGINE = OnnxRuntime
