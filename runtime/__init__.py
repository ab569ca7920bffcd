"""Draws images from a bundle with numpy, Pillow, msgspec and one inference engine, without torch.

>>> import ddexport
>>> with ddexport.load("build/digits-var") as pipe:
...     pipe(["seven"], steps=1, seed=0, num_images=4).images
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ddexport.runtime.errors import DDError

if TYPE_CHECKING:
    from ddexport.runtime.pipeline import Pipeline, load

__all__ = ["DDError", "Pipeline", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import runtime` costs nothing."""
    if name in ("load", "Pipeline"):
        return getattr(import_module("ddexport.runtime.pipeline"), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("ddexport")
        except PackageNotFoundError:  # run from a source tree that was never installed
            return "0+source"
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
