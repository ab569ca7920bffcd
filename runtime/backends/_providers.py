"""ONNX Runtime's execution providers: which there are, why one cannot be used, and whether it was used."""

from __future__ import annotations

import io
import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from ddexport.runtime.errors import BackendError
from ddexport.runtime.machine import GPU_RUNTIME, Machine
from ddexport.runtime.manifest import Graph
from numpy.typing import NDArray

NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
RECORD_NODES = "session.record_ep_graph_assignment_info"
# fmt: off
ON_THE_CPU = frozenset(
    {
        "Shape", "Size", "Constant", "ConstantOfShape", "Gather", "Slice", "Concat", "Squeeze",
        "Unsqueeze", "Reshape", "Cast", "Identity", "Range", "Add", "Sub", "Mul", "Div", "Mod",
        "Neg", "Min", "Max", "Floor", "Ceil", "Equal", "Less", "LessOrEqual", "Greater",
        "GreaterOrEqual", "And", "Or", "Not", "Where", "Expand", "Tile", "ReduceProd", "ReduceMax",
        "ReduceMin", "MemcpyFromHost", "MemcpyToHost",
    }
)
# fmt: on
"""ONNX Runtime itself keeps arithmetic of shapes on the CPU. Any other operator there is a fallback."""
MAX_BINDINGS = 4

logger = logging.getLogger(__name__)


def why_not(provider: str, precision: str, machine: Machine, device: int = 0) -> tuple[tuple[str, ...], str]:
    """What stands in the way of a provider, all of it, and what to do about it."""
    if machine.onnxruntime.problem:
        return (machine.onnxruntime.problem,), ""
    if provider == "cpu":
        if precision == "bf16":
            why = "ONNX Runtime's CPU provider has no bf16 operators (Sigmoid is the first it lacks)"
            return (
                why,
            ), "take --precision fp32 or fp16 on a CPU; bf16 runs as a TensorRT engine: ddexport trt"
        return (), ""
    reasons: list[str] = []
    remedy = ""
    if NAMES[provider] not in machine.providers:
        reasons.append(f"the installed onnxruntime has no {NAMES[provider]}")
        remedy = GPU_RUNTIME
    if device >= len(machine.gpus):
        reasons.append(machine.cuda_problem or f"there is no device {device}, but {len(machine.gpus)} in all")
    return tuple(reasons), remedy


def provider_list(provider: str, device: int) -> list[Any]:
    """The providers of a session, as ONNX Runtime wants them: what the first cannot do goes to the next."""
    if provider == "cpu":
        return [NAMES["cpu"]]
    number = str(device)
    # TF32 keeps 10 bits of mantissa: float32 graphs, and the float32 islands of the others, need all 23.
    cuda = (NAMES["cuda"], {"device_id": number, "use_tf32": "0"})
    first = [(NAMES["tensorrt"], {"device_id": number})] if provider == "tensorrt" else []
    return [*first, cuda, NAMES["cpu"]]


def load_libraries() -> None:
    """Loads CUDA and cuDNN out of their Python packages, where ONNX Runtime can and they are there."""
    import onnxruntime

    if not hasattr(onnxruntime, "preload_dlls"):
        return
    said = io.StringIO()
    with redirect_stdout(said):  # it prints what it does not find, which may lie elsewhere
        onnxruntime.preload_dlls()
    if said.getvalue():
        logger.info("onnxruntime: %s", " ".join(said.getvalue().split()))


def check_used(session: Any, provider: str, graph: Graph) -> None:
    """Raises BackendError if the session computes on the CPU what the provider was asked for.

    ONNX Runtime only logs that a provider could not be loaded (cuDNN is missing, say) and goes on without.
    """
    if provider == "cpu":
        return
    if NAMES[provider] not in session.get_providers():
        used = ", ".join(session.get_providers())
        raise BackendError(
            f"onnxruntime could not load {NAMES[provider]} and fell back to {used}",
            "CUDA and cuDNN of the versions this onnxruntime-gpu wants must be found: pip install"
            " 'onnxruntime-gpu[cuda,cudnn]'. Or ask for the CPU: --provider cpu.",
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        logger.info("this onnxruntime does not tell where it runs the nodes of %s", graph.file)
        return
    fallen = Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == NAMES["cpu"]
        for node in part.get_nodes()
        if node.op_type not in ON_THE_CPU
    )
    if fallen:
        listed = ", ".join(f"{count} {name}" for name, count in fallen.most_common(8))
        raise BackendError(
            f"{NAMES[provider]} leaves nodes of {graph.file} to the CPU: {listed}",
            "This onnxruntime-gpu lacks these operators in this precision: take another precision, a newer"
            " onnxruntime-gpu, a TensorRT engine (ddexport trt), or --provider cpu.",
        )


@dataclass
class _Slot:
    binding: Any
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


def is_batched(graph: Graph) -> bool:
    """Whether a batch size says all about its shapes. A teacher's passes differ in more: each is run with
    arrays of its own, which are copied to the device and back.
    """
    return all(spec.shape[0] == "batch" for spec in (*graph.inputs, *graph.outputs))


class BoundSession:
    """A session whose arrays lie on a device; they are kept for the batch sizes last used."""

    def __init__(self, session: Any, graph: Graph, kind: str, device: int) -> None:
        """kind: ONNX Runtime's name for the kind of device, `cuda` or `cpu`."""
        self._session, self._graph, self._kind, self._device = session, graph, kind, device
        self._slots: OrderedDict[int, _Slot] = OrderedDict()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name for inputs by name."""
        slot = self._slot(len(next(iter(feeds.values()))))
        for name, value in slot.inputs.items():
            value.update_inplace(np.ascontiguousarray(feeds[name]))
        self._session.run_with_iobinding(slot.binding)
        # A copy: on the CPU it would be a view of memory that the next run overwrites.
        return {name: np.array(value.numpy()) for name, value in slot.outputs.items()}

    def _slot(self, batch: int) -> _Slot:
        if batch in self._slots:
            self._slots.move_to_end(batch)
            return self._slots[batch]
        while len(self._slots) >= MAX_BINDINGS:
            self._slots.popitem(last=False)
        binding = self._session.io_binding()
        inputs, outputs = self._values(self._graph.inputs, batch), self._values(self._graph.outputs, batch)
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._slots[batch] = _Slot(binding, inputs, outputs)
        return self._slots[batch]

    def _values(self, specs: Sequence[Any], batch: int) -> dict[str, Any]:
        import onnxruntime

        return {
            spec.name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [batch, *cast("tuple[int, ...]", spec.shape[1:])],
                np.dtype(spec.dtype).type,
                self._kind,
                self._device,
            )
            for spec in specs
        }
