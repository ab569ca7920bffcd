"""`python -m validate`, and `ddexport validate`: each command is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

import click

from ddexport.runtime import console

COMMANDS = {
    "parity": "ddexport.validate.parity",
    "fid": "ddexport.validate.fid",
    "limits": "ddexport.validate.limits",
    "report": "ddexport.validate.page",
    "distilled": "ddexport.validate.distilled",
}


class _LazyGroup(console.Group):
    """Finds each command as `command` in its module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        return None if module is None else import_module(module).command


EPILOG = """
\b
Examples:
  ddexport validate parity digits-var
  ddexport validate fid digits-var --images 500 --save-images images/
  ddexport validate report digits-var --open
"""


@click.group(
    "validate", cls=_LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
def command() -> None:
    """Compare a bundle with the PyTorch model it was exported from."""
