"""ONNX Runtime on the CPU: https://onnxruntime.ai, in the base install."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from runtime.backends._base import Arrays, Backend
from runtime.errors import BackendError
from runtime.manifest import Graph, TensorSpec

DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}
ERRORS_ONLY = 3


class OnnxRuntime(Backend):
    """Keeps one session a role."""

    @classmethod
    def available(cls) -> str | None:
        if find_spec("onnxruntime") is None:
            return (
                "onnxruntime is not installed: pip install onnxruntime (part of the base install of ddexport)"
            )
        return None

    def _open_impl(self) -> None:
        self._sessions = {role: self._session(graph) for role, graph in self.graphs.items()}

    def _close_impl(self) -> None:
        self._sessions.clear()

    def _run_impl(self, role: str, feeds: Arrays) -> Arrays:
        names = [spec.name for spec in self.graphs[role].outputs]
        try:
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
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            session = onnxruntime.InferenceSession(
                self.root / graph.file, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BackendError(
                f"onnxruntime cannot load {graph.file}: {_first_line(error)}",
                "The graph is damaged, or needs a newer onnxruntime.",
            ) from error
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
