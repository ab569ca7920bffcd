"""The command `ddexport`. Its sub-commands are entry points of the group `ddexport.commands`, imported when
used."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import click

from ddexport.runtime import console

# In the order in which a user meets them; commands of other packages follow.
ORDER = (
    "models", "onnx", "trt", "inspect", "sample", "serve", "web", "triton", "doctor", "validate", "distill",
    "bench", "push",
)  # fmt: skip


class EntryPointGroup(console.Group):
    """A group whose commands are found among the installed entry points."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = sorted(_commands())
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _commands().get(cmd_name)
        return entry.load() if entry else None


def _commands() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="ddexport.commands")}


EPILOG = """
\b
Examples:
  ddexport onnx digits-var
  ddexport sample digits-var -n 4 -o digits.png
  ddexport validate parity digits-var
  ddexport onnx --model var-d16
  ddexport sample hf://USER/NAME --steps 1
"""


@click.group(cls=EntryPointGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddexport")
def main() -> None:
    """Export and run Distilled Decoding models: auto-regressive image models, distilled to one or two steps.

    MODEL is a recipe, a YAML file that describes a model: give its name in `ddexport models`, the file, or a
    directory or hf://USER/NAME with a recipe.yaml and weights. BUNDLE is a directory with the ONNX graphs of
    a model, which `ddexport onnx` writes: give its path, its name under build/, or hf://USER/NAME.
    """
