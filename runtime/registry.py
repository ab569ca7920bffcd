"""Plug-ins are found by file name: a module without a leading underscore in the package is one."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

from ddexport.runtime.errors import DDError, did_you_mean


def plugins(package: str) -> list[str]:
    """The names of the plug-ins in a package, sorted; none of them is imported."""
    folder = import_module(package).__path__
    return sorted(info.name for info in pkgutil.iter_modules(folder) if not info.name.startswith("_"))


def load_plugin(
    package: str, name: str, *, kind: str = "plug-in", error: type[DDError] = DDError
) -> ModuleType:
    """Imports one plug-in. An unknown name raises `error`, with a list of those there are and the nearest.

    kind: what to call it in the message, such as `backend`.
    """
    names = plugins(package)
    if name not in names:
        there_is = f"There is: {', '.join(names) or 'none'}."
        raise error(f"there is no {kind} called {name!r}", f"{did_you_mean(name, names)}{there_is}")
    return import_module(f"{package}.{name}")
