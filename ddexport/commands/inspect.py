"""`ddexport inspect`: what is in a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ddexport.precision.policy import FLOAT32
from runtime import console

EPILOG = """
\b
Examples:
  ddexport inspect build/digits-var
  ddexport inspect build/digits-var --json
"""


@click.command("inspect", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--no-verify", is_flag=True, help="Do not compare the files' SHA-256.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@console.debug_option
def command(bundle: Path, no_verify: bool, as_json: bool) -> None:
    """Show a bundle: model, weights, graphs, schedules. All hashes are checked."""
    from ddexport.precision.table import error_table, summary
    from runtime.manifest import read_manifest

    manifest = read_manifest(bundle, verify=not no_verify)
    if as_json:
        click.echo(json.dumps(json.loads(manifest.to_json()), indent=2))
        return
    s, weights = manifest.sequence, manifest.weights
    click.echo(f"{manifest.name}: {manifest.title}")
    click.echo(f"  images     {manifest.image.width}x{manifest.image.height}, {manifest.classes} classes")
    click.echo(
        f"  sequence   {s.length} positions of width {s.width};"
        f" the first {s.split} from a codebook of {s.codebook}"
    )
    for steps, schedule in sorted(manifest.schedules.items()):
        click.echo(
            f"  {steps} step{'s' if steps > 1 else ' '}    known {', '.join(map(str, schedule.known))}"
        )
    if weights.kind == "random":
        click.echo(f"  weights    random, seed {weights.seed}: the images mean nothing")
    for file in weights.files:
        copy = f", {file.weights}" if file.weights else ""
        click.echo(f"  weights    {file.role}: {file.file} ({weights.kind}{copy}), sha256 {file.sha256[:16]}")
    for graph in manifest.graphs:
        size = sum(file.bytes for file in graph.files) / 2**20
        click.echo(
            f"  {graph.role:10} {graph.precision}, {size:.1f} MiB in {', '.join(f.file for f in graph.files)}"
        )
        if graph.precision != FLOAT32 and graph.accuracy:
            kept = ", ".join(graph.accuracy["keep_fp32"])
            click.echo(f"             {summary(graph)}{f', kept in fp32: {kept}' if kept else ''}")
            for line in error_table(graph.accuracy["errors"]):
                click.echo(f"             {line}")
        for arrow, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            for tensor in tensors:
                shape = ", ".join(map(str, tensor.shape))
                click.echo(f"             {arrow:3} {tensor.name:9} {tensor.dtype} [{shape}]")
    for steps, fid in manifest.published.get("fid", {}).items():
        click.echo(f"  published  FID {fid} in {steps} step{'s' if steps != '1' else ''}")
    click.echo(
        f"  made       {manifest.created} by " + ", ".join(f"{k} {v}" for k, v in manifest.tools.items())
    )
    click.echo("  hashes     not checked" if no_verify else "  hashes     all match")
