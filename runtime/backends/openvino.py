"""OpenVINO on the CPU (extra `openvino`): https://docs.openvino.ai."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from ddexport.runtime.backends import OTHER, Arrays, Backend, Configuration, check_signature, said
from ddexport.runtime.bundle import ROLES, Graph, Manifest
from ddexport.runtime.contract import TensorSpec
from ddexport.runtime.errors import BackendError
from ddexport.runtime.machine import cpu, import_fault

# It writes an identifier under HOME and reports to Google Analytics; without this module it does neither.
if os.environ.get("OPENVINO_TELEMETRY") != "1":
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

DTYPES = {"f32": "float32", "i64": "int64"}
LARGE = 32 * 2**20  # bytes of a graph. Real models' are larger; small ones are faster in batches.


class Arithmetic(NamedTuple):
    """graphs: the precision of the graphs that are read. hint: OpenVINO's type for what these leave in
    float32. needs: what the CPU must be capable of, None where every one is."""

    graphs: str
    hint: str
    needs: str | None


# The bundle's own half graphs are for GPUs: their casts would only be in the way of the engine's.
ARITHMETIC = {
    "fp32": Arithmetic("fp32", "f32", None),
    "bf16": Arithmetic("fp32", "bf16", "BF16"),
    "fp16": Arithmetic("fp32", "f16", "FP16"),
    "int8": Arithmetic("int8", "f32", "INT8"),
}


class OpenVino(Backend):
    """A graph is compiled for one image, and once more for all other batch sizes: never again for a size."""

    name = "openvino"

    @classmethod
    def configurations(
        cls, root: Path, manifest: Manifest, precision: str | None, device: str | None
    ) -> list[Configuration]:
        if device not in (None, "cpu"):
            return []
        wanted = precision or manifest.precisions[0]
        arithmetic = ARITHMETIC.get(wanted)
        if arithmetic is None:
            obstacle, graphs = f"it computes in {', '.join(ARITHMETIC)}", wanted
        else:
            obstacle, graphs = import_fault("openvino", "openvino"), arithmetic.graphs
            if not obstacle and graphs not in manifest.precisions:
                obstacle = f"the bundle has no graphs in {graphs}"
            if not obstacle and arithmetic.needs not in (None, *capabilities()):
                obstacle = f"OpenVINO has no {wanted} arithmetic on this CPU"
        return [Configuration(cls.name, "cpu", wanted, graphs, OTHER, obstacle)]

    def _open(self, graph: Graph, closing: ExitStack) -> Any:
        hint = ARITHMETIC[self.configuration.precision].hint
        if "BF16" in capabilities() and self.configuration.precision == "int8":
            # What int8 graphs leave float moves half the bytes in bf16, which counts for more than its
            # rounding beside theirs.
            hint = "bf16"
        settings: dict[str, Any] = {
            # Without it OpenVINO takes bf16 by itself where the CPU has it.
            "INFERENCE_PRECISION_HINT": hint,
            # Else it may quantise activations in front of quantised weights.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        try:
            model = _read(self.root / graph.file)
            if hint == "f32" and "avx512f" in cpu().flags:
                _avoid_mlas(model)
            session = Session(graph, model, settings)
            inputs, outputs = self.manifest.tensors(graph)
            check_signature(graph.file, "inputs", _specs(model.inputs, inputs), inputs)
            check_signature(graph.file, "outputs", _specs(model.outputs, outputs), outputs)
        except BackendError:
            raise
        except Exception as error:  # the engine's exceptions share no base class of their own
            raise _unreadable(graph, error) from error
        return session

    def _prepare(self, session: Any, batch: int) -> None:
        session.request(batch)

    def _run(self, session: Any, feeds: Arrays, names: Sequence[str]) -> Arrays:
        # One at a time, which takes all threads anyway. With a request for each caller OpenVINO 2026.4 can
        # deadlock, where one is made while another runs.
        with session.lock:
            images = len(next(iter(feeds.values())))
            size = 1 if session.one_by_one else images
            request, parts = session.request(size, runs=True), []
            for start in range(0, images, size):
                part = {name: array[start : start + size] for name, array in feeds.items()}
                request.infer(part, share_inputs=True)
                parts.append([request.get_tensor(name).data.copy() for name in names])
        columns = zip(names, zip(*parts, strict=True), strict=True)
        return {name: np.concatenate(rows) if len(rows) > 1 else rows[0] for name, rows in columns}


class Session:
    """A graph in OpenVINO: compiled for one image, which is faster and smaller, or with a dynamic batch.

    one_by_one: images of a batch are run one by one. With a dynamic batch OpenVINO 2026.4 keeps most of what
    the layers leave, 0.6 GiB an image for var-d16 in place of 0.03, and large graphs are no faster for it.
    """

    def __init__(self, graph: Graph, model: Any, settings: Mapping[str, Any]) -> None:
        self.lock = RLock()
        self._graph, self._model, self._settings = graph, model, settings
        self.one_by_one = graph.role in ROLES and sum(info.bytes for info in graph.files) > LARGE
        self._requests: dict[bool, Any] = {}  # by whether the batch is dynamic
        self._has_run = False

    def request(self, batch: int, runs: bool = False) -> Any:
        """What runs so many images; compiled now if it was not. Raises BackendError."""
        import openvino

        dynamic = batch != 1 and not self.one_by_one
        with self.lock:
            if dynamic not in self._requests:
                if not self._has_run:
                    self._requests.clear()  # compiled by `load`, and never asked for
                model = self._model
                if not dynamic:
                    model = model.clone()
                    model.reshape({value: [1, *list(value.partial_shape)[1:]] for value in model.inputs})
                try:
                    compiled = openvino.Core().compile_model(model, "CPU", self._settings)
                except Exception as error:
                    raise _unreadable(self._graph, error) from error
                self._requests[dynamic] = compiled.create_infer_request()
            self._has_run = self._has_run or runs
            return self._requests[dynamic]


def _unreadable(graph: Graph, error: Exception) -> BackendError:
    return BackendError(
        f"openvino cannot load {graph.file}: {said(error)}",
        "The graph is damaged, or needs a newer openvino.",
    )


@lru_cache
def capabilities() -> tuple[str, ...]:
    """What OpenVINO says it can do on this CPU, as in `FP32`, `BF16`, `INT8`."""
    import openvino

    try:
        return tuple(map(str, openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")))
    except RuntimeError:  # an OpenVINO without its part for CPUs
        return ()


def _read(path: Path) -> Any:
    """A model through the ONNX frontend alone: `read_model` would try every format on a damaged file."""
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("onnx")
    return frontend.convert(frontend.load(str(path)))


def _avoid_mlas(model: Any) -> None:
    """Puts an identity behind every product with float32 weights.

    For a product with nothing behind it OpenVINO 2026.4 takes MLAS, which on a Xeon with AVX-512 needs 1.2 to
    1.3 times as long as its own kernel; that one applies the identity, max(x, 0) + min(x, 0), as it writes.
    """
    from openvino import opset1

    for node in model.get_ordered_ops():
        constant = [value.get_node().get_type_name() == "Constant" for value in node.input_values()]
        if node.get_type_name() == "MatMul" and constant == [False, True]:
            output = _behind_bias(node.output(0))
            readers = list(output.get_target_inputs())
            identity = opset1.prelu(output, opset1.constant(np.float32(1)))
            for reader in readers:
                reader.replace_source_output(identity.output(0))


def _behind_bias(output: Any) -> Any:
    """The output of the sum with constants that alone reads this one; else this one."""
    readers = [reader.get_node() for reader in output.get_target_inputs()]
    if len(readers) == 1 and readers[0].get_type_name() == "Add":
        others = [value.get_node().get_type_name() for value in readers[0].input_values()]
        return readers[0].output(0) if "Constant" in others else output
    return output


def _specs(values: Sequence[Any], promised: Sequence[TensorSpec]) -> list[TensorSpec]:
    """What OpenVINO says of inputs or outputs; a value may have several names, of which one is promised."""
    known, specs = {spec.name for spec in promised}, []
    for value in values:
        names = sorted(value.get_names(), key=lambda name: name not in known)
        kind = value.element_type.get_type_name()
        shape = tuple("?" if size.is_dynamic else size.get_length() for size in value.partial_shape)
        specs.append(TensorSpec(names[0] if names else "", DTYPES.get(kind, kind), shape))
    return specs


ENGINE = OpenVino
