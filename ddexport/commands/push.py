"""`ddexport push`: a bundle becomes a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from ddexport.runtime import console
from ddexport.runtime.options import BUNDLE, option, shared

EPILOG = """
\b
Examples:
  ddexport push digits-var my-name/digits-var
  ddexport push build/var-d16 my-name/var-d16 --private
  ddexport sample hf://my-name/digits-var --steps 1 -n 8
"""


@click.command("push", cls=console.Command, epilog=EPILOG)
@shared("bundle", metavar="BUNDLE", help=BUNDLE)
@click.argument(
    "repository", metavar="USER/NAME", required=False, help="Repository on the Hub, made if need be."
)
@option("--private", is_flag=True, help="Make a new repository private.")
@shared("json")
@console.debug_option
def command(bundle: Path, repository: str | None, private: bool, as_json: bool) -> None:
    """Publish BUNDLE on the Hugging Face Hub.

    The graphs, the parity reports and a model card are uploaded in one commit: licence, tags, a picture that
    the bundle drew, and the figures that `ddexport validate` measured. Other files in the repository stay.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from ddexport.hub.files import SCHEME, parse
    from ddexport.hub.push import push

    if repository is None:
        raise click.UsageError("USER/NAME is missing: the repository on the Hub.")
    address = f"{SCHEME}{repository}"
    parse(address)
    with console.stage(f"publishing {bundle}"):
        commit = push(bundle, repository, private)
    if as_json:
        console.emit_json({"bundle": str(bundle), "address": address, "commit": commit})
    else:
        click.echo(f"{commit}\nuse it as a bundle: ddexport sample {address}")
