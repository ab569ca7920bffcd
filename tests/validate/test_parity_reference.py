"""Where the reference takes its weights from, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

import ddexport.recipe
from ddexport.recipe import load_recipe
from ddexport.runtime.bundle import Source, Weights, sha256_of
from ddexport.validate.reference import ReferenceFilesError, build_reference

GOLDEN = Path(__file__).parents[1] / "golden" / "var-dd-small"
SHIPPED = {"ships-student.pth": GOLDEN / "student.pth", "ships-vae.pth": GOLDEN / "vae.pth"}


def manifest_of(kind: str, **changes: Any) -> Any:
    """What of a manifest says where its weights come from; the golden model's, as if they shipped."""
    recipe = load_recipe(str(GOLDEN / "recipe.yaml")).to_dict()
    recipe["files"]["student"] |= {"embedded": "ships-student.pth"}
    recipe["files"]["tokenizer"] |= {"embedded": "ships-vae.pth"}
    weights = Weights(
        kind=kind,
        files=tuple(
            Source(role=role, file=name, sha256=sha256_of(SHIPPED[name]), bytes=SHIPPED[name].stat().st_size)
            for role, name in (("student", "ships-student.pth"), ("tokenizer", "ships-vae.pth"))
        ),
    )
    beside = {"parity": recipe.pop("parity"), "licence": {}, "published": {}}
    return SimpleNamespace(
        **{"decoders": {}, "name": "golden", "recipe": recipe, "classes": 10, "text": None, **beside},
        **{"weights": weights, "teacher": None} | changes,
    )


@pytest.fixture(autouse=True)
def shipped(monkeypatch):
    monkeypatch.setattr(ddexport.recipe, "embedded_weights", lambda source: SHIPPED[source.embedded])


def changed_hash(manifest: Any, role: str) -> Any:
    files = tuple(
        structs.replace(file, sha256="0" * 64) if file.role == role else file
        for file in manifest.weights.files
    )
    manifest.weights = structs.replace(manifest.weights, files=files)
    return manifest


def test_embedded_weights_need_no_option_and_give_the_published_outputs():
    """The golden arrays are the published code's: the reference itself is compared with them here."""
    golden = np.load(GOLDEN / "expected.npz")
    reference = build_reference(manifest_of("embedded"), {})
    sampler = reference.sampler
    (output,) = sampler.sample(golden["noise"], (golden["labels"],), reference.plans["1"])
    assert np.abs(output.logits - golden["onestep_step0_raw_logits"][:, :5]).max() < 2e-5
    assert np.abs(output.sequence - golden["onestep_step0_sequence"]).max() < 2e-5
    assert np.abs(sampler.decode(output.sequence) - golden["onestep_image"].clip(0, 1)).max() < 2e-5


def test_modules_and_inputs_move_to_the_device(monkeypatch):
    """`meta` has no numbers, and refuses what was left on the CPU: all that fails is the copy back."""
    monkeypatch.setattr("ddexport.validate.reference.torch_device", lambda name: None)
    reference = build_reference(manifest_of("embedded"), {}, device="meta")
    golden = np.load(GOLDEN / "expected.npz")
    sampler = reference.sampler
    for call in (
        lambda: sampler.sample(golden["noise"], (golden["labels"],), reference.plans["1"]),
        lambda: sampler.decode(golden["onestep_step0_sequence"]),
    ):
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            call()


def test_embedded_weights_that_changed_since_the_export_are_refused():
    """And a file for them, and random weights without a seed."""
    with pytest.raises(ReferenceFilesError):
        build_reference(changed_hash(manifest_of("embedded"), "tokenizer"), {})
    with pytest.raises(ReferenceFilesError) as caught:
        build_reference(manifest_of("embedded"), {"student": GOLDEN / "student.pth"})
    assert "--checkpoint" in caught.value.hint
    with pytest.raises(ReferenceFilesError):
        build_reference(manifest_of("random", weights=Weights(kind="random")), {})


def test_a_part_that_was_not_replaced_at_the_export_needs_no_file():
    """`ddexport onnx --model digits-var --checkpoint mine.pth`: the tokenizer is still the one that ships."""
    manifest = manifest_of("checkpoint")
    student, tokenizer = manifest.weights.files
    manifest.weights = structs.replace(
        manifest.weights, files=(structs.replace(student, file="mine.pth"), tokenizer)
    )
    build_reference(manifest, {"student": GOLDEN / "student.pth", "tokenizer": None})
    with pytest.raises(ReferenceFilesError):
        build_reference(manifest, {})
