"""What becomes of the rows: tables on stdout, a plot, a page, and on stderr what is to be said of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
from ddexport.runtime.machine import Machine
from ddexport.validate.bench.page import address, block, update
from ddexport.validate.bench.peak import Peak
from ddexport.validate.bench.plot import write_plot
from ddexport.validate.bench.rows import Environment, Row
from ddexport.validate.bench.table import parity_grid, remarks, times_grid, work_line

PACKAGES = ("ddexport", "numpy", "torch", "onnxruntime", "openvino")
Peaks = Mapping[tuple[int, str], Peak]


def environment_of(machine: Machine) -> Environment:
    """This machine and what is installed, now."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cpu = machine.cpu
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return Environment(cpu.name, cpu.cores, cpu.features or (), versions, date)


def say_work(rows: Sequence[Row], peaks: Peaks) -> None:
    """The line on work and peaks, on stderr."""
    for bundle in dict.fromkeys(row.bundle for row in rows):
        own = [row for row in rows if row.bundle == bundle]
        click.echo(f"{own[0].model}: {work_line(own, peaks)}", err=True)


def show(
    rows: Sequence[Row],
    peaks: Peaks,
    environment: Environment,
    marks: Sequence[float],
) -> None:
    """The tables for people, on stdout."""
    click.echo(environment.line)
    for bundle in dict.fromkeys(row.bundle for row in rows):
        own = [row for row in rows if row.bundle == bundle]
        against = dict.fromkeys(row.against for row in own if row.speedup is not None)
        click.echo(f"\n{click.style(own[0].model, bold=True)}: {work_line(own, peaks)}")
        click.echo("\n" + times_grid(own, marks).text())
        if against:
            click.echo(f"speed-up: against {' / '.join(map(str, against))}, with its 95 % interval")
        click.echo("\n" + parity_grid(own).text())


def write(
    rows: Sequence[Row],
    peaks: Peaks,
    environment: Environment,
    skipped: Sequence[str],
    marks: Sequence[float],
    line: str,
    plot: Path | None,
    page: Path | None,
    name: str = "",
) -> None:
    """Plot and page (there the block of that name), and on stderr what is to be said about single rows."""
    if plot is not None and any(row.timed for row in rows):
        write_plot(rows, environment.line, plot)
        click.echo(f"plot: {plot}", err=True)
    if page is not None:
        picture = address(plot, page) if plot is not None and plot.exists() else None
        update(page, block(rows, peaks, environment, line, marks, skipped, picture), name)
        click.echo(f"updated: {page}", err=True)
    for text in remarks(rows):
        click.echo(text, err=True)
