"""Training images for `ddexport distill`. A recipe names its data set in `distill.data`; each file here is
one.

A data set module has one function, `load() -> DataSet`, and raises a `DDError` that names the package to
install when its source is missing.
"""

from __future__ import annotations

from ddexport.distill.data._base import DataSet, ImageSet, Part, load_data

__all__ = ["DataSet", "ImageSet", "Part", "load_data"]
