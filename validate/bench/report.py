"""What becomes of the rows: tables on stdout, a plot, a block in a Markdown page, and remarks on stderr."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import click

from ddexport.runtime.errors import OutputError
from ddexport.runtime.files import atomic_write, check_writable
from ddexport.runtime.machine import cpu, version_of
from ddexport.validate.bench.roofline import Peaks
from ddexport.validate.bench.rows import Row
from ddexport.validate.bench.table import parity_grid, remarks, times_grid, work_line

PACKAGES = ("ddexport", "numpy", "torch", "onnxruntime", "onnxruntime-gpu", "openvino")


def environment() -> tuple[str, str]:
    """For people: this machine, and with it the time and what is installed."""
    machine = f"{cpu().name}, {cpu().cores} core{'s' * (cpu().cores != 1)}"
    versions = ", ".join(f"{name} {version}" for name in PACKAGES if (version := version_of(name)))
    return machine, f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M UTC}, {machine}; {versions}."


def show(rows: Sequence[Row], peaks: Peaks, machine: str, marks: Sequence[float]) -> None:
    """The tables for people, on stdout."""
    click.echo(machine)
    for own in _by_bundle(rows):
        click.echo(f"\n{click.style(own[0].model, bold=True)}: {work_line(own, peaks)}")
        click.echo("\n" + times_grid(own, marks).text())
        if baselines := _baselines(own):
            click.echo(f"speed-up: against {baselines}, with its 95 % interval")
        click.echo("\n" + parity_grid(own).text())


def block(
    rows: Sequence[Row],
    peaks: Peaks,
    command: str,
    stamp: str,
    marks: Sequence[float],
    skipped: Sequence[str] = (),
    plot: str | None = None,
) -> str:
    """What stands between the two marks of a page. stamp: see `environment`. plot: its address there."""
    parts = [f"```\n{command}\n```", stamp]
    for own in _by_bundle(rows):
        parts += [f"**{own[0].model}**: {work_line(own, peaks)}.", times_grid(own, marks).markdown()]
        parts.append(parity_grid(own).markdown())
        if baselines := _baselines(own):
            parts.append(
                f"Speed-up: against {baselines}, median of the rounds that both ran, with its 95 % interval."
            )
    if texts := [*remarks(rows), *(f"skipped: {text}" for text in skipped)]:
        parts.append("\n".join(f"- {text}" for text in texts))
    if plot is not None:
        parts.append(f"![times of the runners]({plot})")
    return "\n\n".join(parts)


def marks_of(name: str = "") -> tuple[str, str]:
    """The lines around a block: a page may hold several, told apart by their names."""
    name = f" {name}" if name else ""
    return f"<!-- bench{name} -->", f"<!-- /bench{name} -->"


def check_page(path: Path, name: str = "") -> None:
    """Raises OutputError if the page lacks its marks or cannot be written: better before the work."""
    _around(path, name)
    check_writable(path)


def update(path: Path, text: str, name: str = "") -> None:
    """Puts the text between the marks of a page; the rest stays as it is. Raises OutputError."""
    before, after = _around(path, name)
    start, end = marks_of(name)
    with atomic_write(path) as stream:
        stream.write(f"{before}{start}\n{text}\n{end}{after}".encode())


def address(plot: Path, page: Path) -> str:
    """Of a picture, as seen from a page."""
    return Path(os.path.relpath(plot.resolve(), page.resolve().parent)).as_posix()


def _around(path: Path, name: str) -> tuple[str, str]:
    """What stands before and after the marked block."""
    start, end = marks_of(name)
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path} cannot be read: {error}", "Name a Markdown file.") from error
    starts, ends = (list(re.finditer(rf"^{re.escape(mark)}[ \t\r]*$", text, re.M)) for mark in (start, end))
    if len(starts) != 1 or len(ends) != 1:
        raise OutputError(
            f"{path} must have the lines {start} and {end} once each", "Put them where the tables shall be."
        )
    if ends[0].start() < starts[0].end():
        raise OutputError(f"{path} has {end} before {start}", "Swap them.")
    return text[: starts[0].start()], text[ends[0].end() :]


def _by_bundle(rows: Sequence[Row]) -> Iterator[list[Row]]:
    for bundle in dict.fromkeys(row.bundle for row in rows):
        yield [row for row in rows if row.bundle == bundle]


def _baselines(rows: Sequence[Row]) -> str:
    return " / ".join(dict.fromkeys(str(row.against) for row in rows if row.speedup is not None))
