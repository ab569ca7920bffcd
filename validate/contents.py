"""What a bundle says of itself, compared with what ships with the project: recipe, labels, codebook, noise.

A recipe that is wrong on both sides of a comparison shows in no row of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import structs

from ddexport.runtime.bundle import (
    DAMAGED,
    FILE_NAME,
    Manifest,
    Teacher,
    Text,
    read_manifest,
    resolve,
    sha256_of,
)
from ddexport.runtime.errors import BundleError, VerificationError
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.records import DAMAGED as UNREADABLE
from ddexport.runtime.records import read_json

if TYPE_CHECKING:
    from ddexport.recipe import Recipe
    from ddexport.validate.metrics._base import FloatArray
    from ddexport.validate.reference import TorchReference

SHOWN = 5
# Of docs/bundle.md: the first numbers of image 4294967301 of seed 2**64 - 1.
VECTOR_SEED, VECTOR_IMAGE = 2**64 - 1, 4294967301
NOISE_VECTOR = (0.28189227, -1.47097623, 0.532521009, -1.00337565, 0.252837837, 0.514755428)
UNIFORM_VECTOR = (0.0371752161, 0.2498824926, 0.5859116724, 0.0283897178, 0.0909183837, 0.0905515937)


def open_manifest(root: Path) -> tuple[Manifest, str]:
    """The manifest of a bundle, its hashes checked, and its SHA-256.

    Raises VerificationError where it is damaged, or its recipe is not the one of that name that ships.
    """
    from ddexport.recipe import load_recipe, recipe_names, whole_recipe, with_student

    try:
        manifest = read_manifest(root)
    except BundleError as error:
        if error.hint not in (DAMAGED, UNREADABLE):
            raise
        raise VerificationError(f"the bundle {root} is damaged: {error.message}", error.hint) from error
    if manifest.name in recipe_names():
        shipped = load_recipe(manifest.name)
        if shipped.condition and manifest.schedules:  # which may be the checkpoint's
            taken = {"schedules": manifest.recipe.get("schedules"), "split": manifest.sequence.split}
            taken["vector"] = manifest.recipe.get("condition", {}).get("vector")
            shipped = with_student(shipped, taken, "the bundle")
        other = f"the {manifest.name} that ships has"
        _refuse(manifest, list(_differences(whole_recipe(manifest), shipped.to_dict(), "recipe", other)))
    return manifest, sha256_of(root / FILE_NAME)


def check_contents(root: Path, manifest: Manifest, reference: TorchReference) -> None:
    """Raises VerificationError that names what is not as its recipe says, or not as the reference has it."""
    faults = [*_manifest_faults(manifest, reference.recipe), *_label_faults(root, manifest, reference.recipe)]
    if manifest.text is not None:
        faults += _text_faults(root, manifest.text, reference)
    if manifest.teacher is not None:
        faults += _codebook_faults(root, manifest.teacher.codebook.file, reference.codebook)
        faults += _teacher_faults(manifest.teacher, reference.teacher) if reference.teacher else ()
    _refuse(manifest, [*faults, *_noise_faults()])


def _refuse(manifest: Manifest, faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise VerificationError(
            f"bundle {manifest.name} does not match its recipe: {'; '.join(faults[:SHOWN])}{more}",
            "export it again; give the recipe another name if it is a model of your own",
        )


def _manifest_faults(manifest: Manifest, recipe: Recipe) -> Iterator[str]:
    """What the runtime reads against the recipe that the reference is built from."""
    said, wanted = json.loads(manifest.to_json()), recipe.to_dict()
    side = recipe.image.size
    wanted["image"] = {"height": side, "width": side, "channels": recipe.image.channels}
    wanted = {"schedules": {}, "classes": 0, **wanted}
    keys = ["name", "title", "sequence", "classes", "image", "schedules"]
    if manifest.teacher is None:
        alone = {k: schedule for k, schedule in wanted["schedules"].items() if "teacher" not in schedule}
        wanted["schedules"] = alone
    else:
        wanted["teacher"] = structs.asdict(recipe.teacher) if recipe.teacher else {}
        said["teacher"] = {key: getattr(manifest.teacher, key) for key in wanted["teacher"]}
        keys.append("teacher")
    for name, decoder in manifest.decoders.items():
        stated = wanted.get("decoders", {}).get(name, {}).get("fid")
        if decoder.fid:  # of other weights nothing is known
            fid = said["decoders"][name]["fid"]
            yield from _differences(fid, stated, f"decoders.{name}.fid", "its recipe has")
    for key in keys:
        yield from _differences(said[key], wanted[key], f"bundle.json: {key}", "its recipe has")


def _label_faults(root: Path, manifest: Manifest, recipe: Recipe) -> Iterator[str]:
    from ddexport.recipe import RecipeError, class_names

    try:
        wanted = class_names(recipe)
    except RecipeError:  # a list of the user's own
        return
    names = read_json(resolve(root, manifest.labels.file))
    yield from _differences(names, wanted, "labels", "the list that ships has")


def _codebook_faults(root: Path, file: str, wanted: FloatArray) -> Iterator[str]:
    table = np.load(resolve(root, file), allow_pickle=False)
    if table.shape != wanted.shape:
        yield f"{file} has shape {table.shape}, the tokenizer's {wanted.shape}"
    elif entries := int((table.view(np.uint32) != wanted.view(np.uint32)).any(axis=1).sum()):
        yield f"{entries} entries of {file} are not the tokenizer's"


def _teacher_faults(teacher: Teacher, module: Any) -> Iterator[str]:
    size = module.geometry
    wanted = {"starts": tuple(size.starts), "guidance": module.guidance, "layers": size.depth}
    wanted |= {"heads": size.heads, "head_width": size.head_width}
    said = {key: getattr(teacher, key) for key in wanted}
    yield from _differences(said, wanted, "bundle.json: teacher", "the model has")


def _text_faults(root: Path, text: Text, reference: TorchReference) -> Iterator[str]:
    """The sizes against the model's, the tokenizer against that of the text encoder."""
    size, condition = reference.geometry, reference.recipe.condition
    wanted: dict[str, Any] = {"layers": size.depth, "heads": size.heads, "head_width": size.head_width}
    wanted |= {key: getattr(condition, key, None) for key in ("tokens", "width")}
    said = {key: getattr(text, key) for key in wanted}
    yield from _differences(said, wanted, "bundle.json: text", "the model has")
    own, file = reference.tokenizer_file, text.tokenizer
    if own and file and sha256_of(own) != sha256_of(resolve(root, file.file)):
        yield f"{file.file} is not the {own.name} of the text encoder"


def _noise_faults() -> Iterator[str]:
    """The one thing that both sides share."""
    noise = gaussian_noise(VECTOR_SEED, [VECTOR_IMAGE], 1, len(NOISE_VECTOR)).ravel()
    uniforms = uniform_numbers(VECTOR_SEED, [VECTOR_IMAGE], len(UNIFORM_VECTOR)).ravel()
    sides = (("noise", noise, NOISE_VECTOR), ("uniform numbers", uniforms, UNIFORM_VECTOR))
    for name, got, wanted in sides:
        if not np.allclose(got, wanted, rtol=0, atol=1e-6):
            yield f"the {name} of the runtime are not those of docs/bundle.md"


def _differences(got: Any, wanted: Any, where: str, other: str) -> Iterator[str]:
    """`where.key is ..., OTHER ...` for each leaf at which two pieces of plain data differ."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in got if key not in wanted)]:
            yield from _differences(got.get(key), wanted.get(key), f"{where}.{key}", other)
    elif got != wanted:
        yield f"{where} is {_short(got)}, {other} {_short(wanted)}"


def _short(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
