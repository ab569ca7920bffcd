"""`ddexport inspect`: what is in a bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddexport.runtime import console
from ddexport.runtime.options import shared

if TYPE_CHECKING:
    from ddexport.runtime.bundle import Manifest
    from ddexport.runtime.contract import TensorSpec
    from ddexport.runtime.schedule import Schedule

EPILOG = """
\b
Examples:
  ddexport inspect digits-var
  ddexport inspect digits-var --json
"""


@click.command("inspect", cls=console.Command, epilog=EPILOG)
@shared("bundle", "no-verify", "json")
@console.debug_option
def command(bundle: Path, no_verify: bool, as_json: bool) -> None:
    """Show the model, weights, graphs and schedules of BUNDLE.

    The SHA-256 of every file is compared with the manifest. --json prints the manifest itself.
    """
    from ddexport.card import accuracy_lines, read_accuracy
    from ddexport.runtime.bundle import read_manifest

    manifest = read_manifest(bundle, verify=not no_verify)
    if as_json:
        click.echo(json.dumps(json.loads(manifest.to_json()), indent=2))
        return
    s = manifest.sequence
    click.echo(f"{manifest.name}: {manifest.title}")
    click.echo(f"  images     {manifest.image.width}x{manifest.image.height}, {_condition(manifest)}")
    click.echo(
        f"  sequence   {s.length} positions of width {s.width}; split {s.split}: positions before it are"
        f" entries of a codebook of {s.codebook}, the others are regressed"
    )
    click.echo("  schedules  known: number of leading positions that each student call gets as input")
    for steps, schedule in sorted(manifest.schedules.items()):
        click.echo(f"  {f'{steps} step' + ('s' if steps > 1 else ''):10} {_schedule(schedule)}")
    if manifest.teacher is not None:
        click.echo(f"  teacher    all {s.length} positions in {len(manifest.teacher.starts) - 1} AR steps")
    for line in _weights(manifest):
        click.echo(line)
    for graph in manifest.graphs:
        size = sum(file.bytes for file in graph.files) / 2**20
        what = f"{graph.role}, split {graph.split}" if graph.split else graph.role
        files = ", ".join(info.file for info in graph.files)
        click.echo(f"  {what:10} {graph.precision}, {size:.1f} MiB in {files}")
        if graph.keep_fp32:
            click.echo(f"             kept in fp32: {', '.join(graph.keep_fp32)}")
        for arrow, tensors in zip(("in", "out"), manifest.tensors(graph), strict=True):
            for tensor in tensors:
                if not _is_repeated(tensor):
                    shape = ", ".join(map(str, tensor.shape))
                    click.echo(f"             {arrow:3} {tensor.name:9} {tensor.dtype} [{shape}]")
    for pipeline in manifest.pipelines:
        what = f"{pipeline.steps} step{'s' if pipeline.steps > 1 else ''}, decoder {pipeline.decoder}"
        click.echo(f"  pipeline   {what}, {pipeline.precision}, in {pipeline.file}")
    for line in accuracy_lines(read_accuracy(bundle)):
        click.echo(f"  {line}")
    for steps, fid in manifest.published.get("fid", {}).items():
        click.echo(f"  published  FID {fid} in {steps} step{'s' if steps != '1' else ''}")
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    click.echo(f"  made       {manifest.created} by {tools}")
    click.echo("  hashes     not checked" if no_verify else "  hashes     all match")


def _condition(manifest: Manifest) -> str:
    if manifest.text is None:
        return f"{manifest.classes} classes"
    encoder = "with its text encoder" if manifest.text.tokenizer else "without a text encoder"
    return f"of texts of up to {manifest.text.tokens} tokens, {encoder}"


def _weights(manifest: Manifest) -> Iterator[str]:
    """Where the weights are from, and what further decoders cost."""
    weights = manifest.weights
    if weights.kind == "random":
        yield f"  weights    random, seed {weights.seed}: the images mean nothing"
    for file in weights.files:
        copy = f", {file.weights}" if file.weights else ""
        origin = f" of {file.repository} at {str(file.commit)[:7]}" if file.repository else ""
        kind = f"{weights.kind}{copy}"
        yield f"  weights    {file.role}: {file.file}{origin} ({kind}), sha256 {file.sha256[:16]}"
    for name, cost in manifest.decoders.items():
        yield f"  decoder    {name}, against the full one: {cost}"


def _is_repeated(tensor: TensorSpec) -> bool:
    """Whether it is the cache of a layer after the first, which is like the first one's."""
    layer = re.fullmatch(r"(?:new_)?(?:key|value)_(\d+)", tensor.name)
    return layer is not None and int(layer[1]) > 0


def _schedule(schedule: Schedule) -> str:
    known = ", ".join(map(str, schedule.known))
    split = "" if schedule.split is None else f", split {schedule.split}"
    span = schedule.teacher
    return f"known {known}{split}" + (f", teacher {span.start} to {span.end}" if span else "")
