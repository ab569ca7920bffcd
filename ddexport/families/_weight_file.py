"""Reading weight files, torch's and safetensors, whole or in shards, each known by its first bytes.

They are untrusted: pickles are read with `weights_only`, so that none can run code.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import torch

from ddexport.runtime.bundle import sha256_of
from ddexport.runtime.errors import DDError
from ddexport.runtime.records import convert, read_json

SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
MAX_HEADER = 100_000_000  # bytes, of safetensors
DOWNLOAD = "download it again"


class CheckpointError(DDError):
    """A weight file that cannot be read, or that holds another model."""


class Index(msgspec.Struct):
    """The index of a sharded checkpoint: the file of each tensor."""

    weight_map: dict[str, str]


def read_weights(path: Path) -> Any:
    """What a checkpoint holds, mapped where it can be. `path` may be an index of shards or their directory.

    Raises:
        CheckpointError: a file is missing, damaged, unsafe or something else.
    """
    files, places = _files_of(path)
    if len(files) == 1 and not places:
        return _read_file(files[0])
    state: dict[str, Any] = {}
    for file in files[1:] if places else files:
        shard = _read_file(file)
        listed = {key for key in places if places[key] == file.name} if places else shard.keys() - state
        if listed != shard.keys():
            raise CheckpointError(f"{file} holds other tensors than this shard should", "download all shards")
        state |= shard
    return state


def config_of(path: Path) -> Any:
    """What a checkpoint says beside its weights: its entry `config`; of safetensors that of the metadata, as
    JSON. None where there is none. Raises `CheckpointError`."""
    from safetensors import SafetensorError, safe_open

    for part in _files_of(path)[0]:
        try:
            with safe_open(part, "pt") as file:
                text = (file.metadata() or {}).get("config")
        except (SafetensorError, OSError):  # torch's, or an index
            if part.suffix == ".json":
                continue
            data = read_weights(part)
            return data.get("config") if isinstance(data, dict) else None
        try:
            if text is not None:
                return msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            raise CheckpointError(f"{part}: the config in its metadata is not JSON", DOWNLOAD) from error
    return None


def fingerprint(path: Path) -> tuple[str, int]:
    """SHA-256 in hex and size in bytes of a checkpoint.

    Of several files the SHA-256 is that of what `sha256sum` prints for them, index included, sorted by name.
    """
    files = sorted(_files_of(path)[0], key=lambda file: file.name)
    sums = [sha256_of(file) for file in files]
    lines = "".join(f"{sha256}  {file.name}\n" for sha256, file in zip(sums, files, strict=True))
    whole = sums[0] if len(files) == 1 else hashlib.sha256(lines.encode()).hexdigest()
    return whole, sum(file.stat().st_size for file in files)


def _files_of(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a checkpoint; in front of shards their index, if there is one, and what it says."""
    if path.is_dir():
        patterns = ("*.safetensors.index.json", "*.index.json", "*.safetensors")
        files = next(filter(None, (sorted(path.glob(pattern)) for pattern in patterns)), [])
        series = {shard and shard.groups() for shard in map(SHARD.fullmatch, (file.name for file in files))}
        if len(series) == 1 and None not in series:
            return files, {}
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "no .safetensors file"
            raise CheckpointError(f"{path} is a directory with {names}", "give the file of the weights")
        path = files[0]
    if path.suffix != ".json":
        return [path], {}
    places = convert(Index, read_json(path, CheckpointError), str(path), CheckpointError, DOWNLOAD).weight_map
    shards = [path.parent / name for name in sorted(set(places.values()))]
    for shard in shards:
        if shard.parent != path.parent or not shard.is_file():
            raise CheckpointError(f"{path} names a shard {shard}, which is not there", "download all shards")
    return [path, *shards], places


def _read_file(path: Path) -> Any:
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"there is no file {path}", "check the path")
    try:
        with path.open("rb") as stream:
            head = stream.read(128)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
            return load_file(path)
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights",
                                  "run git lfs pull, or download the file itself")  # fmt: skip
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            raise CheckpointError(f"{path} is a web page, not the weights",
                                  "on the Hub a file's address has /resolve/, not /blob/")  # fmt: skip
        if is_zip := head.startswith(b"PK\3\4"):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:
                raise CheckpointError(f"{path} is compressed; checkpoints are not", "save it with torch.save")
        # torch.load goes by the suffix .safetensors, but for a stream, which it cannot map.
        mapped = is_zip and path.suffix.lower() != ".safetensors"
        # LlamaGen's training code keeps its command line beside the weights: plain attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as stream:
            return torch.load(path if mapped else stream, "cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except Exception as error:  # the bytes are untrusted: a damaged pickle can make the reader raise anything
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named and isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path} holds objects that are not weights ({named[1]}): loading them could run code",
                "save the state dict alone, or convert the file to .safetensors",
            ) from error
        size = f"{path.stat().st_size:,} bytes"
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({size}): not a state dict, not a safetensors file",
            "download it again, or give a state dict as torch.save or safetensors writes it",
        ) from error
