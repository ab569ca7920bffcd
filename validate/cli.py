"""`python -m validate`, and `ddexport validate`: each command is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import click

from ddexport.runtime import console

COMMANDS = {
    "parity": "ddexport.validate.parity",
    "fid": "ddexport.validate.fid",
    "limits": "ddexport.validate.limits",
    "report": "ddexport.validate.page",
    "quality": "ddexport.validate.quality",
    "speed": "ddexport.validate.speed",
    "comparison": "ddexport.validate.comparison",
    "curve": "ddexport.validate.curve",
}


class _LazyGroup(console.Group):
    """Finds each command as `command` in its module; a module that is not installed is not listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, module in COMMANDS.items() if find_spec(module) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        subcommand: click.Command = import_module(COMMANDS[cmd_name]).command
        return subcommand


@click.group("validate", cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Hold a bundle against what it was made from."""
