"""Reads the small JSON files of a bundle without trusting them, and turns them into dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ddexport.runtime.errors import BundleError

MAX_BYTES = 8 << 20  # the largest honest one, a manifest with a recipe of a thousand labels, has some 100 kB
DAMAGED = "The bundle is damaged or incomplete: copy it again, or export it again."

T = TypeVar("T")


def read_json(path: Path) -> Any:
    """The content of a UTF-8 JSON file. Raises BundleError if it is too large, malformed or repeats a key."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BundleError(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no bundle needs", DAMAGED)
        return json.loads(path.read_bytes(), object_pairs_hook=_object, parse_constant=_no_constant)
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read: {error.strerror}", "Check the path and its rights."
        ) from error
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, or nested thousands deep
        raise BundleError(f"{path} is not valid JSON: {error}", DAMAGED) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def decode(kind: type[T], data: Any, where: str = "", file: str = "bundle.json") -> T:
    """`data`, as parsed from JSON, as a dataclass `kind`: no key missing, none unknown, every type right.

    A field with a default may be missing. Annotations may be scalars, unions of scalars, `tuple[X, ...]`,
    `Mapping[K, X]`, dataclasses, optional ones as well, and `Any`.
    Raises BundleError, which names `file` and the key, as in `graphs[0].inputs[1].name`.
    """
    if not isinstance(data, dict):
        raise BundleError(f"{file}: {where or 'the whole'} must be an object, but is {_short(data)}", DAMAGED)
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in _required(kind):
        if key not in data:
            raise BundleError(f"{file} lacks the key {prefix}{key}", DAMAGED)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(hints)}."
            raise BundleError(f"{file} has an unknown key {prefix}{key}", hint)
    return kind(**{key: _value(hints[key], item, f"{prefix}{key}", file) for key, item in data.items()})


def _required(kind: Any) -> list[str]:
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing
    ]


def _value(kind: Any, data: Any, where: str, file: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return decode(typing.cast("type[Any]", kind), data, where, file)
    if kind is Any:
        return data
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(data, list):
        return tuple(_value(arguments[0], item, f"{where}[{i}]", file) for i, item in enumerate(data))
    if origin is Mapping and isinstance(data, dict):
        return {
            _key(arguments[0], key, where, file): _value(arguments[1], item, f"{where}.{key}", file)
            for key, item in data.items()
        }
    options = arguments if origin in (typing.Union, types.UnionType) else (kind,)
    record = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if record is not None and data is not None:  # an optional one
        return _value(record, data, where, file)
    if type(data) is int and float in options and int not in options:
        with suppress(OverflowError):  # then it is refused below
            data = float(data)
    if type(data) not in options:  # not isinstance: true is no number
        names = {tuple: "a list", Mapping: "an object"}.get(origin)
        names = names or " or ".join(option.__name__ for option in options)
        raise BundleError(f"{file}: {where} must be {names}, but is {_short(data)}", DAMAGED)
    return data


def _key(kind: Any, key: str, where: str, file: str) -> Any:
    if kind is not int:
        return key
    if not (key.isascii() and key.isdigit() and len(key) < 20 and key == str(int(key))):
        raise BundleError(f"{file}: {where} has the key {key!r}, which is no number", DAMAGED)
    return int(key)


def _short(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= 40 else f"{text[:37]}..."
