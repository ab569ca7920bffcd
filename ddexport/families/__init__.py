"""Model families: the PyTorch reference modules and the layouts of their published checkpoints.

A module of this package whose name has no leading underscore is a family; its class `FAMILY` is found by
that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddexport.families._base import Family


def family(name: str) -> Family:
    """The family called `name`, imported when asked for. Raises `DDError` for an unknown name."""
    from ddexport.runtime.registry import load_plugin

    return load_plugin("ddexport.families", name).FAMILY()  # type: ignore[no-any-return]
