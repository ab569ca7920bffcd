"""The lists on the command line of `ddexport bench`: read, checked, and told what there is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import click

TEACHER = "teacher"
MODES = ("latency", "throughput")


def names(known: Callable[[], Sequence[str]], what: str) -> Callable[..., tuple[str, ...]]:
    """A callback for a list of names; an unknown one is a usage error that lists those there are."""

    def check(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
        found = _words(value or "")
        if value is not None and not found:
            raise click.BadParameter(f"it names no {what}.", ctx, param)
        for name in found:
            if name not in (have := known()):
                raise click.BadParameter(
                    f"there is no {what} called {name!r}. There is: {', '.join(have)}.", ctx, param
                )
        return tuple(dict.fromkeys(found))

    return check


def one(check: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """The same callback for one thing, or None."""

    def checked(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        found = check(ctx, param, value)
        if len(found) > 1:
            raise click.BadParameter(f"it takes one, not {value!r}.", ctx, param)
        return found[0] if found else None

    return checked


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """A callback for a list of numbers above 0, each once."""
    if value is None:
        return ()
    words = _words(value)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{value!r} is not a list of numbers above 0, like 1,4,8.", ctx, param)
    return tuple(dict.fromkeys(int(word) for word in words))


def steps(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int | str, ...]:
    """A callback for numbers of steps, and the teacher."""
    if value is None:
        return ()
    words = _words(value)
    if not words or not all(word == TEACHER or (word.isdecimal() and int(word) > 0) for word in words):
        raise click.BadParameter(
            f"{value!r} is not a list of steps. There is: a number above 0 that the bundle has a schedule"
            f" for, and {TEACHER}, as in 1,2,{TEACHER}.",
            ctx,
            param,
        )
    return tuple(dict.fromkeys(word if word == TEACHER else int(word) for word in words))


def percentiles(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    """A callback for a list of percentiles."""
    try:
        found = [float(word) for word in _words(value)]
    except ValueError:
        found = []
    if not found or not all(0 <= number <= 100 for number in found):
        raise click.BadParameter(f"{value!r} is not a list of percentiles, like 50,90,99.", ctx, param)
    return tuple(dict.fromkeys(found))


def block_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A callback for a name that can stand in a comment of Markdown."""
    if value and not re.fullmatch(r"[a-z0-9][a-z0-9-]*", value):
        raise click.BadParameter(f"{value!r} is no name of small letters, digits and hyphens.", ctx, param)
    return value


def command_line(ctx: click.Context) -> str:
    """The command as it was given, from what click has read of it."""
    words = ["ddexport", "bench"]
    for param in ctx.command.params:
        name = param.name or ""
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if isinstance(param, click.Argument):
            words += [str(each) for each in value]
        elif isinstance(value, bool):
            words.append((param.opts if value or not param.secondary_opts else param.secondary_opts)[0])
        else:
            each = value if isinstance(value, tuple) else (value,)
            words += [param.opts[0], ",".join(map(_plain, each))]
    return shlex.join(words)


def _words(value: str) -> list[str]:
    return [word for part in value.split(",") if (word := part.strip())]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _backends() -> Sequence[str]:
    from ddexport.validate.bench.plan import backend_names

    return backend_names()


def _precisions() -> Sequence[str]:
    from ddexport.validate.bench.plan import PRECISIONS

    return PRECISIONS


BACKEND = names(_backends, "backend")
PRECISION = names(_precisions, "precision")
MODE = names(lambda: MODES, "mode")
