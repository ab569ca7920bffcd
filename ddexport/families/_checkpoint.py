"""Reading and writing the weights of a part.

A file may be a published checkpoint or one of a training run: it is searched for the recipe's model. They are
untrusted: every key and every shape must be the expected one, every weight a finite float32 number.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ddexport.families import family
from ddexport.families._base import Layout, Student
from ddexport.families._small_decoder import SmallDecoder
from ddexport.families._weight_file import SHARD, CheckpointError, read_weights
from ddexport.recipe import student_config
from ddexport.runtime.files import atomic_write

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

NAMED_KEYS = 4
# What data parallelism, torch.compile, FSDP and activation checkpointing put into names, and what torch's
# AveragedModel puts beside the weights.
WRAPPERS = re.compile(r"(?<![^.])((module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
UPDATES = "n_averaged"
COPIES = {"ema_parameters": "ema", "var_wo_ddp": "model"}  # VAR's names; LlamaGen's are these
CONTAINERS = {".", "module", "state_dict"}  # places that do not say which copy it is

Shapes: TypeAlias = dict[str, tuple[int, ...]]


class _Copy(NamedTuple):
    """A state dict in a file: the keys that lead to it joined by dots, or "."; how it is not the recipe's."""

    place: str
    state: Mapping[str, Tensor]
    faults: list[str]

    def is_called(self, name: str) -> bool:
        last = self.place.rpartition(".")[2]
        return name in (self.place, COPIES.get(last)) or self.place.endswith(f".{name}")


def load_part(recipe: Recipe, role: str, path: Path | str, weights: str | None = None) -> nn.Module:
    """The module of `role` with the weights of the file, float32, in evaluation mode.

    Args:
        recipe: says which geometry the file must have.
        role: "student", "tokenizer" or "teacher".
        path: a checkpoint with the published key names; if it is sharded, its index or its directory.
        weights: which state dict to take where the file has several: the keys that lead to it joined by dots,
            the last of them, or "ema" or "model" of a published file; several names with commas, if files
            differ. A student must be there by one of them. None is "ema" if there is one.

    Raises:
        CheckpointError: the file is missing, damaged or unsafe, or does not hold the recipe's model.
    """
    path = Path(path)
    state = _find(recipe, role, path, weights).state
    with torch.device("meta"):
        module = family(recipe.family).build(recipe, role)
    layout = family(recipe.family).layout(recipe, role)
    module.load_state_dict(_converted(state, module, layout, path), strict=True, assign=True)
    return _ready(module)


def copy_taken(recipe: Recipe, role: str, path: Path, weights: str | None = None) -> str | None:
    """The name of the state dict that `load_part` takes: it chooses it again. None for the whole file."""
    place = _find(recipe, role, path, weights).place
    return None if place == "." else COPIES.get(place.rpartition(".")[2], place)


def random_part(recipe: Recipe, role: str, seed: int) -> nn.Module:
    """The module of `role` with reproducible random weights: no image worth seeing, but sane numbers.

    Matrices keep the scale of their input, so that logits spread by about one and no gate is closed; what
    trained models show in speed, memory and rounding is then shown by random ones too.
    """
    with torch.device("meta"):
        module = family(recipe.family).build(recipe, role)
    digest = hashlib.sha256(f"{seed}/{role}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    state = {}
    for name, parameter in module.state_dict().items():
        values = torch.randn(parameter.shape, generator=generator)
        if re.search(r"norm\w*\.weight$", name):
            values = 1 + 0.1 * values
        elif name.endswith("log_scale"):
            values = 1.4 + 0.3 * values
        elif name.endswith("bias"):
            values.mul_(0.1)
        elif parameter.ndim >= 2 and "embedding.weight" not in name:
            values.mul_(parameter[0].numel() ** -0.5)
        state[name] = values
    module.load_state_dict(state, strict=True, assign=True)
    return _ready(module)


def connect(part: nn.Module, tokenizer: Any) -> None:
    """Gives a part what it needs of the tokenizer: a student the codebook, which its sequence is composed of;
    a small decoder the way from sequences to latents."""
    if isinstance(part, Student):
        part.codebook = tokenizer.codebook.detach()
    elif isinstance(part, SmallDecoder):
        part.reader = tokenizer.without_codec()


def save_part(
    module: nn.Module, recipe: Recipe, role: str, path: Path | str, dtype: torch.dtype = torch.float16
) -> None:
    """Writes the weights as safetensors under their published names, atomically.

    Raises:
        CheckpointError: a weight is not finite in `dtype`.
    """
    from safetensors.torch import save

    state = {k: v.to(dtype).contiguous() for k, v in published_state(module, recipe, role).items()}
    for name, value in state.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{role}: {name} overflows {dtype}", "store it in float32")
    # One key: safetensors writes several in any order.
    metadata = {"ddexport": f"{role} of {recipe.name}"}
    if role == "student" and recipe.condition:
        metadata = {"config": json.dumps(student_config(recipe), sort_keys=True)}
    with atomic_write(Path(path)) as stream:
        stream.write(save(state, metadata))


def published_state(module: nn.Module, recipe: Recipe, role: str) -> dict[str, Tensor]:
    """The module's weights as the published files spell them: what `load_part` reads."""
    layout = family(recipe.family).layout(recipe, role)
    state: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        names, rows = layout.published(key), layout.rows(key)
        parts = (value if rows is None else value[rows.argsort()]).chunk(len(names))
        state.update(zip(names, parts, strict=True))
    return state


def _ready(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


def _find(recipe: Recipe, role: str, path: Path, weights: str | None) -> _Copy:
    """The state dict of the recipe's part in a file; of several the one asked for."""
    expected, free = _expected(recipe, role)
    data = read_weights(path)
    copies = list(_copies(data, expected, free))
    if not copies:
        content = _named("nothing but", map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise CheckpointError(f"{path} holds no weights, but {content}", f"give a state dict of the {role}")
    names = weights.split(",") if weights else ["ema"]
    asked = [c for c in copies if c.place in names] or [c for c in copies if any(map(c.is_called, names))]
    if role != "student":  # the names may be of the student's file
        asked = [copy for copy in asked if not copy.faults]
    elif not weights:
        asked = [copy for copy in asked if copy.state.keys() & expected]
    fitting = [copy for copy in asked or copies if not copy.faults]
    if not fitting:
        nearest = max(asked or copies, key=lambda copy: len(copy.state.keys() & expected))
        where = "" if nearest.place == "." else f" the nearest, {nearest.place}, differs:"
        shard = "it is one of several shards: give their directory" if SHARD.fullmatch(path.name) else ""
        raise CheckpointError(
            f"{path} does not hold the {role} of {recipe.name}:{where} {'; '.join(nearest.faults)}",
            shard or _guess(nearest.state, recipe) or "check the model's name and the file",
        )
    places = ", ".join(copy.place for copy in fitting)
    if weights and not asked and role == "student" and {copy.place for copy in fitting} - CONTAINERS:
        hint = f"choose with --weights {fitting[0].place}"
        raise CheckpointError(f"{path} has no {weights}; it holds the student as {places}", hint)
    if len(fitting) > 1:
        fitting = [copy for copy in fitting if copy.is_called("ema")]
    if len(fitting) != 1:
        raise CheckpointError(f"{path} holds the {role} as {places}", "choose with --weights NAME")
    return fitting[0]


def _copies(data: object, expected: Shapes, free: Collection[str]) -> Iterator[_Copy]:
    """The dictionaries of tensors in a file, and the parts of them behind a prefix of the recipe's keys."""
    anchor = next(iter(expected))
    for path, tensors in _dictionaries(data):
        named = {WRAPPERS.sub("", key): value for key, value in tensors.items()}
        if len(named) < len(tensors):  # with wrapper and without: not to be taken for one another
            named = tensors
        prefixes = {key.removesuffix(anchor) for key in named if f".{key}".endswith(f".{anchor}")}
        for prefix in sorted(prefixes) or [""]:
            state = {key[len(prefix) :]: named[key] for key in named if key.startswith(prefix)}
            place = ".".join((*path, prefix)).strip(".") or "."
            yield _Copy(place, state, list(_faults(state, expected, free)))


def _dictionaries(data: object) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The keys that lead to each nested dictionary with tensors in it, and these tensors."""
    queue: list[tuple[tuple[str, ...], object]] = [((), data)]
    opened: set[int] = set()
    for path, node in queue:
        if not isinstance(node, Mapping):
            continue
        if tensors := {k: v for k, v in node.items() if isinstance(k, str) and isinstance(v, Tensor)}:
            yield path, tensors
        if id(node) not in opened:  # a dictionary may hold itself
            opened.add(id(node))
            queue.extend(((*path, str(key)), value) for key, value in node.items())


def _expected(recipe: Recipe, role: str) -> tuple[Shapes, Collection[str]]:
    """Names and shapes of a part's published tensors, and patterns of those that may be missing."""
    with torch.device("meta"):
        module = family(recipe.family).build(recipe, role)
    layout = family(recipe.family).layout(recipe, role)
    shapes = {}
    for key, value in module.state_dict().items():
        names = layout.published(key)
        for name, part in zip(names, value.chunk(len(names)), strict=True):
            shapes[name] = tuple(part.shape)
    return shapes, (*layout.recomputable, UPDATES)


def _faults(state: Mapping[str, Tensor], expected: Shapes, free: Collection[str]) -> Iterator[str]:
    """What tells the tensors from the recipe's, by kind. Where blocks are missing, their number is told."""
    here, wanted = _blocks(state), _blocks(expected)
    counted = [stem for stem in wanted if here.get(stem, wanted[stem]) != wanted[stem]]
    for stem in counted:
        yield f"{here[stem]} {stem.rpartition('.')[2]}, the recipe has {wanted[stem]}"
    missing = [k for k in expected if k not in state]
    unknown = [k for k in state if k not in expected and not any(re.fullmatch(p, k) for p in free)]
    misshapen = [
        f"{k} {_shape(state[k].shape)} for {_shape(shape)}"
        for k, shape in expected.items()
        if k in state and _squeezed(state[k].shape) != _squeezed(shape)
    ]
    for what, keys in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen)):
        if others := [k for k in keys if not k.startswith(tuple(f"{stem}." for stem in counted))]:
            yield _named(what, others)


def _blocks(keys: Iterable[str]) -> dict[str, int]:
    """How many numbered blocks there are, by what precedes the number."""
    blocks = {block[0]: block[1] for key in keys if (block := re.match(r"(.*?)\.\d+\.", key))}
    return Counter(blocks.values())


def _converted(
    state: Mapping[str, Tensor], module: nn.Module, layout: Layout, path: Path
) -> dict[str, Tensor]:
    """The file's tensors under our names, float32."""
    converted = {}
    for key, parameter in module.state_dict().items():
        parts = [as_float32(state[name], f"{path}: {name}") for name in layout.published(key)]
        value = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(parameter.shape)
        rows = layout.rows(key)
        converted[key] = value if rows is None else value[rows]
    for key in state:
        for pattern, check in layout.recomputable.items():
            if re.fullmatch(pattern, key) and not _holds(check, state[key]):
                raise CheckpointError(
                    f"{path}: {key} is not the value that this family computes",
                    "the file was made by different code",
                )
    return converted


def as_float32(tensor: Tensor, what: str) -> Tensor:
    """A weight of any floating type as float32. Raises `CheckpointError` for what does not become it."""
    kind = str(tensor.dtype).removeprefix("torch.")
    packed = kind.startswith("float4")  # no conversion in PyTorch
    if not tensor.is_floating_point() or packed or tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{what} ({kind}) is not a dense array of floating numbers", "quantised? give the float weights"
        )
    if not (value := tensor.float()).isfinite().all():
        raise CheckpointError(f"{what} ({kind}) is not finite in float32", "get another copy")
    return value


def _holds(check: object, tensor: Tensor) -> bool:
    try:
        return bool(check(tensor.float()))  # type: ignore[operator]
    except RuntimeError:  # another number of elements
        return False


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its axes of one element: published files carry some that ours do not."""
    return tuple(n for n in shape if n != 1)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _named(what: str, names: Iterable[str]) -> str:
    keys = list(names)
    more = f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else ""
    return f"{what} {', '.join(keys[:NAMED_KEYS])}{more}".strip()


def _guess(state: Mapping[str, Tensor], recipe: Recipe) -> str:
    """Which part of which model these tensors are, as a sentence; empty if none fits."""
    from ddexport.recipe import load_recipe, recipe_names

    for candidate in (recipe, *map(load_recipe, recipe_names())):
        for role in candidate.roles:
            if any(not copy.faults for copy in _copies(state, *_expected(candidate, role))):
                return f"this looks like the {role} of {candidate.name}"
    return ""
