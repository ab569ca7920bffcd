"""What one run of an alternative gave: everything that parity is measured on, and its file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ddexport.validate.metrics._base import FloatArray, IntArray, StudentOutput


@dataclass(frozen=True)
class Outputs:
    """tokens: of every step in order, (B, S) of a student's, (B, end) of the teacher's. students: sequence
    and logits of every student step. guided: (B, P, V), the teacher's logits of the positions it drew, if it
    did. sequence (B, L, Cv) was decoded to image (B, 3, H, W).
    """

    tokens: Sequence[IntArray]
    students: Sequence[StudentOutput]
    guided: FloatArray | None
    sequence: FloatArray
    image: FloatArray

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By name, for a file."""
        found: dict[str, npt.NDArray[Any]] = {"sequence": self.sequence, "image": self.image}
        found |= {f"tokens{k}": tokens for k, tokens in enumerate(self.tokens)}
        for k, student in enumerate(self.students):
            found |= {f"student{k}_sequence": student.sequence, f"student{k}_logits": student.logits}
        if self.guided is not None:
            found["guided"] = self.guided
        return found

    def digest(self) -> str:
        """Equal for outputs that are equal to the bit."""
        found = hashlib.sha256()
        for name, array in sorted(self.arrays().items()):
            found.update(name.encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def write(self, path: Path) -> None:
        """To an npz file."""
        np.savez(path, **self.arrays())  # type: ignore[arg-type]

    @staticmethod
    def read(path: Path) -> Outputs:
        """From an npz file that `write` made."""
        with np.load(path, allow_pickle=False) as arrays:
            count = sum(name.startswith("tokens") for name in arrays.files)
            passes = sum(name.endswith("_logits") for name in arrays.files)
            return Outputs(
                [arrays[f"tokens{k}"] for k in range(count)],
                [
                    StudentOutput(arrays[f"student{k}_sequence"], arrays[f"student{k}_logits"])
                    for k in range(passes)
                ],
                arrays["guided"] if "guided" in arrays.files else None,
                arrays["sequence"],
                arrays["image"],
            )
