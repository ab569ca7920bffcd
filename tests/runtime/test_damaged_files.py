"""Whatever is wrong with a file, it is read or refused: nothing but the project's own errors comes out."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from ddexport.runtime.backends._saved import fastest
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import DDError
from ddexport.runtime.files import read_noise
from ddexport.runtime.labels import read_labels

TEXTS = st.text(st.characters(exclude_categories=()), max_size=5) | st.sampled_from(["\0", "..", "a" * 300])
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 10**12, 10**400])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
ANYTHING = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(TEXTS, SCALARS, max_size=2)
# Values that a parser of YAML or JSON fails at, each in its own way.
PIECES = [b"!!bool x", b"!!timestamp x", b"2001-13-01", b"9" * 5000, b"&a [*a]", b"\xff"]
many = settings(max_examples=100)


@pytest.fixture(scope="module")
def folder(shared_teacher_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to write into."""
    return Path(shutil.copytree(shared_teacher_bundle, tmp_path_factory.mktemp("damaged") / "bundle"))


def spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with each of its keys."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from spots(tree[key])


def changed(data: DataObject, tree: Any) -> Any:
    """A copy in which up to two values are others, of the tree itself or anything, or missing."""
    tree = json.loads(json.dumps(tree))
    for _ in range(data.draw(st.integers(0, 2))):
        container, key = data.draw(st.sampled_from(list(spots(tree))))
        how = data.draw(st.integers(0, 3))
        if how == 0 and len(tree) > 1:
            del container[key]
        elif how == 1:
            other, its = data.draw(st.sampled_from(list(spots(tree))))
            container[key] = json.loads(json.dumps(other[its]))
        else:
            container[key] = data.draw((ANYTHING, NUMBERS, TEXTS)[how - 1] if how else ANYTHING)
    return tree


def damaged(data: DataObject, whole: bytes) -> bytes:
    """Some bytes replaced, left out, put in or cut off at one place."""
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.sampled_from([start, start + 1, start + 4, len(whole)]))
    return whole[:start] + data.draw(st.binary(max_size=4)) + whole[stop:]


def text(data: DataObject, tree: Any) -> bytes:
    """A tree as JSON, wrong in its values or in its letters."""
    if data.draw(st.integers(0, 3)):
        return json.dumps(changed(data, tree)).encode()
    return damaged(data, json.dumps(tree).encode())


def read(path: Path, content: bytes, reader: Callable[[Path], object]) -> None:
    path.write_bytes(content)
    with suppress(DDError):
        reader(path)


@many
@given(st.data())
def test_a_manifest(folder: Path, shared_teacher_bundle: Path, data: DataObject) -> None:
    tree = json.loads((shared_teacher_bundle / "bundle.json").read_bytes())
    read(folder / "bundle.json", text(data, tree), lambda path: read_manifest(path.parent))


@many
@given(st.data())
def test_class_names_and_saved_benchmarks(
    folder: Path, shared_teacher_bundle: Path, data: DataObject
) -> None:
    """The latter never keep a bundle from being drawn from."""
    names = {"names": ["zero", "one", "two"], "aliases": {"2": ["a pair"]}, "source": "me"}
    read(folder / "labels.json", text(data, names), lambda path: read_labels(path, 3))
    time = {"cpu": "x", "backend": "openvino", "version": "1", "graphs": "0", "milliseconds": 2.5}
    (folder / "bench.json").write_bytes(text(data, [time, time | {"backend": "onnxruntime"}]))
    fastest(folder, read_manifest(shared_teacher_bundle, verify=False))


@many
@given(st.data())
def test_a_recipe(folder: Path, golden_dir: Path, data: DataObject) -> None:
    import yaml

    from ddexport.recipe import load_recipe

    whole = (golden_dir / "recipe.yaml").read_bytes()
    lines = whole.splitlines()
    line = data.draw(st.integers(0, len(lines) - 1))
    lines[line] = lines[line].partition(b":")[0] + b": " + data.draw(st.sampled_from(PIECES))
    ways = (
        lambda: text(data, yaml.safe_load(whole)),
        lambda: damaged(data, whole),
        lambda: b"\n".join(lines),
    )
    content = data.draw(st.sampled_from(ways))()
    read(folder / "recipe.yaml", content, lambda path: load_recipe(str(path)))


def arrays() -> dict[str, bytes]:
    """The members of a noise file."""
    values = {"noise": np.zeros((2, 3, 1), np.float32), "labels": np.arange(2), "uniforms": np.zeros((2, 3))}
    members = {}
    for name, value in values.items():
        np.save(stream := io.BytesIO(), value)
        members[f"{name}.npy"] = stream.getvalue()
    return members


@many
@given(st.data())
def test_a_noise_file(folder: Path, data: DataObject) -> None:
    """Damaged as a whole, or in an array or its name."""
    members = arrays()
    if inside := data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(members)))
        content = damaged(data, members.pop(name)) if data.draw(st.booleans()) else members.pop(name)
        members[data.draw(st.sampled_from([name, name[:-4], f"{name}.npy"]))] = content
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    whole = stream.getvalue() if data.draw(st.integers(0, 3)) else members.get("noise.npy", b"")
    read(folder / "noise.npz", whole if inside else damaged(data, whole), read_noise)


@many
@given(st.data())
def test_a_checkpoint(folder: Path, data: DataObject) -> None:
    """The header of safetensors; tests/ddexport/families/test_checkpoint.py damages other bytes."""
    from ddexport.families._checkpoint import as_float32
    from ddexport.families._weight_file import read_weights

    types = {"F32": 2, "F8_E4M3": 8, "F8_E8M0": 8, "U64": 1, "C64": 1, "BOOL": 8}  # so many in 8 bytes
    dtype = data.draw(st.sampled_from(sorted(types)))
    entry = {"dtype": dtype, "shape": [types[dtype], 1], "data_offsets": [0, 8]}
    other = {"dtype": "F16", "shape": [4], "data_offsets": [8, 16]}
    tree = {"a": entry, "b": other, "__metadata__": {"model": "m"}}
    header = json.dumps(tree).encode() if data.draw(st.booleans()) else text(data, tree)
    size = data.draw(st.sampled_from([len(header)] * 6 + [0, 1 << 40, (1 << 64) - 1]))
    content = struct.pack("<Q", size) + header + data.draw(st.binary(min_size=16, max_size=16))
    read(
        folder / "part.safetensors",
        content,
        lambda path: [as_float32(t, k) for k, t in read_weights(path).items()],
    )
