"""Deploys Distilled Decoding: image generation in one or two steps from auto-regressive models, on ONNX.

>>> import ddexport
>>> pipe = ddexport.load("build/digits-var")
>>> pipe(["seven"], steps=1, seed=0, num_images=4).images
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddexport.runtime import DDError, Pipeline, __version__, load

__all__ = ["DDError", "Pipeline", "__version__", "load"]

# From 1.29 on ONNX Runtime sends telemetry, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# In a checkout `runtime`, `validate` and `recipes` lie beside this folder; a wheel has them inside.
_ROOT = Path(__file__).resolve().parents[1]
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "runtime").is_dir():
    __path__.append(str(_ROOT))


def __getattr__(name: str) -> Any:
    """The runtime's names, imported when they are first asked for: `import ddexport` needs no engine."""
    if name in __all__:
        from ddexport import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
