"""OpenVINO, on the CPU (the extra `openvino`): https://docs.openvino.ai."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ddexport.runtime.backends._base import Arrays, Backend
from ddexport.runtime.backends._openvino import Model
from ddexport.runtime.errors import BackendError
from ddexport.runtime.files import make_directory
from ddexport.runtime.machine import INSTALL, Machine
from ddexport.runtime.manifest import Manifest
from ddexport.runtime.options import MODES, Options
from ddexport.runtime.selection import Candidate

SPEED = 10
IMAGES_A_STREAM = 8


class _Arithmetic(NamedTuple):
    """graphs: the precision of the graphs that are read. hints: OpenVINO's type for what the graph leaves in
    float32, by the capability that the CPU needs for it, the first that it has. needs: the capability for
    the precision itself, None where every CPU has it."""

    graphs: str
    hints: Mapping[str | None, str]
    needs: str | None

    def hint(self, capabilities: Collection[str]) -> str:
        return next(hint for needs, hint in self.hints.items() if needs is None or needs in capabilities)


ARITHMETIC = {
    "fp32": _Arithmetic("fp32", {None: "f32"}, None),
    "bf16": _Arithmetic("fp32", {None: "bf16"}, "BF16"),
    "fp16": _Arithmetic("fp32", {None: "f16"}, "FP16"),
    "int8": _Arithmetic("int8", {"BF16": "bf16", None: "f32"}, "INT8"),
}
"""The bundle's own half graphs are for GPUs: their casts would only be in the way of the engine's. What int8
graphs leave float moves half the bytes in bf16, which counts for more than its rounding beside theirs."""


class OpenVino(Backend):
    """Keeps one model a role, compiled for the batch sizes last used."""

    accepts = frozenset({"threads", "mode", "cache", "compute"})

    @classmethod
    def available(cls) -> str | None:
        return None if find_spec("openvino") else f"openvino is not installed: {INSTALL['openvino']}"

    @classmethod
    def candidates(
        cls, root: Path, manifest: Manifest, machine: Machine, options: Options, precision: str | None
    ) -> list[Candidate]:
        missing = machine.openvino.problem is not None
        wanted = [precision] if precision else ["fp32"] if missing else _offered(manifest, machine)
        return [_candidate(each, manifest, machine, options) for each in wanted]

    @property
    def batch_size(self) -> int | None:
        """In throughput mode as many as keep every stream busy to the end; no more are computed at once."""
        if not (self._is_open and self.options.mode == "throughput"):
            return None
        return max(model.streams for model in self._models.values()) * IMAGES_A_STREAM

    def _open_impl(self) -> None:
        if self.options.cache is not None:
            make_directory(Path(self.options.cache))
        settings = self._settings()
        cache = None if self.options.cache is None else Path(self.options.cache)
        self._models = {role: Model(self.root, graph, settings, cache) for role, graph in self.graphs.items()}

    def _settings(self) -> Mapping[str, Any]:
        compute = self.options.compute or next(iter(self.graphs.values())).precision
        if compute not in ARITHMETIC:
            raise BackendError(f"openvino does not compute in {compute}", f"It does in {_all()}.")
        needs = ARITHMETIC[compute].needs
        if needs and needs not in self.machine.openvino_capabilities:
            raise BackendError(f"openvino cannot compute in {compute} here", _lacks(compute))
        settings: dict[str, Any] = {
            # Without it OpenVINO takes bf16 by itself where the CPU has it.
            "INFERENCE_PRECISION_HINT": ARITHMETIC[compute].hint(self.machine.openvino_capabilities),
            # Else it may quantise activations in front of quantised weights.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "PERFORMANCE_HINT": (self.options.mode or MODES[0]).upper(),
        }
        if self.options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.options.threads
        return settings

    def _close_impl(self) -> None:
        self._models.clear()

    def _run_impl(self, role: str, feeds: Arrays) -> Arrays:
        return self._models[role].run(feeds)


def _offered(manifest: Manifest, machine: Machine) -> list[str]:
    """What is tried where no precision is named; at least one, so that there is something to explain."""
    return [
        name
        for name, way in ARITHMETIC.items()
        if name == "fp32"
        or (
            way.graphs in manifest.precisions
            and (name != "fp16" or way.needs in machine.openvino_capabilities)
        )
    ]


def _candidate(precision: str, manifest: Manifest, machine: Machine, options: Options) -> Candidate:
    way = ARITHMETIC.get(precision)
    reasons = [machine.openvino.problem] if machine.openvino.problem else []
    if way is None:
        reasons.append(f"it computes in {_all()}")
    else:
        if way.graphs not in manifest.precisions:
            reasons.append(f"the bundle has no graphs in {way.graphs}")
        if not reasons and way.needs and way.needs not in machine.openvino_capabilities:
            reasons.append(_lacks(precision))
    graphs = way.graphs if way and way.graphs != precision else None
    asked = replace(options, compute=precision) if graphs else options
    return Candidate("openvino", precision, asked, SPEED, tuple(reasons), (), graphs=graphs, on_cpu=True)


def _lacks(precision: str) -> str:
    return f"OpenVINO has no {precision} arithmetic on this CPU"


def _all() -> str:
    return ", ".join(ARITHMETIC)


ENGINE = OpenVino
