"""The golden checkpoints of both families: what the published code computed, and with which files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddexport.families._checkpoint import connect, load_part
from ddexport.recipe import Recipe, load_recipe, recipe_from_dict

TOLERANCE = 2e-5


@dataclass(frozen=True, eq=False)
class Golden:
    """The checkpoint of a family under tests/golden. schedules: those of its golden cases with a teacher."""

    name: str
    tokenizer_file: str
    schedules: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return Path(__file__).parent / "golden" / self.name

    @property
    def files(self) -> dict[str, Path]:
        names = {"student": "student.pth", "tokenizer": self.tokenizer_file, "teacher": "teacher.pth"}
        return {role: self.folder / name for role, name in names.items()}

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        with np.load(self.folder / "expected.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    def recipe(self, **changes: Any) -> Recipe:
        """The recipe in the folder with other keys at its top."""
        return recipe_from_dict(load_recipe(str(self.folder / "recipe.yaml")).to_dict() | changes)

    @property
    def taught_recipe(self) -> Recipe:
        """With the schedules that involve the teacher."""
        sampling = {"cfg": 2.0, "top_k": 1, "top_p": 1.0, "temperature": 1.0}
        return self.recipe(schedules=self.recipe().to_dict()["schedules"] | self.schedules, teacher=sampling)

    def part(self, role: str) -> Any:
        return load_part(self.recipe(), role, self.files[role])

    @cached_property
    def tokenizer(self) -> Any:
        """Do not change it."""
        return self.part("tokenizer")

    @cached_property
    def teacher(self) -> Any:
        """Do not change it."""
        return self.part("teacher")

    def student(self, split: int = 5, weights: str | None = None) -> Any:
        sequence = self.recipe().to_dict()["sequence"] | {"split": split}
        student = load_part(self.recipe(sequence=sequence), "student", self.files["student"], weights)
        connect(student, self.tokenizer)
        return student


VAR = Golden(
    "var-dd-small",
    "vae.pth",
    {
        "3": {"known": [0, 14], "teacher": {"start": 5, "end": 14}},
        "4": {"known": [14], "split": 14, "teacher": {"start": 0, "end": 14}},
    },
)
LLAMAGEN = Golden(
    "llamagen-dd-small",
    "vq.pth",
    {
        "4": {"known": [0, 5], "split": 11, "teacher": {"start": 3, "end": 5}},
        "6": {"known": [5], "teacher": {"start": 0, "end": 5}},
    },
)
TEXT = Golden("llamagen-t2i-small", "../llamagen-dd-small/vq.pth", {})
BOTH = pytest.mark.parametrize("family", [VAR, LLAMAGEN], ids=lambda family: family.name)


def close(got: Any, wanted: Any, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted), rtol=0, atol=tolerance)


def known(count: int) -> Tensor:
    return torch.full((2,), count)


def fixed_images() -> Tensor:
    """Two random images of side 64 in [-1, 1]."""
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
