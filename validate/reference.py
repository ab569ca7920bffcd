"""The PyTorch reference of a bundle: the modules its manifest says it was made from, in eager mode.

torch is imported when a reference is built, so that the command's help stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from runtime.errors import DDError
from runtime.manifest import Manifest, Source, sha256_of
from validate.devices import torch_device
from validate.metrics._base import FloatArray, IntArray, StudentOutput

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

ROLES = ("student", "tokenizer")
SHOWN_DIGITS = 12


class ReferenceFilesError(DDError):
    """The reference cannot be built: a checkpoint is missing, or is not the one the bundle was made from."""


class TorchReference:
    """Student and decoder as eager float32 modules on one device; a `validate.batches.Model`."""

    def __init__(self, student: Any, tokenizer: Any, teacher: Any = None, device: str = "cpu") -> None:
        """teacher: its pass with guidance and an explicit cache, `ddexport.graph.wrappers.TeacherGraph`."""
        self._student, self._tokenizer, self._teacher = student, tokenizer, teacher
        self._device = device

    def student(self, tokens: FloatArray, label: IntArray, known: IntArray) -> StudentOutput:
        """tokens (B, L, Cv) float32, label (B,), known (B,) int64."""
        import torch

        with torch.inference_mode():
            feeds = (torch.from_numpy(array.copy()).to(self._device) for array in (tokens, label, known))
            sequence, logits = self._student(*feeds)
        return StudentOutput(sequence.cpu().numpy(), logits.cpu().numpy())

    def decode(self, sequence: FloatArray) -> FloatArray:
        """sequence (B, L, Cv) float32 -> images (B, 3, H, W) float32 in [0, 1]."""
        import torch

        with torch.inference_mode():
            images: FloatArray = (
                self._tokenizer(torch.from_numpy(sequence.copy()).to(self._device)).cpu().numpy()
            )
        return images

    def run(self, key: str, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """What the graph of that key computes, on named arrays; the names are those of `runtime.contract`."""
        import torch

        role, _, split = key.partition("@")
        module = {"student": self._student, "decoder": self._tokenizer, "teacher": self._teacher}[role]
        if split:
            module = self._student.at_split(int(split))
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(array.copy()).to(self._device) for array in feeds.values()))
        arrays = [output.cpu().numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
        caches = [f"new_{name}" for name in feeds if name.startswith(("key_", "value_"))]
        names = {"student": ["sequence", "logits"], "decoder": ["image"], "teacher": ["logits", *caches]}
        return dict(zip(names[role], arrays, strict=True))


def build_reference(
    manifest: Manifest,
    files: Mapping[str, Path | None],
    weights: str | None = None,
    threads: int | None = None,
    teacher: bool = False,
    device: str = "cpu",
) -> TorchReference:
    """Rebuilds what the bundle was exported from, by the recipe in its manifest.

    Args:
        manifest: of the bundle; its `weights` say where they came from.
        files: the published files of a bundle of kind `checkpoint`, by role: student, tokenizer, teacher.
        weights: "ema" or "model"; by default the copy that the bundle was made from.
        threads: of torch, for the whole process; by default torch's own choice.
        teacher: whether the bundle's teacher, if it has one, is wanted too.
        device: of PyTorch, see `validate.devices`, which also keeps its products in float32.

    Raises:
        ReferenceFilesError: a file is missing, not wanted, or has another SHA-256 than the manifest's.
        DDError: the recipe or a file is not readable.
    """
    import torch

    from ddexport.families._checkpoint import connect, load_part, random_part
    from ddexport.recipe import recipe_from_dict

    if threads is not None:
        torch.set_num_threads(threads)
    roles = (*ROLES, "teacher") if teacher and manifest.teacher is not None else ROLES
    recipe = recipe_from_dict(manifest.recipe, where=f"the recipe in bundle {manifest.name}")
    origin = manifest.weights
    if origin.kind == "random":
        _refuse_files(manifest, recipe, files)
        if origin.seed is None:
            raise ReferenceFilesError(
                f"bundle {manifest.name} does not say the seed of its weights", "export it again"
            )
        parts = {role: random_part(recipe, role, origin.seed) for role in roles}
    else:
        sources = {source.role: source for source in origin.files}
        parts = {}
        for role in roles:
            path = _file_of(manifest, recipe, role, sources.get(role), files)
            copy = weights or (sources[role].weights if role in sources else None) or "ema"
            parts[role] = load_part(recipe, role, path, copy)
    torch_device(device)
    connect(parts["student"], parts["tokenizer"])  # before: a codebook that nobody gave yet cannot be moved
    parts = {role: part.to(device) for role, part in parts.items()}
    if "teacher" not in parts:
        return TorchReference(parts["student"], parts["tokenizer"], device=device)
    from ddexport.graph.wrappers import TeacherGraph

    graph = TeacherGraph(parts["teacher"], parts["tokenizer"]).eval().to(device)
    return TorchReference(parts["student"], parts["tokenizer"], graph, device)


def describe_weights(manifest: Manifest) -> str:
    """Where the weights of a bundle come from, in a few words."""
    if manifest.weights.kind == "random":
        return f"random weights, seed {manifest.weights.seed}"
    names = ", ".join(source.file for source in manifest.weights.files)
    kind = "embedded weights" if manifest.weights.kind == "embedded" else "checkpoint"
    return f"{kind} {names}".rstrip()


def _file_of(
    manifest: Manifest, recipe: Recipe, role: str, source: Source | None, files: Mapping[str, Path | None]
) -> Path:
    """The file that `role` is loaded from, its SHA-256 checked against the manifest's."""
    from ddexport.recipe import embedded_weights

    shipped = recipe.files[role].embedded
    if manifest.weights.kind == "embedded":
        _refuse_files(manifest, recipe, files)
    # The second case is a recipe with embedded weights, the other part of which was replaced at the export.
    if manifest.weights.kind == "embedded" or (source and source.file == shipped and not files.get(role)):
        path = Path(embedded_weights(recipe.files[role]))
        what = f"the embedded weights {path.name} are"
        hint = "they have changed since the export: export the bundle again"
    else:
        option = _option(recipe, role)
        name = source.file if source else recipe.files[role].file
        given = files.get(role)
        if given is None:
            digest = f" (sha256 {_short(source.sha256)})" if source else ""
            raise ReferenceFilesError(
                f"bundle {manifest.name} was made from {name}{digest}; the reference needs that file",
                f"give it with {option} {name}",
            )
        if not given.is_file():
            raise ReferenceFilesError(f"{option}: there is no file {given}", f"give the path of {name}")
        path = given
        what = f"{option} {path} is"
        hint = f"give the {name} that the bundle was exported from with {option}, or export the bundle again"
    if source is not None and (found := sha256_of(path)) != source.sha256:
        raise ReferenceFilesError(
            f"{what} not what bundle {manifest.name} was made from:"
            f" sha256 {_short(found)}, the manifest says {_short(source.sha256)}",
            hint,
        )
    return path


def _refuse_files(manifest: Manifest, recipe: Recipe, files: Mapping[str, Path | None]) -> None:
    for role, path in files.items():
        if path is not None:
            raise ReferenceFilesError(
                f"bundle {manifest.name} was made from {describe_weights(manifest)}, not from {path}",
                f"leave out {_option(recipe, role)}",
            )


def _option(recipe: Recipe, role: str) -> str:
    return (
        recipe.files[role].option
        or {
            "student": "--checkpoint",
            "tokenizer": "--vae",
            "teacher": "--teacher",
        }[role]
    )


def _short(digest: str) -> str:
    return f"{digest[:SHOWN_DIGITS]}..."
