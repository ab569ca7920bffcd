"""`python runtime/infer.py`: the command `ddexport sample` from a checkout, with nothing installed."""

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Python puts this folder first, where our file names would pass for other modules.
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(entry for entry in sys.path if Path(entry).resolve() != _here)]

from ddexport.runtime.cli import command

if __name__ == "__main__":
    command(help_option_names=["-h", "--help"])  # as under `ddexport`
