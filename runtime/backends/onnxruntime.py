"""ONNX Runtime, on the CPU (in the base install) and on NVIDIA GPUs: https://onnxruntime.ai."""

from __future__ import annotations

import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddexport.runtime.backends._base import Arrays, Backend
from ddexport.runtime.backends._providers import (
    RECORD_NODES,
    BoundSession,
    check_used,
    is_batched,
    load_libraries,
    provider_list,
    why_not,
)
from ddexport.runtime.errors import BackendError
from ddexport.runtime.machine import Machine
from ddexport.runtime.manifest import Graph, Manifest, TensorSpec
from ddexport.runtime.options import Options
from ddexport.runtime.selection import Candidate

DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}
ERRORS_ONLY = 3
SPEEDS = {"cuda": 50, "cpu": 0}
"""What is tried when no provider is named. ONNX Runtime's own TensorRT provider builds engines for minutes
when it is first run, so that it has to be asked for."""


class OnnxRuntime(Backend):
    """Keeps one session a role. Without a provider in the options it runs on the CPU."""

    accepts = frozenset({"threads", "provider", "device"})

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.provider == "cpu" and self.options.device is not None:
            raise BackendError("the CPU has no --device", "Name a provider of a GPU: --provider cuda.")

    @classmethod
    def available(cls) -> str | None:
        if find_spec("onnxruntime") is None:
            return (
                "onnxruntime is not installed: pip install onnxruntime (part of the base install of ddexport)"
            )
        return None

    @classmethod
    def candidates(
        cls, root: Path, manifest: Manifest, machine: Machine, options: Options, precision: str | None
    ) -> list[Candidate]:
        return [
            _candidate(provider, each, manifest, machine, options)
            for provider in ([options.provider] if options.provider else SPEEDS)
            for each in ([precision] if precision else _precisions(provider, manifest))
        ]

    @property
    def provider(self) -> str:
        return self.options.provider or "cpu"

    def _open_impl(self) -> None:
        precision = next(iter(self.graphs.values())).precision
        reasons, remedy = why_not(self.provider, precision, self.machine, self.options.device or 0)
        if reasons:
            raise BackendError(f"onnxruntime cannot run {precision} here: {'; '.join(reasons)}", remedy)
        self._lock = threading.Lock()
        self._sessions = {role: self._session(graph) for role, graph in self.graphs.items()}
        self._bound = {
            role: BoundSession(session, self.graphs[role], "cuda", self.options.device or 0)
            for role, session in self._sessions.items()
            if self.provider != "cpu" and is_batched(self.graphs[role])
        }

    def _close_impl(self) -> None:
        self._bound = {}
        self._sessions.clear()

    def _run_impl(self, role: str, feeds: Arrays) -> Arrays:
        names = [spec.name for spec in self.graphs[role].outputs]
        try:
            if role in self._bound:
                with self._lock:  # the bound arrays are shared
                    return self._bound[role].run(feeds)
            outputs = self._sessions[role].run(names, dict(feeds))
        except Exception as error:  # the engine's own exception types share no base class
            raise BackendError(
                f"onnxruntime failed on {self.graphs[role].file}: {_first_line(error)}",
                "If memory is short, ask for a smaller batch size.",
            ) from error
        return dict(zip(names, outputs, strict=True))

    def _session(self, graph: Graph) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if self.options.threads is not None:
            options.intra_op_num_threads = self.options.threads
        if self.provider != "cpu":
            options.add_session_config_entry(RECORD_NODES, "1")
            load_libraries()
        providers = provider_list(self.provider, self.options.device or 0)
        try:
            session = onnxruntime.InferenceSession(self.root / graph.file, options, providers=providers)
        except Exception as error:
            raise BackendError(
                f"onnxruntime cannot load {graph.file}: {_first_line(error)}",
                "The graph is damaged, or needs a newer onnxruntime.",
            ) from error
        session.disable_fallback()  # else a failing run starts again on the CPU
        check_used(session, self.provider, graph)
        for side, have, want in (
            ("inputs", session.get_inputs(), graph.inputs),
            ("outputs", session.get_outputs(), graph.outputs),
        ):
            if not _same(have, want):
                raise BackendError(
                    f"the {side} of {graph.file} are not those that bundle.json names: "
                    + ", ".join(f"{value.name} {value.type} {value.shape}" for value in have),
                    "The bundle is damaged: export it again.",
                )
        return session


def _precisions(provider: str, manifest: Manifest) -> list[str]:
    """What is tried where no precision is named: the bundle's first, and on the CPU what else may be best."""
    first, *others = manifest.precisions
    return [first, *(each for each in others if provider == "cpu" and each in ("fp32", "int8"))]


def _candidate(
    provider: str, precision: str, manifest: Manifest, machine: Machine, options: Options
) -> Candidate:
    reasons, remedy = why_not(provider, precision, machine, options.device or 0)
    if provider == "cpu" and options.device is not None:
        reasons = (*reasons, "the CPU has no --device")
    if precision not in manifest.precisions:
        reasons = (*reasons, f"the bundle has no graphs in {precision}")
    asked, speed = replace(options, provider=provider), SPEEDS.get(provider, 0)
    on_cpu = provider == "cpu"
    return Candidate("onnxruntime", precision, asked, speed, reasons, (), remedy, on_cpu=on_cpu)


def _same(have: list[Any], want: tuple[TensorSpec, ...]) -> bool:
    """Whether an engine's values are the specified ones, and dynamic at least where these are."""
    found = {value.name: value for value in have}
    return set(found) == {spec.name for spec in want} and all(
        DTYPES.get(found[spec.name].type) == spec.dtype
        and len(found[spec.name].shape) == len(spec.shape)
        and all(
            not isinstance(h, int) or h == w for h, w in zip(found[spec.name].shape, spec.shape, strict=True)
        )
        for spec in want
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


ENGINE = OnnxRuntime
