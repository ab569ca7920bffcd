"""A bundle's recipe against the one of that name that ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ddexport.recipe import load_recipe, manifest_recipe, with_student
from ddexport.runtime.errors import VerificationError
from ddexport.validate.contents import open_manifest

STUDENT = {"schedules": {"1": {"known": [0]}, "2": {"known": [0, 8]}}, "split": 12, "vector": "mean"}


def test_a_student_may_bring_what_the_shipped_recipe_leaves_open(text_bundle: Path, tmp_path: Path) -> None:
    """Its schedules, split and condition come from its checkpoint, and nothing else."""
    bundle, shipped = tmp_path / "bundle", load_recipe("llamagen-t2i-xl")
    shutil.copytree(text_bundle, bundle)
    data = json.loads((bundle / "bundle.json").read_text())
    beside = {key: shipped.to_dict()[key] for key in ("parity", "licence", "published")}
    recipe = manifest_recipe(with_student(shipped, STUDENT, "the checkpoint"))
    data |= {**beside, "name": shipped.name, "recipe": recipe}
    data["sequence"]["split"] = STUDENT["split"]
    (bundle / "bundle.json").write_text(json.dumps(data))
    open_manifest(bundle)
    recipe["condition"]["tokens"] -= 1
    (bundle / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(VerificationError, match=r"condition\.tokens is 119"):
        open_manifest(bundle)
