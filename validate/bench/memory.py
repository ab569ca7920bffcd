"""The most memory that this process has held since a moment: Linux tells it, and can be made to forget."""

from __future__ import annotations

import re
import sys
from pathlib import Path

PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # what makes the kernel set VmHWM back to the present size: man 5 proc, clear_refs


def reset_peak(process: Path = PROCESS) -> bool:
    """Starts counting anew. False where the system cannot: `peak_mib` counts from the start then."""
    try:
        (process / "clear_refs").write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def peak_mib(process: Path = PROCESS) -> float | None:
    """MiB of resident memory at its most; None where the system does not tell."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", (process / "status").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return int(found[1]) / 1024
    return _since_the_start()


def _since_the_start() -> float | None:
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20) if sys.platform == "darwin" else most / 1024  # bytes there, kilobytes elsewhere
