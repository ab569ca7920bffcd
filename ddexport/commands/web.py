"""`ddexport web`: bundles become a page that draws in the visitor's browser."""

from __future__ import annotations

from pathlib import Path

import click

from ddexport.runtime import console
from ddexport.runtime.options import PATH, option, shared

EPILOG = """
\b
Examples:
  ddexport web digits-var
  ddexport web digits-var digits-llamagen -o site --force
  ddexport web build/llamagen-b --precision fp16 -o llamagen-site
  ddexport web digits-var --single-file -o digits.html
"""


@click.command("web", cls=console.Command, epilog=EPILOG)
@shared("bundle", name="bundles", metavar="[BUNDLE]...", nargs=-1)
@option("-o", "--output", type=PATH, metavar="PATH", default="build/site",
        help="Directory of the new site, or HTML file.")  # fmt: skip
@shared("precision", show_default="the first of a bundle",
        help="Precision to compute in: fp32, fp16 or int8.")  # fmt: skip
@option("--single-file", is_flag=True, help="Write one HTML file that opens from a disk, of small bundles.")
@option("--force", is_flag=True, help="Replace an existing site, after the new one is complete.")
@shared("json")
@console.debug_option
def command(
    bundles: list[Path], output: Path, precision: str | None, single_file: bool, force: bool, as_json: bool
) -> None:
    """Make a web page that draws with BUNDLE.

    The site is a directory for any file server: the page, ONNX Runtime for browsers, and the part of each
    bundle that one precision needs. Its page asks no other server for anything.

    npm fetches the package onnxruntime-web once. It is checked by its hash, and kept in ~/.cache/ddexport.
    """
    from ddexport.site import parts_of, write_page, write_site

    if single_file and output.suffix != ".html":
        raise click.UsageError("--single-file needs a name that ends in .html after -o.")
    with console.stage(f"writing {output}"):
        parts = parts_of(bundles, precision)
        (write_page if single_file else write_site)(parts, output, force)
    files = [output] if single_file else [path for path in output.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if as_json:
        listed = {part.manifest.name: part.precision for part in parts}
        console.emit_json({"site": str(output), "bundles": listed, "bytes": size})
        return
    click.echo(f"{output}: {', '.join(part.manifest.name for part in parts)}, {size / 2**20:.1f} MiB")
    click.echo("open it in a browser" if single_file else f"look at it: python -m http.server -d {output}")
