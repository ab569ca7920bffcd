"""What a user may ask of an engine, beside the bundle and its precision."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ddexport.runtime.errors import BackendError

PROVIDERS = ("cpu", "cuda", "tensorrt")
MODES = ("latency", "throughput")


@dataclass(frozen=True)
class Options:
    """None leaves a choice to the engine. An engine that cannot follow an option that is given refuses it.

    threads: of the CPU. provider: of ONNX Runtime, one of `PROVIDERS`. device: the number of the GPU.
    cuda_graphs: whether to record the work of a batch once and replay it. mode: one of `MODES`, what to be
    fast at: one batch, or images a second. cache: a directory in which compiled graphs are kept for the next
    time. compute: the precision to compute in, where it is not that of the graphs; `Candidate` sets it.
    Raises BackendError for a value out of range.
    """

    threads: int | None = None
    provider: str | None = None
    device: int | None = None
    cuda_graphs: bool | None = None
    mode: str | None = None
    cache: Path | str | None = None
    compute: str | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise BackendError(f"the number of threads must be at least 1, but is {self.threads}")
        if self.device is not None and self.device < 0:
            raise BackendError(f"the number of the device must be at least 0, but is {self.device}")
        if self.provider is not None and self.provider not in PROVIDERS:
            raise BackendError(
                f"there is no provider called {self.provider!r}", f"There is: {', '.join(PROVIDERS)}."
            )
        if self.mode is not None and self.mode not in MODES:
            raise BackendError(f"there is no mode called {self.mode!r}", f"There is: {', '.join(MODES)}.")

    def given(self) -> dict[str, Any]:
        """The options that are not None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
