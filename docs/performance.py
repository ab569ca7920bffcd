"""Makes a line of the table of results: var-d16 and llamagen-l on this machine. `make performance` runs it.

python docs/performance.py MACHINE writes docs/results/performance-MACHINE.json. What has been measured is
kept in build/performance/MACHINE, and not measured again.

    times       one image in one step: every engine and precision, PyTorch, both decoders
    teacher     the auto-regressive model in PyTorch, and its student beside it
    batches     of 1, 8 and 32 with the small decoder: the fastest engine, and PyTorch compiled
    fid         of the digits models, which are trained: every engine and precision, both decoders
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import generate

from ddexport.runtime.errors import DDError

MODELS = {"var-d16": "digits-var", "llamagen-l": "digits-llamagen"}  # and which one stands for its FID
BENCH = ["bench", *(f"build/{model}" for model in MODELS)]
PARTS = {
    "times": [*BENCH, "--precision", "fp32,bf16,int8", "--decoder", "full,small", "--duration", "8"],
    "teacher": [*BENCH, "--backend", "torch-eager", "--precision", "fp32", "--decoder", "full,small",
                "--steps", "1,teacher", "--against", "torch-eager", "--against-steps", "teacher",
                "--warmup", "0", "--duration", "1"],
    # PyTorch's int8 would compile for minutes at every batch size.
    "batches": [*BENCH, "--precision", "fp32,bf16", "--decoder", "small", "--batch", "1,8,32",
                "--backend", "openvino,torch-compile", "--warmup", "0", "--duration", "8"],
    "batches-int8": [*BENCH, "--precision", "int8", "--decoder", "small", "--batch", "1,8,32",
                     "--backend", "openvino", "--warmup", "0", "--duration", "8"],
}  # fmt: skip
IMAGES = 2000


def measured(path: Path, words: list[str]) -> Any:
    """The JSON that a command of ddexport printed, now or before: also where a row failed or exceeds a limit,
    and says so. None where it cannot run here."""
    if not path.exists():
        program = [str(Path(sys.executable).with_name("ddexport")), *words, "--json"]
        done = subprocess.run(program, check=False, stdout=subprocess.PIPE)
        if not done.stdout:
            return None
        path.write_bytes(done.stdout)
    return json.loads(path.read_text())


def fids(folder: Path) -> Iterator[dict[str, Any]]:
    """The FID of a bundle and of PyTorch, in one step."""
    settings = product(
        MODELS.values(), ("onnxruntime", "openvino"), ("fp32", "bf16", "int8"), ("full", "small")
    )
    for model, backend, precision, decoder in settings:
        words = ["validate", "fid", f"build/precisions/{model}", "--steps", "1", "--images", str(IMAGES),
                 "--batch", "200", "--no-emulate", "--backend", backend, "--precision", precision,
                 "--decoder", decoder]  # fmt: skip
        report = measured(folder / f"fid-{model}-{backend}-{precision}-{decoder}.json", words)
        values = {row["name"]: row["value"] for row in report["rows"]} if report else {}
        if values:
            yield {
                "model": model, "backend": backend, "precision": precision, "decoder": decoder,
                "fid": values["FID, bundle"], "fid_pytorch": values["FID, PyTorch"],
                "passed": report["passed"],
            }  # fmt: skip


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Of `ddexport bench`, by part, with the FID of the small model beside it."""
    parts = {part: measured(folder / f"{part}.json", words) for part, words in PARTS.items()}
    if missing := [part for part, result in parts.items() if result is None]:
        raise DDError(f"not measured: {', '.join(missing)}", "see above, then run the same command again")
    keys = ("backend", "precision", "decoder")
    beside = {(one["model"], *(one[key] for key in keys)): one for one in fids(folder)}
    for part, result in parts.items():
        for row in result["rows"]:
            fid = beside.get((MODELS[row["model"]], *(row[key] for key in keys)), {})
            yield {"part": part, **row, "fid": fid.get("fid"), "fid_pytorch": fid.get("fid_pytorch")}


if __name__ == "__main__":
    machine = sys.argv[1]
    folder = generate.RESULTS.parents[1] / "build" / "performance" / machine
    folder.mkdir(parents=True, exist_ok=True)
    result = {"rows": list(rows(folder))}
    generate.keep(f"performance-{machine}", f"python docs/performance.py {machine}", result)
