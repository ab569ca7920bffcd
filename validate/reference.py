"""The PyTorch reference of a bundle: the modules its manifest says it was made from, in eager mode.

torch is imported when a reference is built, so that the command's help stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from msgspec import structs

from ddexport.runtime.bundle import Manifest, Source, sha256_of
from ddexport.runtime.errors import DDError
from ddexport.validate.devices import torch_device
from ddexport.validate.metrics._base import FloatArray

if TYPE_CHECKING:
    from ddexport.recipe import Recipe
    from ddexport.validate.sampling import Plan, Sampler

ROLES = ("student", "tokenizer")
SHOWN_DIGITS = 12


class ReferenceFilesError(DDError):
    """The reference cannot be built: a checkpoint is missing, or is not the one the bundle was made from."""


class TorchReference:
    """The bundle's modules in eager mode, float32, without the tables and rewrites of the export.

    plans: what each number of steps draws, and "teacher" where the bundle has one, as the recipe says.
    """

    def __init__(
        self,
        student: Any,
        tokenizer: Any,
        teacher: Any = None,
        recipe: Recipe | None = None,
        device: str = "cpu",
    ) -> None:
        """teacher: its pass with guidance and an explicit cache, `ddexport.graph.wrappers.TeacherGraph`."""
        self._student, self._tokenizer, self._teacher = student, tokenizer, teacher
        self.recipe, self.device = recipe, device
        self.plans = plans_of(recipe, teacher is not None) if recipe else {}

    @property
    def codebook(self) -> FloatArray:
        """The tokenizer's table (V, Cv)."""
        table: FloatArray = self._tokenizer.codebook.detach().cpu().numpy()
        return table

    def weights(self, role: str) -> dict[str, npt.NDArray[Any]]:
        """The parameters and buffers of the module that a graph was made from, by name."""
        module = {"student": self._student, "decoder": self._tokenizer, "teacher": self.teacher}[role]
        return {name: tensor.cpu().numpy() for name, tensor in module.state_dict().items()}

    @property
    def teacher(self) -> Any:
        """The auto-regressive module, or None."""
        return None if self._teacher is None else self._teacher.teacher

    @property
    def sampler(self) -> Sampler:
        """What draws images from these modules, independently of the runtime."""
        from ddexport.validate.sampling import Sampler, TokenChoice

        module = self.teacher
        if module is None:
            return Sampler(self._student, self._tokenizer, device=self.device)
        from ddexport.distill.trainers import trainer

        assert self.recipe is not None
        assert self.recipe.teacher is not None
        generate, choice = trainer(module.family).generate, TokenChoice(**structs.asdict(self.recipe.teacher))
        return Sampler(self._student, self._tokenizer, module, generate, choice, self.device)

    def run(
        self, role: str, split: int | None, feeds: Mapping[str, npt.NDArray[Any]]
    ) -> dict[str, npt.NDArray[Any]]:
        """What the graph of a role computes, of the student with that split, on named arrays; the names are
        those of the contract."""
        import torch

        module = {"student": self._student, "decoder": self._tokenizer, "teacher": self._teacher}[role]
        if split:
            module = self._student.at_split(split)
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(array.copy()) for array in feeds.values()))
        arrays = [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
        caches = [f"new_{name}" for name in feeds if name.startswith(("key_", "value_"))]
        names = {"student": ["sequence", "tokens", "logits"], "decoder": ["image"]}
        return dict(zip(names.get(role, ["logits", *caches]), arrays, strict=True))


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
        device: torch's name of where it computes.

    Raises:
        ReferenceFilesError: a file is missing, not wanted, or has another SHA-256 than the manifest's.
        DDError: the recipe or a file is not readable.
    """
    import torch

    from ddexport.families._checkpoint import connect, load_part, random_part
    from ddexport.recipe import recipe_of

    torch_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    roles = (*ROLES, "teacher") if teacher and manifest.teacher is not None else ROLES
    recipe = recipe_of(manifest)
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
    connect(parts["student"], parts["tokenizer"])
    parts = {role: part.to(device) for role, part in parts.items()}
    graph = None
    if "teacher" in parts:
        from ddexport.graph.wrappers import TeacherGraph

        graph = TeacherGraph(parts["teacher"], parts["tokenizer"]).eval()
    return TorchReference(parts["student"], parts["tokenizer"], graph, recipe, device)


def plans_of(recipe: Recipe, teacher: bool) -> dict[str, Plan]:
    """The recipe's schedules by their number of steps, and "teacher", the whole auto-regressive model."""
    from ddexport.validate.sampling import Plan

    plans = {
        steps: Plan(
            schedule.known,
            schedule.split or recipe.sequence.split,
            (schedule.teacher.start, schedule.teacher.end) if schedule.teacher else None,
        )
        for steps, schedule in sorted(recipe.schedules.items(), key=lambda item: int(item[0]))
        if teacher or schedule.teacher is None
    }
    whole = {"teacher": Plan((), recipe.sequence.split, (0, recipe.sequence.length))}
    return plans | (whole if teacher else {})


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
        file = files.get(role)
        if file is None:
            digest = f" (sha256 {_short(source.sha256)})" if source else ""
            raise ReferenceFilesError(
                f"bundle {manifest.name} was made from {name}{digest}; the reference needs that file",
                f"give it with {option} {name}",
            )
        if not file.is_file():
            raise ReferenceFilesError(f"{option}: there is no file {file}", f"give the path of {name}")
        path = file
        what = f"{option} {path} is"
        hint = f"give the {name} that the bundle was exported from with {option}, or export the bundle again"
    if source is not None and (sha256 := sha256_of(path)) != source.sha256:
        raise ReferenceFilesError(
            f"{what} not what bundle {manifest.name} was made from:"
            f" sha256 {_short(sha256)}, the manifest says {_short(source.sha256)}",
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
