"""What the pages of this folder generate: help texts, and tables of the measurements in docs/results/.

Pages call `usage`, `source`, `table` and `pivot` in cog blocks; `make docs` renews them, `make lint` checks
them. As a script it measures: `python docs/generate.py NAME COMMAND...` runs a command that prints JSON, and
keeps that as docs/results/NAME.json, with the command, the machine, the date and the versions beside it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]
Keep = Callable[[Row], bool]

# Heading and format of each column. Of several formats, `A|B`, the first that a row has the values for.
BENCH = {
    "engine": "{backend} {precision}", "steps": "{steps}", "student ms": "{student_ms:.1f}",
    "teacher ms": "{teacher_ms:.1f}", "decoder ms": "{decoder_ms:.1f}", "total ms": "{total_ms:.1f}",
    "memory, MiB": "{peak_mib:.0f}", "of peak": "{roofline:.0%}",
    "speed-up": "{speedup:.2f} [{speedup_low:.2f}, {speedup_high:.2f}]|{speedup:.2f}",
    "tokens equal": "{tokens_equal:.1%}", "PSNR, dB": "{image_psnr:.1f}",
    "8-bit difference": "{image_max:.0f}",
}  # fmt: skip
DISTILLED = {
    "images of": "{name}", "passes": "{passes}", "accuracy": "{accuracy:.1%}",
    "FD": "{frechet:.2f} ±{frechet_half_range:.2f}|{frechet:.2f}", "precision": "{precision:.2f}",
    "recall": "{recall:.2f}", "variance": "{variance:.1f}", "paired ratio": "{paired_ratio:.2f}",
    "ms, batch 1": "{ms_1:.1f}", "ms, batch 64": "{ms_64:.1f}",
}  # fmt: skip

# Of a model that draws from sentences; `part` says which of its tables a row is in.
DISTILLED_TEXT = {
    "images of": "{name}", "passes": "{passes}",
    "all right": "{right:.1%} ±{right_half_range:.1%}|{right:.1%}", "digit": "{digit:.1%}",
    "ink": "{ink:.1%}", "ground": "{ground:.1%}", "place": "{place:.1%}",
    "FD digit": "{frechet:.2f} ±{frechet_half_range:.2f}|{frechet:.2f}", "FD colour": "{frechet_colour:.2g}",
    "drift": "{drift:.1%}", "paired ratio": "{paired_ratio:.2f}",
}  # fmt: skip


# Of `pivot`: what `validate fid --decoder small` measured, a line for each seed and number of steps.
DECODER_ROWS = ("FID, bundle", "FID, PyTorch", "FID, increase", "share read as the class, difference")
DECODERS = (
    "seed {of[seed]}, {scope}", "{name}", "{value:.3f} {note}",
    lambda row: row["name"] in DECODER_ROWS,
)  # fmt: skip


def usage(command: str) -> None:
    """The `--help` text of a command of `ddexport`."""
    _write(f"```\n{help_text(command)}```\n")


def help_text(command: str) -> str:
    """What `ddexport COMMAND --help` prints on a terminal of 80 columns."""
    from click.testing import CliRunner

    from ddexport.cli import main

    how: dict[str, Any] = {"prog_name": "ddexport", "terminal_width": 78, "catch_exceptions": False}
    return CliRunner().invoke(main, [*command.split(), "--help"], **how).output


def source(name: str) -> None:
    """Where the figures of `docs/results/NAME.json` come from."""
    kept = _read(name)
    versions = ", ".join(f"{package} {version}" for package, version in kept["versions"].items())
    note = f" Note: {kept['note']}." if "note" in kept else ""
    _write(f"`{kept['command']}` ({kept['date']}; {kept['machine']}; {versions}).{note}\n")


def table(name: str, columns: Mapping[str, str], keep: Keep = bool) -> None:
    """A line for each row that `keep` takes of `docs/results/NAME.json`."""
    rows = _rows([name], keep)
    _write_table([{title: _cell(form, row) for title, form in columns.items()} for row in rows])


def pivot(names: Iterable[str], line: str, column: str, cell: str, keep: Keep = bool) -> None:
    """The rows of several files in one grid: formats of the heading of a line, of a column, and of a cell."""
    lines: dict[str, dict[str, str]] = {}
    for row in _rows(names, keep):
        lines.setdefault(_cell(line, row), {})[_cell(column, row)] = _cell(cell, row)
    empty = {title: "" for cells in lines.values() for title in cells}
    _write_table([{"": name} | empty | cells for name, cells in lines.items()])


def releases() -> None:
    """A line for each release, machine, model and decoder of the results `performance-*`: in each precision
    the fastest engine for one image in one step, its time and what it is over PyTorch, and the teacher."""
    lines = []
    for path in sorted(RESULTS.glob("performance-*.json"), reverse=True):
        kept = _read(path.stem)
        rows = [row for row in kept["result"]["rows"] if row["batch"] == 1 and row["total_ms"]]
        for model, decoder in dict.fromkeys((row["model"], row["decoder"]) for row in rows):
            of_model = [row for row in rows if (row["model"], row["decoder"]) == (model, decoder)]
            untrained = any(row.get("decoder_trained") is False for row in of_model)
            name = f"{decoder}, untrained at this size" if untrained else decoder
            line = {
                "release, date": f"{kept['versions']['ddexport']}, {kept['date']}",
                "machine": kept["machine"],
            }
            line |= {"model": model, "decoder": name}
            line |= {
                precision: _fastest(of_model, precision) for precision in ("fp32", "bf16", "fp16", "int8")
            }
            taught = [row for row in of_model if row["part"] == "teacher" and row["steps"] == 1]
            line["one step over the teacher"] = _cell("{speedup:.1f}x", taught[0]) if taught else ""
            lines.append(line)
    _write_table(lines)


def _fastest(rows: list[Row], precision: str) -> str:
    """`openvino 1090 ms, 4.1x` of the rows in one step of a precision, but for PyTorch's."""
    own = [
        row for row in rows if row["precision"] == precision and row["steps"] == 1 and row["part"] == "times"
    ]
    engines = [row for row in own if not row["backend"].startswith("torch")]
    if not engines:
        return ""
    best = min(engines, key=lambda row: float(row["total_ms"]))
    return _cell("{backend} {total_ms:.4g} ms, **{speedup:.2f}x**|{backend} {total_ms:.4g} ms", best)


def record(name: str, command: list[str]) -> int:
    """Runs a command and keeps the JSON that it prints. Returns its exit code."""
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE)
    if done.returncode == 0:
        keep(name, shlex.join([Path(command[0]).name, *command[1:]]), json.loads(done.stdout))
    return done.returncode


def keep(name: str, command: str, result: Any) -> None:
    """Writes docs/results/NAME.json: what a command measured, with machine, date and versions."""
    from ddexport.runtime.machine import cpu
    from ddexport.validate.report import versions

    kept = {
        "command": command,
        "machine": f"{cpu().name}, {cpu().cores} cores",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions("onnxruntime", "openvino"),
        "result": result,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _read(name: str) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return kept


def _rows(names: Iterable[str], keep: Keep) -> list[Row]:
    """The rows of results. `of`: the result that a row is of."""
    results = [_read(name)["result"] for name in names]
    rows = [{**row, "of": result} for result in results for row in result["rows"]]
    return [row for row in rows if keep(row)]


def _cell(form: str, row: Row) -> str:
    for option in form.split("|"):
        try:
            return option.format_map(row)
        except (KeyError, TypeError):  # not measured in this row
            continue
    return ""


def _write_table(lines: list[dict[str, str]]) -> None:
    """As markdown, without the columns that no line fills."""
    titles = [title for title in lines[0] if any(line[title] for line in lines)]
    cells = [titles, ["---"] * len(titles), *([line[title] for title in titles] for line in lines)]
    _write("".join(f"| {' | '.join(line)} |\n" for line in cells))


def _write(text: str) -> None:
    import cog

    cog.outl(f"\n{text}")


if __name__ == "__main__":
    sys.exit(record(sys.argv[1], sys.argv[2:]))
