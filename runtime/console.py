"""What all command lines of the project share: errors in two lines, progress on stderr, JSON on stdout."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import click

from ddexport.runtime.errors import DDError, UsageError, did_you_mean

INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader left, as in `ddexport models | head -1`
BAR_AFTER_SECONDS = 2.0
EXTRAS = {  # the extra of the project that brings a package
    **dict.fromkeys(("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "yaml"), "export"),
    **dict.fromkeys(("huggingface_hub", "filelock"), "hub"),
    **dict.fromkeys(("jinja2", "matplotlib"), "validate"),
    **dict.fromkeys(("onnxruntime",), "cpu"),
    **dict.fromkeys(("tensorrt_rtx", "polygraphy"), "tensorrt-rtx"),
    "openvino": "openvino",
    **dict.fromkeys(("tokenizers", "ftfy", "bs4"), "text"),
    "transformers": "text-encoder",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_client"), "serve"),
    "mlxtend": "distill",
    "playwright": "web",
    "ray": "ray",
}

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_debug: ContextVar[bool] = ContextVar("debug", default=False)


def debug_option(function: F) -> F:
    """Decorator: adds `--debug`, which shows the tracebacks of user errors, and informative logs."""

    def switch_on(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            _debug.set(True)
            logging.getLogger().setLevel(logging.INFO)

    option = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=switch_on,
        help="Show the traceback of an error, and more log messages.",
    )
    return option(function)


class _ErrorHandling(click.Command):
    """The outermost command's `main` turns every expected way to end into an exit code.

    0 done, 1 user or environment error, 2 usage, 3 verification failed, 130 interrupted, 141 reader left.
    A command that returns an int ends with that exit code. Exceptions other than `DDError` are defects and
    show a traceback.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        run = partial(super().main, args, prog_name, complete_var, standalone_mode=False, **extra)
        if not standalone_mode:
            return run()
        _prepare_streams()
        with _logging_to_stderr():
            sys.exit(_exit_code(run))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, whose parser does not say which command lacks the value of an option."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _close_stdout()
            raise click.exceptions.Exit(BROKEN_PIPE) from None


def _exit_code(run: Callable[[], Any]) -> int:
    _debug.set(False)
    try:
        result = run()
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except click.UsageError as error:
        if error.ctx is None or isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
        else:
            show_error(
                DDError(error.format_message(), f"`{error.ctx.command_path} --help` shows the options.")
            )
        return error.exit_code
    except BrokenPipeError:
        _close_stdout()
        return BROKEN_PIPE
    except (DDError, ModuleNotFoundError, MemoryError, OSError) as error:
        explained = _explained(error)
        if explained is None:
            raise
        if _debug.get():
            click.echo(traceback.format_exc(), err=True)
        show_error(explained)
        return explained.exit_code
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _explained(error: Exception) -> DDError | None:
    """What the environment lacks, in two lines; None for a defect of ours."""
    if isinstance(error, DDError):
        return error
    if isinstance(error, ModuleNotFoundError):
        package = str(error.name).partition(".")[0]
        hint = f'pip install "ddexport[{EXTRAS.get(package)}]"'
        return DDError(f"this needs {package}, which is not installed", hint) if package in EXTRAS else None
    if isinstance(error, MemoryError):
        return DDError(f"out of memory: {error}", "Ask for less at once: fewer images, smaller batches.")
    assert isinstance(error, OSError)
    _close_stdout()  # which may be what failed
    place = error.filename or "standard output"
    return DDError(f"{place}: {error.strerror or error}", "Check the path, its rights and the free space.")


class Command(_ErrorHandling):
    """A click command with the project's errors and exit codes: `@click.command(cls=console.Command)`."""


class Group(_ErrorHandling, click.Group):
    """A click group with the project's errors and exit codes: `@click.group(cls=console.Group)`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with a suggestion for a command that there is not."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            guess = did_you_mean(name, self.list_commands(ctx))
            hint = f"{guess}`{ctx.command_path} --help` lists the commands."
            raise UsageError(f"there is no command {name!r}", hint)
        return super().resolve_command(ctx, args)

    command_class = Command


def show_error(error: DDError) -> None:
    """Prints what went wrong and what to do, in two lines on stderr."""
    click.echo(f"{click.style('error:', fg='red')} {_one_line(error.message)}", err=True)
    if error.hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {_one_line(error.hint)}", err=True)


def emit_json(data: Any) -> None:
    """Prints `data` as strict JSON on stdout.

    Dataclasses, records, paths, and NumPy scalars and arrays are converted; NaN and infinities, which JSON
    lacks, become null.
    """
    click.echo(json.dumps(_plain(data), indent=2, allow_nan=False, ensure_ascii=False))


def is_terminal() -> bool:
    """Whether stderr is a terminal, which is where progress may be drawn."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


@contextmanager
def stage(name: str, keep: bool = True) -> Iterator[None]:
    """Names the work on stderr, and says how long it took: `with stage("checking student.onnx"): ...`.

    Without `keep` it is only shown while it lasts, and only on a terminal.
    """
    if not keep and not is_terminal():
        yield
        return
    click.echo(f"{name} ...", err=True, nl=not is_terminal())
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        _clear_line()
        click.echo(f"{name}: stopped after {duration(time.perf_counter() - start)}", err=True)
        raise
    _clear_line()
    if keep:
        click.echo(f"{name}: {duration(time.perf_counter() - start)}", err=True)


def duration(seconds: float) -> str:
    """A time for people: `85 ms`, `4.2 s`, `3 min 05 s`."""
    if seconds < 1:
        return f"{seconds * 1e3:.{0 if seconds >= 0.01 else 1}f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


class Progress(Generic[T]):
    """A bar on stderr for work that takes longer than two seconds; nothing when stderr is no terminal.

    Either iterate over it, or use it as a context manager and call `advance`.
    """

    def __init__(self, items: Iterable[T], total: int | None, label: str, unit: str = "") -> None:
        self._items, self._total, self._label, self._unit = items, total, label, unit
        self._done, self._drawn = 0, False
        self._start = time.monotonic()
        self._next_draw = self._start + BAR_AFTER_SECONDS
        self._terminal = is_terminal()

    def advance(self, count: int = 1) -> None:
        """Says that `count` more pieces of the work are done."""
        self._done += count
        now = time.monotonic()
        if self._terminal and now >= self._next_draw:
            self._next_draw = now + 0.1
            self._drawn = True
            click.echo(f"\r\x1b[K{self._text(now - self._start)}", err=True, nl=False)

    def _text(self, elapsed: float) -> str:
        if not self._total:
            return f"{self._label}  {self._done}  {duration(elapsed)}"
        share = min(self._done / self._total, 1.0)
        bar = ("#" * round(24 * share)).ljust(24, ".")
        rate = f"  {self._done / elapsed:.1f} {self._unit}/s" if self._unit else ""
        left = f"  {duration(elapsed / share - elapsed)} left" if 0 < share < 1 else ""
        return f"{self._label}  [{bar}]  {self._done}/{self._total}{rate}{left}"

    def __enter__(self) -> Progress[T]:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            _clear_line()

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.advance()


@overload
def progress(work: int, label: str, unit: str = "") -> Progress[None]: ...
@overload
def progress(work: Iterable[T], label: str, unit: str = "") -> Progress[T]: ...
def progress(work: Iterable[T] | int, label: str, unit: str = "") -> Progress[T] | Progress[None]:
    """`for item in progress(items, "drawing")`, or `with progress(64, "drawing") as bar: bar.advance(8)`.

    unit: of the work, whose rate is shown then.
    """
    if isinstance(work, int):
        return Progress[None]((), work, label, unit)
    return Progress(work, len(work) if isinstance(work, Sized) else None, label, unit)


class _StderrHandler(logging.Handler):
    """Writes `warning: text`, over a progress bar or a transient stage line if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        _clear_line()
        click.echo(f"{record.levelname.lower()}: {self.format(record)}", err=True)


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    root, handler = logging.getLogger(), _StderrHandler()
    level = root.level
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def _clear_line() -> None:
    if is_terminal():
        click.echo("\r\x1b[K", err=True, nl=False)


def _prepare_streams() -> None:
    """Output is UTF-8 in every locale; a name that is not becomes an escape, which is valid in JSON too.

    Services start without standard streams: files would take their numbers, and libraries print into them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="backslashreplace")


def _close_stdout() -> None:
    # The interpreter flushes stdout once more when it ends; give it somewhere to write to.
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(data: Any) -> Any:
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        data = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    elif hasattr(data, "__struct_fields__"):  # records, without importing msgspec
        data = {name: getattr(data, name) for name in data.__struct_fields__}
    elif hasattr(data, "tolist"):  # NumPy scalars and arrays, without importing NumPy
        data = data.tolist()
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return str(data) if isinstance(data, Path) else data
