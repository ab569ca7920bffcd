"""`python -m validate`."""

from __future__ import annotations

from validate.cli import command

if __name__ == "__main__":
    command(prog_name="python -m validate")
