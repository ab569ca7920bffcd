"""Measures how many images a second `ddexport sample --shards` draws, and says what that takes.

python docs/capacity.py BUNDLE...: fp32 and int8, on one core and on all. Of models of real size it takes the
times of docs/results/performance-epyc.json. Prints JSON for docs/generate.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ddexport.runtime import console

COUNT = 3000
SET_PER_SECOND = 50_000 / 600  # 50,000 images in ten minutes
USERS_PER_SECOND = 1000 / 30  # of 1,000 users each waits for an image twice a minute
REAL_SIZE = Path(__file__).parent / "results" / "performance-epyc.json"


def row(model: str, engine: str, cores: int, rate: float, how: str) -> dict[str, Any]:
    """A line of the table; rate: images a second on so many cores."""
    core = rate / cores
    needed = {"set_cores": math.ceil(SET_PER_SECOND / core), "user_cores": math.ceil(USERS_PER_SECOND / core)}
    return {
        "model": model,
        "engine": engine,
        "cores": cores,
        "rate": rate,
        "core": core,
        "how": how,
        **needed,
    }


def drawn(bundle: str, precision: str, workers: int) -> dict[str, Any]:
    """One bundle, with a process a core."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(sys.executable).with_name("ddexport")
        command = [program, "sample", bundle, "--precision", precision, "--backend", "onnxruntime", "--json"]
        command += ["--count", str(COUNT), "--shards", folder, "--workers", str(workers)]
        report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    engine = f"{report['backend']} {precision}"
    return row(report["bundle"], engine, workers, report["images_per_second"], "sample --shards")


def main(bundles: list[str]) -> None:
    """Prints the rows."""
    workers = sorted({1, len(os.sched_getaffinity(0))})
    rows = [drawn(name, kind, n) for name in bundles for kind in ("fp32", "int8") for n in workers]
    for timed in json.loads(REAL_SIZE.read_text())["result"]["rows"]:
        if timed["backend"] in ("onnxruntime", "openvino") and timed["steps"] == 1:
            engine, rate = f"{timed['backend']} {timed['precision']}", 1000 / timed["total_ms"]
            rows.append(row(timed["model"], engine, timed["threads"], rate, "bench, batch 1"))
    console.emit_json({"rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
