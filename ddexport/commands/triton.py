"""`ddexport triton`: a bundle becomes a model repository of Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddexport.runtime import console
from ddexport.runtime.options import PATH, POSITIVE, option, shared

EPILOG = """
\b
Examples:
  ddexport triton digits-var
  ddexport triton digits-var --precision int8 --decoder small -o repository
  ddexport triton build/var-d16 --precision fp16 --engines --max-batch 32 -o var-d16-triton
"""


@click.command("triton", cls=console.Command, epilog=EPILOG)
@shared("bundle")
@option("-o", "--output", type=PATH, metavar="PATH", default="build/triton", help="The new model repository.")
@shared("precision", show_default="the first of the bundle")
@shared("decoder")
@option("--engines/--no-engines", default=None, show_default="where there are any",
        help="Serve full-TensorRT engines of the bundle in place of its ONNX graphs.")  # fmt: skip
@option("--max-batch", type=POSITIVE, metavar="N", show_default="16, or as many as fit about 2 GiB",
        help="Number of images that are drawn at once; engines may take less.")  # fmt: skip
@option("--force", is_flag=True, help="Replace an existing repository, after the new one is complete.")
@shared("json")
@console.debug_option
def command(bundle: Path, output: Path, force: bool, as_json: bool, **options: Any) -> None:
    """Write BUNDLE as a model repository of Triton Inference Server.

    An ensemble for each schedule of the student, such as one_step, takes noise and labels and gives 8-bit
    images. README.md in the repository says how to start a server, and has a client.
    """
    from ddexport.triton import write_repository

    with console.stage(f"writing {output}"):
        summary = write_repository(bundle, output, replace=force, **options)
    if as_json:
        console.emit_json({"repository": str(output), **summary})
        return
    models = ", ".join(f"{name} by {platform}" for name, platform in summary["models"].items())
    click.echo(f"{output}: {', '.join(summary['ensembles'])}; {models}; batches up to {summary['max_batch']}")
    click.echo(f"to serve it: {output / 'README.md'}")
