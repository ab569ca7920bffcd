"""The PyTorch reference of a bundle: the modules its manifest says it was made from, in eager mode, and what
they draw.

torch is imported when a reference is built, so that the command's help stays fast. Shapes: N images, L
positions, Cv width of a code, T tokens of all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from msgspec import structs

from ddexport.devices import torch_device
from ddexport.recipe import FILE_OPTIONS
from ddexport.runtime.bundle import ENCODER, FULL, PREFIXES, TEACHER, Manifest, Source, decoder_role
from ddexport.runtime.errors import DDError
from ddexport.validate.conditions import Classes, Texts, conditions_of, encoded, prompts_of, spread
from ddexport.validate.metrics._base import Drawn, FloatArray, IntArray

if TYPE_CHECKING:
    from ddexport.recipe import Recipe
    from ddexport.validate.sampling import Pass, Plan, Sampler

SHOWN_DIGITS = 12


class ReferenceFilesError(DDError):
    """The reference cannot be built: a checkpoint is missing, or is not the one the bundle was made from."""


@dataclass(frozen=True)
class Request:
    """What both sides draw, in batches of at most `batch`.

    labels (N,) int64, of classes or of texts; seeds (N,) uint64, and of image 0 of each seed the noise (N, L,
    Cv) float32 and the numbers (N, L) float64 by which a teacher draws.
    """

    conditions: Classes | Texts
    labels: IntArray
    seeds: npt.NDArray[np.uint64]
    batch: int
    noise: FloatArray
    uniforms: npt.NDArray[np.float64]

    @property
    def places(self) -> tuple[str, ...]:
        """The name of each image, for people."""
        return tuple(f"image {i} ({self.conditions.kind} {label})" for i, label in enumerate(self.labels))


def seeds_of(images: int, seed: int) -> npt.NDArray[np.uint64]:
    """Consecutive seeds, the first of which is `seed`."""
    return np.array([(seed + i) % 2**64 for i in range(images)], dtype=np.uint64)


def request_of(
    manifest: Manifest, images: int, seed: int, batch: int, conditions: Classes | Texts | None = None
) -> Request:
    """Labels spread over all classes or texts, and consecutive seeds. conditions: those of the reference,
    which are needed where the bundle has a text encoder."""
    from ddexport.validate.sampling import noise_of, uniforms_of

    conditions = conditions or conditions_of(manifest)
    size, seeds, labels = manifest.sequence, seeds_of(images, seed), spread(conditions.count, images, seed)
    noise, uniforms = noise_of(seeds, size.length, size.width), uniforms_of(seeds, size.length)
    return Request(conditions, labels, seeds, batch, noise, uniforms)


@dataclass(frozen=True)
class ReferenceRun:
    """What the reference drew in one schedule: all passes, the images (N, 3, H, W) in [0, 1] and as bytes."""

    steps: str
    plan: Plan
    passes: list[Pass]
    images: FloatArray
    pixels: npt.NDArray[np.uint8]
    others: Mapping[str, FloatArray]  # images of further decoders, by name

    @property
    def title(self) -> str:
        """The schedule, for people."""
        if self.steps == "teacher":
            return "teacher alone"
        return f"{self.steps} step{'s' if self.steps != '1' else ''}"

    def decoded(self, decoder: str) -> FloatArray:
        """The images (N, 3, H, W) in [0, 1] of a decoder."""
        return self.images if decoder == FULL else self.others[decoder]

    @property
    def drawn(self) -> Drawn:
        """The outcome, with the tokens of all passes."""
        tokens = np.concatenate([step.tokens for step in self.passes], axis=1)
        return Drawn(tokens, self.passes[-1].sequence, self.pixels)


class TorchReference:
    """The bundle's modules in eager mode, float32, without the tables and rewrites of the export.

    plans: what each number of steps draws, and "teacher" where the bundle has one, as the recipe says.
    """

    def __init__(
        self,
        student: Any,
        tokenizer: Any,
        teacher: Any,
        recipe: Recipe,
        conditions: Classes | Texts,
        device: str = "cpu",
        decoders: Mapping[str, Any] | None = None,
        tokenizer_file: Path | None = None,
    ) -> None:
        """student, teacher: modules, or None. decoders: further ones, by name. tokenizer_file: that of the
        text encoder."""
        self.decoders, self.conditions, self.tokenizer_file = decoders or {}, conditions, tokenizer_file
        self._student, self._tokenizer, self.teacher = student, tokenizer, teacher
        self.recipe, self.device = recipe, device
        self.plans = plans_of(recipe, teacher is not None)

    @property
    def codebook(self) -> FloatArray:
        """The tokenizer's table (V, Cv)."""
        return np.asarray(self._tokenizer.codebook.detach().cpu().numpy())

    @property
    def geometry(self) -> Any:
        """The sizes of the transformers."""
        return (self._student or self.teacher).geometry

    def weights(self, role: str) -> dict[str, npt.NDArray[Any]]:
        """The parameters and buffers of the module that a graph was made from, by name."""
        return {name: tensor.cpu().numpy() for name, tensor in self.module(role).state_dict().items()}

    def module(self, role: str) -> Any:
        """The module that a graph was made from."""
        others = {decoder_role(name): decoder for name, decoder in self.decoders.items()}
        own = {"student": self._student, "decoder": self._tokenizer, TEACHER: self.teacher}
        prefixes = {PREFIXES[part]: own[part] for part in PREFIXES}
        return (own | others | prefixes)[role]

    @property
    def sampler(self) -> Sampler:
        """What draws images from these modules, independently of the runtime."""
        from ddexport.validate.sampling import Sampler, TokenChoice

        if self.teacher is None:
            return Sampler(self._student, self._tokenizer, device=self.device)
        from ddexport.distill.trainers import trainer

        assert self.recipe.teacher is not None
        generate = trainer(self.teacher.family).generate
        choice = TokenChoice(**structs.asdict(self.recipe.teacher))
        return Sampler(self._student, self._tokenizer, self.teacher, generate, choice, self.device)

    def draw(self, request: Request, advance: Callable[[int], None]) -> list[ReferenceRun]:
        """Every schedule, in batches; `advance` is told how many images are done."""
        from ddexport.validate.sampling import Pass, Sampler, pixels_of

        sampler, runs = self.sampler, []
        for steps, plan in self.plans.items():
            parts: list[list[Pass]] = []
            images: list[FloatArray] = []
            for start in range(0, len(request.labels), request.batch):
                rows = slice(start, start + request.batch)
                labels = request.labels[rows]
                given = request.conditions.of_reference(labels)
                parts.append(sampler.sample(request.noise[rows], given, plan, request.uniforms[rows]))
                images.append(sampler.decode(parts[-1][-1].sequence))
                advance(len(labels))
            passes = [Pass.joined(same) for same in zip(*parts, strict=True)]
            decoded, sequences = (
                np.concatenate(images),
                np.split(passes[-1].sequence, range(request.batch, len(request.labels), request.batch)),
            )
            others = {
                name: np.concatenate([Sampler(None, module, device=self.device).decode(s) for s in sequences])
                for name, module in self.decoders.items()
            }
            runs.append(ReferenceRun(steps, plan, passes, decoded, pixels_of(decoded), others))
        return runs


def build_reference(
    manifest: Manifest,
    files: Mapping[str, Path | None],
    weights: str | None = None,
    threads: int | None = None,
    teacher: bool = False,
    device: str = "cpu",
    encoder: bool = True,
) -> TorchReference:
    """Rebuilds what the bundle was exported from, by the recipe in its manifest.

    files: the published files of a bundle of kind `checkpoint`, by role, but for those that the export
    fetched. weights: the name of a state dict in them; by default the one that the bundle was made from.
    threads: of torch, for the whole process. teacher, encoder: whether the bundle's, if it has one, is wanted
    too; the text encoder encodes the prompts, and is not kept.
    Raises ReferenceFilesError for a file that is missing, not wanted, or has another SHA-256 than the
    manifest's, HubError for one that cannot be fetched, and DDError for what cannot be read.
    """
    import torch

    from ddexport.families._checkpoint import connect, load_part, random_part
    from ddexport.recipe import recipe_of
    from ddexport.text_encoder import text_encoder

    torch_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    others = {name: decoder_role(name) for name in manifest.decoders}
    recipe, origin, text = recipe_of(manifest), manifest.weights, manifest.text
    roles = ["tokenizer", *(["student"] if recipe.schedules else []), *others.values()]
    roles += [TEACHER] if teacher and manifest.teacher is not None else []
    sources = {source.role: source for source in origin.files}
    if origin.kind == "random":
        _refuse_files(manifest, recipe, files)
        if origin.seed is None:
            message = f"bundle {manifest.name} does not say the seed of its weights"
            raise ReferenceFilesError(message, "export it again")
        parts = {role: random_part(recipe, role, origin.seed) for role in roles}
    else:
        parts = {}
        for role in roles:
            path = _file_of(manifest, recipe, role, sources.get(role), files)
            copy = weights or (sources[role].weights if role in sources else None)
            parts[role] = load_part(recipe, role, path, copy)
    features = tokenizer_file = None
    if encoder and text is not None and text.tokenizer is not None:
        module = text_encoder(_file_of(manifest, recipe, ENCODER, sources.get(ENCODER), files))
        tokenizer_file = module.tokenizer_file(text.width)
        features = encoded(module.to(device), text, prompts_of(manifest)[1])
        del module  # it may be larger than all the others
    for part in parts.values():
        connect(part, parts["tokenizer"])
    parts = {role: part.to(device) for role, part in parts.items()}
    decoders = {name: parts[role] for name, role in others.items()}
    own = (parts.get("student"), parts["tokenizer"], parts.get(TEACHER))
    conditions = conditions_of(manifest, features, encoder)
    return TorchReference(*own, recipe, conditions, device, decoders, tokenizer_file)


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
    from ddexport.families._weight_file import fingerprint
    from ddexport.recipe import Source as Entry
    from ddexport.recipe import embedded_weights

    part, option = recipe.files.get(role, Entry()), _option(recipe, role)
    name, file = source.file if source else part.file, files.get(role)
    if manifest.weights.kind == "embedded":
        _refuse_files(manifest, recipe, files)
    # Of a recipe with embedded weights one part can have been replaced at the export: the other one ships.
    if manifest.weights.kind == "embedded" or (source and name == part.embedded and not file):
        path = Path(embedded_weights(part))
        what, hint = f"the embedded weights {path.name} are", "they have changed: export the bundle again"
    elif file is None and source and source.repository:
        from ddexport.hub.files import HubFile, fetch

        names = (source.file, *part.beside)
        path = fetch([HubFile(source.repository, name, source.commit) for name in names])[0].path
        path = path.parent if role == ENCODER else path
        what, hint = f"{source.file} of {source.repository} is", "export the bundle again"
    elif file is None:
        digest = f" (sha256 {_short(source.sha256)})" if source else ""
        raise ReferenceFilesError(
            f"bundle {manifest.name} was made from {name}{digest}; the reference needs that file",
            f"give it with {option} {name}",
        )
    elif not file.exists():
        raise ReferenceFilesError(f"{option}: there is no file {file}", f"give the path of {name}")
    else:
        path, what = file, f"{option} {file} is"
        hint = f"give the {name} that the bundle was exported from with {option}, or export the bundle again"
    if source is not None and (sha256 := fingerprint(path)[0]) != source.sha256:
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
    return (role in recipe.files and recipe.files[role].option) or FILE_OPTIONS[role]


def _short(digest: str) -> str:
    return f"{digest[:SHOWN_DIGITS]}..."
