"""Records read from files: msgspec structs, read strictly, and errors that name the file and the key."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import msgspec

from ddexport.runtime.errors import BundleError, DDError, did_you_mean

MAX_BYTES = 8 << 20  # the largest honest file, a manifest with a recipe of a thousand labels, has some 100 kB
DAMAGED = "The file is damaged or incomplete: copy it again, or make it again."
LINE = 180

Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]

T = TypeVar("T")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what is read from files. Fields with a default may be missing there, and are left out."""


def read_json(path: Path, error: type[DDError] = BundleError) -> Any:
    """The content of a UTF-8 JSON file. Raises `error` if it is too large, malformed or repeats a key."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise error(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no such file needs", DAMAGED)
        return json.loads(path.read_bytes(), object_pairs_hook=_object, parse_constant=_no_constant)
    except OSError as failure:
        raise error(
            f"{path} cannot be read: {failure.strerror}", "Check the path and its rights."
        ) from failure
    except (ValueError, RecursionError) as failure:  # malformed, not UTF-8, or nested thousands deep
        raise error(f"{path} is not valid JSON: {failure}", DAMAGED) from failure


def convert(
    kind: type[T], data: Any, file: str, error: type[DDError] = BundleError, hint: str = DAMAGED
) -> T:
    """`data`, as parsed from JSON or YAML, as a record. Raises `error`, which names `file` and the key.

    An unknown key gets a suggestion: the nearest of the keys that any record in `kind` has.
    """
    try:
        json.dumps(data, ensure_ascii=False, default=str, skipkeys=True).encode()
        return msgspec.convert(data, kind, str_keys=True)
    except (msgspec.ValidationError, RecursionError) as failure:
        text = _named(kind, data, str(failure))
        unknown = re.search(r"unknown field `(.*?)`", text)
        guess = did_you_mean(unknown[1], _keys(kind, set())) if unknown else ""
        hint = guess.strip() or hint
        raise error(f"{file}: {text.replace('`$.', '`')}", hint) from failure
    except ValueError as failure:  # half a character ("\ud800"), which msgspec lets pass; or a loop
        raise error(f"{file} holds what JSON cannot: {failure}", hint) from failure


def _named(kind: Any, data: Any, text: str) -> str:
    """msgspec writes `[...]` for the key of a dict. It is found by leaving out the other keys."""
    head, dots, rest = text.partition("[...]")
    if not dots:
        return text
    narrowed = node = copy.deepcopy(data)
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", head.rpartition("`$")[2]):
        node = node[name] if name else node[int(index)]
    for key, value in dict(node).items():
        node.clear()
        node[key] = value
        try:
            msgspec.convert(narrowed, kind, str_keys=True)
        except msgspec.ValidationError as failure:
            if str(failure) == text:
                return f"{head}.{key}{rest}"
    return text


def to_json(record: Any) -> str:
    """A record as JSON text: what fits in one line stays in one line, keys in the order of the fields."""
    return _pretty(msgspec.to_builtins(record, str_keys=True), 0) + "\n"


def _pretty(value: Any, depth: int) -> str:
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(line) + 2 * depth <= LINE or not isinstance(value, (dict, list, tuple)) or not value:
        return line
    inner, outer = "\n" + "  " * (depth + 1), "\n" + "  " * depth
    if isinstance(value, dict):
        rows = [f"{json.dumps(key)}: {_pretty(item, depth + 1)}" for key, item in value.items()]
        return "{" + inner + f",{inner}".join(rows) + outer + "}"
    return "[" + inner + f",{inner}".join(_pretty(item, depth + 1) for item in value) + outer + "]"


def _keys(kind: Any, seen: set[Any]) -> Iterator[str]:
    """The field names of all records in a type."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind not in seen:
        seen.add(kind)
        for field in msgspec.structs.fields(kind):
            yield field.encode_name
            yield from _keys(field.type, seen)
    for argument in get_args(kind):
        yield from _keys(argument, seen)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
