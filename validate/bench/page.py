"""The tables of a run in a Markdown file, in place of those of the run before."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddexport.runtime.errors import OutputError
from ddexport.runtime.files import atomic_write, check_writable
from ddexport.validate.bench.peak import Peak
from ddexport.validate.bench.rows import Environment, Row
from ddexport.validate.bench.table import parity_grid, remarks, times_grid, work_line

START, END = "<!-- bench -->", "<!-- /bench -->"


def marks_of(name: str = "") -> tuple[str, str]:
    """The lines around a block: a page may hold several, told apart by their names."""
    return (f"<!-- bench {name} -->", f"<!-- /bench {name} -->") if name else (START, END)


def block(
    rows: Sequence[Row],
    peaks: Mapping[tuple[int, str], Peak],
    environment: Environment,
    command: str,
    marks: Sequence[float],
    skipped: Sequence[str] = (),
    plot: str | None = None,
) -> str:
    """What stands between the two marks. plot: its address, as seen from the page."""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    parts = [f"```\n{command}\n```", f"{environment.date}, {environment.line}; {versions}."]
    for bundle in dict.fromkeys(row.bundle for row in rows):
        own = [row for row in rows if row.bundle == bundle]
        parts += [f"**{own[0].model}**: {work_line(own, peaks)}.", times_grid(own, marks).markdown()]
        parts.append(parity_grid(own).markdown())
        against = dict.fromkeys(row.against for row in own if row.speedup is not None)
        if against:
            parts.append(
                f"Speed-up: against {' / '.join(map(str, against))}, median of the rounds that both ran, with"
                " its 95 % interval."
            )
    said = [*remarks(rows), *(f"skipped: {text}" for text in skipped)]
    if said:
        parts.append("\n".join(f"- {text}" for text in said))
    if plot is not None:
        parts.append(f"![times of the alternatives]({plot})")
    return "\n\n".join(parts)


def check_page(path: Path, name: str = "") -> None:
    """Raises OutputError if the page lacks its marks or cannot be written: better before the work."""
    _parts(path, name)
    check_writable(path)


def update(path: Path, text: str, name: str = "") -> None:
    """Puts the text between the marks of a page; the rest stays as it is. Raises OutputError."""
    before, after = _parts(path, name)
    start, end = marks_of(name)
    with atomic_write(path) as stream:
        stream.write(f"{before}{start}\n{text}\n{end}{after}".encode())


def address(plot: Path, page: Path) -> str:
    """Of a picture, as seen from a page."""
    return Path(os.path.relpath(plot.resolve(), page.resolve().parent)).as_posix()


def _parts(path: Path, name: str) -> tuple[str, str]:
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
