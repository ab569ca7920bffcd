"""`validate report`: everything that was measured of a bundle on one page, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddexport.runtime import console

EPILOG = """
\b
Examples:
  ddexport validate report build/digits-var --run --open
  ddexport validate report build/var-d16 -o d16.html
  ddexport validate report build/digits-var --json
"""
NAME = "index.html"
_PATH = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)


def write_page(bundle: Path, target: Path, making: Any = None) -> tuple[Any, Path]:
    """Collects, makes what is missing if `making` says how, and writes the page. Returns facts and path.

    Raises BundleError for a bundle that is not what its manifest says, OutputError, and what making raises.
    """
    from datetime import datetime, timezone

    from ddexport.runtime.files import atomic_write, make_directory
    from ddexport.validate.page.facts import collect
    from ddexport.validate.page.make import make_missing
    from ddexport.validate.page.view import render

    facts = collect(bundle)
    if making is not None:
        troubles = make_missing(facts, making)
        facts = collect(bundle)
        facts.remarks += troubles
    created = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    page = render(facts, created).encode()
    make_directory(target.parent)
    with atomic_write(target) as stream:
        stream.write(page)
    return facts, target


@click.command("report", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", type=_PATH)
@click.option(
    "-o", "--output", type=_PATH, metavar="FILE", help="The page.  [default: BUNDLE/parity/index.html]"
)
@click.option("--run", is_flag=True, help="First make the reports that are missing, of modest size.")
@click.option(
    "--images", type=_POSITIVE, metavar="N", help="With --run: for parity.  [default: the recipe's, or 8]"
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="With --run: of the noise.",
)
@click.option("--precision", metavar="NAME", help="With --run: which graphs.  [default: the bundle's first]")
@click.option("--backend", metavar="NAME", default="auto", help="With --run: the engine.")
@click.option("--threads", type=_POSITIVE, metavar="N", help="With --run: of engine and torch.")
@click.option("--checkpoint", type=_PATH, help="With --run: the student's checkpoint of the bundle.")
@click.option("--vae", type=_PATH, help="With --run: the tokenizer's checkpoint of the bundle.")
@click.option("--teacher", type=_PATH, help="With --run: the teacher's checkpoint of the bundle.")
@click.option("--open", "opened", is_flag=True, help="Show the page in the browser.")
@click.option("--json", "as_json", is_flag=True, help="Also print what is on the page as JSON.")
@console.debug_option
def command(
    bundle: Path, output: Path | None, run: bool, opened: bool, as_json: bool, **options: Any
) -> None:
    """One self-contained HTML page about BUNDLE: what it is, and what was measured of it.

    Reads the reports in BUNDLE/parity; what is missing is named with the command that makes it. Exit code 3
    if a measurement is past its limit, 1 if no report holds this export to its limits.
    """
    from ddexport.runtime.errors import DDError, VerificationError
    from ddexport.validate.page.make import Making
    from ddexport.validate.page.view import summary, verdict

    target = output or bundle / "parity" / NAME
    facts, page = write_page(bundle, target, Making(bundle, **options) if run else None)
    if as_json:
        console.emit_json(summary(facts))
    else:
        click.echo(page)
    for remark in facts.remarks:
        click.echo(f"warning: {remark}", err=True)
    for missing in facts.missing:
        click.echo(f"not measured: {missing.what}: {missing.command}", err=True)
    if opened:
        click.launch(page.resolve().as_uri())
    kind, words = verdict(facts)
    if kind == "bad":
        raise VerificationError(words, f"see {page}")
    if kind == "open":
        raise DDError(words, f"see {page}; --run makes what is missing")
