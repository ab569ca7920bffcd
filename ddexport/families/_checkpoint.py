"""Reading and writing the weights of a part: published `.pth` layouts and `.safetensors`.

Checkpoints are untrusted. Pickles are read with `weights_only`, so that none can run code; every key and
every shape must be the expected one.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddexport.families import family
from ddexport.families._base import GeometryError, Layout, Student
from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

NAMED_KEYS = 4


class CheckpointError(DDError):
    """A weight file that cannot be read, or that holds another model."""


def load_part(recipe: Recipe, role: str, path: Path | str, weights: str = "ema") -> nn.Module:
    """The module of `role` with the weights of the file, float32, in evaluation mode.

    Args:
        recipe: says which geometry the file must have.
        role: "student", "tokenizer" or "teacher".
        path: a published checkpoint or a `.safetensors` file with the published key names.
        weights: "ema" (what the authors sample with) or "model", where the file holds both.

    Raises:
        CheckpointError: the file is missing, damaged or unsafe, or its keys or shapes are not the recipe's.
    """
    path = Path(path)
    layout = family(recipe.family).layout(recipe, role)
    state = _unwrapped(_read(path), layout, recipe, weights, path)
    with torch.device("meta"):
        module = family(recipe.family).build(recipe, role)
    module.load_state_dict(_converted(state, module, layout, recipe, role, path), strict=True, assign=True)
    return _ready(module)


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


def connect(student: nn.Module, tokenizer: nn.Module) -> None:
    """Gives the student the tokenizer's codebook, which its sequence is composed of."""
    if isinstance(student, Student):
        student.codebook = tokenizer.codebook.detach()


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
    with atomic_write(Path(path)) as stream:
        stream.write(save(state, {"model": recipe.name, "role": role}))


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


def _read(path: Path) -> object:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}", "check the path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        # LlamaGen's training code keeps its command line beside the weights: plain attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_plain_zip(path))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} holds objects that are not weights ({named[1]}): loading them could run code",
                "save the state dict alone, or convert the file to .safetensors",
            ) from error
        raise CheckpointError(
            f"{path} is not a checkpoint, or not one of weights alone",
            "give a .pth file as torch.save writes it, or a .safetensors file",
        ) from error
    except Exception as error:  # the bytes are untrusted: a damaged pickle can make the reader raise anything
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({path.stat().st_size:,} bytes)",
            "download it again and compare its size with the Hub's",
        ) from error


def _is_plain_zip(path: Path) -> bool:
    """Whether the file is in torch's zip format and can be mapped. Refuses one that unpacks to more."""
    with path.open("rb") as stream:
        if stream.read(4) != b"PK\3\4":
            return False
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise CheckpointError(f"{path} is compressed; checkpoints are not", "save it with torch.save")
    return True


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({path.stat().st_size:,} bytes)",
            "download it again and compare its size with the Hub's",
        ) from error


def _unwrapped(
    data: object, layout: Layout, recipe: Recipe, weights: str, path: Path
) -> Mapping[str, Tensor]:
    """The state dict inside the file: at one of the layout's places, or the file itself if it is flat."""
    if _is_flat(data):
        return data  # type: ignore[return-value]
    place = layout.containers.get(weights, ())
    for container in (place, *layout.alternatives):
        if _is_flat(inside := _inside(data, container)):
            return inside  # type: ignore[return-value]
    if place and _inside(data, place) is None:
        parts = data.values() if isinstance(data, Mapping) else ()
        guesses = (_guess(part, recipe) for part in parts if _is_flat(part))
        advice = f"choose --weights {'|'.join(layout.containers)}, or give the published file"
        raise CheckpointError(
            f"{path} has no {'.'.join(place)}; it holds {_content(data)}",
            "; ".join([*itertools.islice(filter(None, guesses), 1), advice]),
        )
    raise CheckpointError(
        f"{path} holds no weights where this part keeps them, but {_content(data)}",
        "give the published file of this part",
    )


def _inside(data: object, container: tuple[str, ...]) -> object:
    for key in container:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _is_flat(data: object) -> bool:
    return (
        isinstance(data, Mapping)
        and bool(data)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items())
    )


def _content(data: object) -> str:
    if isinstance(data, Mapping):
        return _named("", list(map(str, data))) or "nothing"
    return f"a {type(data).__name__}"


def _converted(
    state: Mapping[str, Tensor], module: nn.Module, layout: Layout, recipe: Recipe, role: str, path: Path
) -> dict[str, Tensor]:
    """The file's tensors under our names, float32. Raises `CheckpointError` that names what differs."""
    expected = _published_shapes(module, layout)
    free = {k for k in state if any(re.fullmatch(p, k) for p in layout.recomputable)}
    missing = [k for k in expected if k not in state]
    extra = [k for k in state if k not in expected and k not in free]
    misshapen = [
        f"{k} {_shape(state[k].shape)} for {_shape(expected[k])}"
        for k in expected
        if k in state and _squeezed(state[k].shape) != _squeezed(expected[k])
    ]
    differences = [_named("missing", missing), _named("unknown", extra), _named("misshapen", misshapen)]
    if any(differences):
        raise CheckpointError(
            f"{path} does not hold the {role} of {recipe.name}: {'; '.join(filter(None, differences))}",
            _guess(state, recipe) or "check the model's name and the file",
        )
    for key in expected:
        if not _is_sound(state[key]):
            raise CheckpointError(f"{path}: {key} is not a dense array of finite numbers", "get another copy")
    for key in free:
        check = next(c for p, c in layout.recomputable.items() if re.fullmatch(p, key))
        if not _holds(check, state[key]):
            raise CheckpointError(
                f"{path}: {key} is not what this family computes it to be",
                "the file was made by different code",
            )
    converted = {}
    for key, parameter in module.state_dict().items():
        parts = [state[name].float() for name in layout.published(key)]
        value = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(parameter.shape)
        rows = layout.rows(key)
        converted[key] = value if rows is None else value[rows]
    return converted


def _published_shapes(module: nn.Module, layout: Layout) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for key, value in module.state_dict().items():
        names = layout.published(key)
        for name, part in zip(names, value.chunk(len(names)), strict=True):
            shapes[name] = tuple(part.shape)
    return shapes


def _is_sound(tensor: Tensor) -> bool:
    dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_complex()
    try:
        return dense and not tensor.is_quantized and bool(tensor.float().isfinite().all())
    except RuntimeError:  # numbers of four bits and the like
        return False


def _holds(check: object, tensor: Tensor) -> bool:
    try:
        return bool(check(tensor))  # type: ignore[operator]
    except RuntimeError:  # another number of elements
        return False


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its axes of one element: published files carry some that ours do not."""
    return tuple(n for n in shape if n != 1)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _named(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else ""
    return f"{what} {', '.join(keys[:NAMED_KEYS])}{more}".strip()


def _guess(state: Mapping[str, Tensor], recipe: Recipe) -> str:
    """Which part of which model these tensors are, as a sentence; empty if none fits."""
    from ddexport.recipe import load_recipe, recipe_names

    shapes = {k: _squeezed(v.shape) for k, v in state.items()}
    for candidate in (recipe, *map(load_recipe, recipe_names())):
        for role in family(candidate.family).roles:
            try:
                with torch.device("meta"):
                    module = family(candidate.family).build(candidate, role)
            except GeometryError:
                continue
            layout = family(candidate.family).layout(candidate, role)
            expected = _published_shapes(module, layout)
            if all(shapes.get(k) == _squeezed(s) for k, s in expected.items()) and not [
                k
                for k in shapes
                if k not in expected and not any(re.fullmatch(p, k) for p in layout.recomputable)
            ]:
                return f"this looks like the {role} of {candidate.name}"
    return ""
