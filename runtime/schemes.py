"""Bundles that an address names, such as hf://USER/NAME. The runtime fetches nothing: a package that does
registers the scheme of its addresses as an entry point of the group `ddexport.schemes`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from ddexport.runtime.errors import BundleError

SEPARATOR = "://"


def local_bundle(
    name: str | Path, precisions: Sequence[str | None] = (), steps: Sequence[int | str | None] = ()
) -> Path:
    """The directory of a bundle: a path is its own; what an address names is fetched.

    precisions, steps: which graphs are needed, all if empty; None among them is the bundle's default.
    Raises BundleError for a scheme that no package registers, and DDError for what cannot be fetched.
    """
    scheme, separator, _ = str(name).partition(SEPARATOR)
    if isinstance(name, Path) or not separator:
        return Path(name)
    schemes = entry_points(group="ddexport.schemes")
    if scheme in schemes.names:
        return Path(schemes[scheme].load()(name, precisions, steps))
    hint = f"Give a path, or an address that starts with {', '.join(f'{s}://' for s in schemes.names)}."
    raise BundleError(f"nothing here fetches {scheme}:// addresses such as {name}", hint)
