"""`python -m validate` in a checkout: the command `ddexport validate`."""

import sys

from ddexport.validate.cli import command

if __name__ == "__main__":
    sys.modules.pop("validate", None)  # this package under its short name: nothing of ours is there twice
    command(prog_name="python -m validate")
