"""A set of images on disk: set.json, and tar files of fixed ranges of images, as WebDataset reads them.

A tar file has for each image NUMBER.png and NUMBER.json: index, label, seed, the name of the class or the
prompt, and the SHA-256 of the pixels. It appears when it is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write, make_directory
from ddexport.runtime.records import Positive, Record, convert, read_json

SET = "set.json"
KEPT = 2  # open shards
AGAIN = "Repeat the command that made it."


class ShardError(DDError):
    """A set of images that is of another run, incomplete or damaged."""


class ImageSet(Record, frozen=True, kw_only=True):
    """What the images depend on, and how many are in a tar file. manifest, conditions: SHA-256 of the
    bundle's manifest, and of the labels or prompts. sampling: that of a teacher."""

    bundle: str
    manifest: str
    backend: str
    device: str
    precision: str
    decoder: str
    steps: int | str
    sampling: Mapping[str, float]
    seed: int
    conditions: str
    count: Positive
    shard_size: Positive

    @property
    def ranges(self) -> list[range]:
        """The images of each shard."""
        starts = range(0, self.count, self.shard_size)
        return [range(start, min(start + self.shard_size, self.count)) for start in starts]


def shard_name(images: range) -> str:
    """The file of a range of images: 00000500-00000999.tar."""
    return f"{images.start:08d}-{images.stop - 1:08d}.tar"


def open_set(folder: Path, wanted: ImageSet) -> None:
    """Makes the directory of a set, or checks that it holds the same set. Raises ShardError, OutputError."""
    make_directory(folder)
    if {path.name for path in folder.iterdir()} <= {SET}:
        with atomic_write(folder / SET) as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(wanted)))
    if not (folder / SET).exists():
        raise ShardError(f"{folder} has files, but no {SET}", "Name a new directory for the images.")
    there = read_set(folder)
    differences = [
        f"{name} {getattr(there, name)}, here {getattr(wanted, name)}"
        for name in ImageSet.__struct_fields__
        if getattr(there, name) != getattr(wanted, name)
    ]
    if differences:
        hint = "Repeat the command that made it, or name another directory."
        raise ShardError(f"{folder} holds another set of images: {'; '.join(differences)}", hint)


def read_set(folder: Path) -> ImageSet:
    """Reads set.json. Raises ShardError."""
    return convert(ImageSet, read_json(folder / SET, ShardError), SET, ShardError)


def write_image(archive: tarfile.TarFile, image: Image.Image, facts: Mapping[str, Any]) -> None:
    """Adds an image; facts: what its JSON says beside the SHA-256, with its index. Nothing tells the time."""
    pixels = hashlib.sha256(image.tobytes()).hexdigest()
    png = io.BytesIO()
    image.save(png, format="png")
    text = json.dumps({**facts, "sha256": pixels}, ensure_ascii=False).encode()
    for suffix, content in (("png", png.getvalue()), ("json", text)):
        member = tarfile.TarInfo(f"{facts['index']:08d}.{suffix}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def read_facts(path: Path, images: range) -> list[bytes]:
    """The JSON of each image of a shard. Raises ShardError for one that is not whole."""
    return _members(path, images, "json")


def read_shard(path: Path, images: range) -> tuple[list[dict[str, Any]], NDArray[np.uint8]]:
    """What the JSON of each image of a shard says, and the pixels (N, H, W, C), compared with their SHA-256.

    Raises ShardError for one that is not whole, or not as it was written.
    """
    facts, pictures = [], []
    texts, pngs = read_facts(path, images), _members(path, images, "png")
    for index, text, png in zip(images, texts, pngs, strict=True):
        try:
            stated = json.loads(text)
            picture = np.asarray(Image.open(io.BytesIO(png)))
            if stated["sha256"] != hashlib.sha256(picture.tobytes()).hexdigest():
                raise ValueError("other pixels than were drawn")
        except Exception as error:  # the bytes are untrusted: Pillow raises what it likes
            raise ShardError(f"{path} is damaged: image {index}: {error}", AGAIN) from error
        facts.append(stated)
        pictures.append(picture)
    return facts, np.stack(pictures)


def _members(path: Path, images: range, suffix: str) -> list[bytes]:
    """The files of one kind, an image each, of a shard that has all of both kinds. Raises ShardError."""
    names = [f"{index:08d}.{kind}" for index in images for kind in ("png", "json")]
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
            if [member.name for member in members] != names:
                raise ValueError(f"it has {len(members)} files in place of {len(names)}, or others")
            wanted = [member for member in members if member.name.endswith(suffix)]
            return [archive.extractfile(member).read() for member in wanted]  # type: ignore[union-attr]
    except (OSError, tarfile.TarError, ValueError, AttributeError) as error:
        raise ShardError(f"{path} is missing or damaged: {error}", AGAIN) from error


def digest(folder: Path, whole: ImageSet) -> str:
    """SHA-256 of all JSON files in the order of the images, whatever the shards. Raises ShardError."""
    total = hashlib.sha256()
    for images in whole.ranges:
        for text in read_facts(folder / shard_name(images), images):
            total.update(text)
    return total.hexdigest()


class Reader:
    """Reads images by their indices. facts: what the JSON of each image says."""

    def __init__(self, folder: Path) -> None:
        """Raises ShardError for what is missing or damaged, here and when pixels are read."""
        self.folder, self.set = folder, read_set(folder)
        shards = [(folder / shard_name(images), images) for images in self.set.ranges]
        texts = [text for path, images in shards for text in read_facts(path, images)]
        try:
            self.facts: list[dict[str, Any]] = [json.loads(text) for text in texts]
        except ValueError as error:
            raise ShardError(f"{folder} is damaged: {error}", AGAIN) from error
        self._shard = lru_cache(KEPT)(lambda number: read_shard(*shards[number])[1])

    def images(self, indices: range) -> NDArray[np.uint8]:
        """The pixels, uint8 (N, H, W, C)."""
        places = [divmod(index, self.set.shard_size) for index in indices]
        return np.stack([self._shard(number)[place] for number, place in places])
