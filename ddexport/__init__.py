"""Build time of Distilled Decoding: checkpoint -> torch module -> ONNX -> bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # `ddexport.load(bundle)` is the runtime's: importing ddexport must cost nothing and need no torch.
    if name == "load":
        from runtime import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
