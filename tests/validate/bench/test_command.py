"""The command as it is typed: what it prints where, what it writes, and how it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

from ddexport.runtime.backends import choose
from ddexport.runtime.bundle import read_manifest
from ddexport.validate.bench import plan, rounds
from ddexport.validate.bench.cli import command
from ddexport.validate.bench.run import FIELDS
from ddexport.validate.bench.table import ratio, remarks, tables, times_to_save
from ddexport.validate.bench.worker import WorkerError
from ddexport.validate.plots import bench_bars
from tests.gates.faults import in_graph

QUICK = ("--duration", "0", "--no-roofline", "--threads", "1", "--precision", "fp32")


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def bench(in_process):
    """The command, with its workers in this process."""
    return lambda *words: CliRunner().invoke(command, list(map(str, words)))


def damage(bundle: Path, role: str, factor: float) -> None:
    """The largest weight of a graph is another one; hash and size are made right again."""

    def edit(graph):
        weight = max(graph.initializer, key=lambda one: numpy_helper.to_array(one).size)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * factor, weight.name))

    in_graph(edit, role)(bundle, "fp32")


def test_real_workers_and_pure_json(bundle):
    """In processes of their own: stdout is JSON, whatever is said on stderr; nothing is written."""
    before = sorted(bundle.rglob("*"))
    words = (bundle, "--backend", "onnxruntime", "--against", "naive", "--batch", "2", *QUICK, "--json")
    program = [sys.executable, "-c", "from ddexport.cli import main; main()", "bench"]
    done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert set(data) == {"schema", "machine", "rows"} and data["machine"]["versions"]["torch"]
    assert [(row["backend"], row["batch"], row["steps"]) for row in data["rows"]] == [
        ("onnxruntime", 2, 1),
        ("naive", 2, 1),
    ]
    for row in data["rows"]:
        assert set(FIELDS) < set(row) and row["threads"] == 1 and row["device"] == "cpu"
        assert row["passed"] is True and row["rounds"] == 5 and row["peak_mib"] > 10
        assert row["total_min_ms"] <= row["total_ms"] <= row["total_max_ms"]
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert sorted(bundle.rglob("*")) == before


def test_tables_plot_and_roofline(bench, bundle, tmp_path, monkeypatch):
    plot = tmp_path / "plot.png"
    monkeypatch.setattr("ddexport.validate.bench.roofline.SIZE", 64)
    words = [word for word in QUICK if word != "--no-roofline"]
    done = bench(bundle, "--backend", "onnxruntime,torch-eager", "--steps", "1,9", *words, "--plot", plot)
    assert done.exit_code == 0, done.output
    assert "onnxruntime fp32, batch 1, steps 1" in done.stdout and "of peak" in done.stdout
    assert "GFLOP/s (fp32, threads 1)" in done.stdout
    assert "skipped: digits-var: onnxruntime fp32, steps 9" in done.stderr
    assert Image.open(plot).width == 1000


def test_a_fast_wrong_row_is_marked_and_ends_with_3(bench, copied):
    """A damaged weight that no checksum shows: everything is printed, then the exit code is 3."""
    damage(copied, "student", 1.5)
    done = bench(copied, "--backend", "onnxruntime,torch-eager", *QUICK)
    assert done.exit_code == 3, done.output
    lines = done.stdout.splitlines()
    assert [line.endswith("WRONG") for line in lines if line.startswith("onnxruntime")] == [True, True]
    assert [line.endswith("ok") for line in lines if line.startswith("torch-eager")] == [True, True]
    assert "WRONG: onnxruntime fp32, batch 1, steps 1: " in done.stderr


def test_auto_follows_what_was_saved(bench, copied):
    """And nothing that was wrong is saved: neither by itself nor in place of what was right."""
    pytest.importorskip("openvino")
    done = bench(copied, "--backend", "openvino", *QUICK, "--save")
    assert done.exit_code == 0 and "auto takes openvino, cpu, fp32" in done.stderr
    assert choose(copied, read_manifest(copied)).backend == "openvino"
    damage(copied, "decoder", 1.5)
    done = bench(copied, "--backend", "onnxruntime", *QUICK, "--save")
    assert done.exit_code == 3 and "nothing to save" in done.stderr
    assert choose(copied, read_manifest(copied)).backend == "onnxruntime"  # these are other graphs


def test_nothing_left_ends_with_1(bench, bundle):
    done = bench(bundle, "--backend", "onnxruntime", "--precision", "bf16")
    assert done.exit_code == 1 and not done.stdout
    assert "skipped: digits-var: onnxruntime bf16: " in done.stderr
    done = bench(bundle, "--backend", "onnxruntime", "--provider", "gpu")  # another name of --device
    assert done.exit_code == 1 and "'gpu'" in done.stderr


def test_what_is_missing_is_one_error_before_the_work(bench, bundle, monkeypatch):
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    monkeypatch.setattr(rounds, "interleave", lambda *_: pytest.fail("it was timed"))
    done = bench(bundle, "--backend", "onnxruntime", "--plot", bundle.parent / "p.png")
    assert done.exit_code == 1 and "timing" not in done.stderr
    assert all(name in done.stderr for name in ("torch", "safetensors", "matplotlib"))


def test_a_row_that_could_not_be_timed_ends_with_1(monkeypatch, bench, bundle, in_process):
    def fail(self, batch, steps, decoder):
        raise WorkerError("the worker was ended by SIGSEGV")

    monkeypatch.setattr("ddexport.validate.bench.session.Session.run", fail)
    done = bench(bundle, "--backend", "onnxruntime", *QUICK, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["rows"][0]["error"] == "the worker was ended by SIGSEGV"


def test_unknown_names_are_usage_errors(bench, bundle):
    for words in (
        ("--backend", "none"), ("--backend", ","), ("--precision", "fp31"), ("--against", "nonsense"),
        ("--against", "torch-eager,naive"), ("--against-steps", "1"), ("--steps", "one"), ("--steps", "0"),
        ("--batch", "1,x"), ("--plot", "plot.pdf"),
    ):  # fmt: skip
        assert bench(bundle, *words).exit_code == 2, words


def row(backend="openvino", precision="fp32", total=10.0, batch=1, steps=1, **more):
    made = {
        "bundle": "b", "model": "var-d16", "backend": backend, "precision": precision, "device": "cpu",
        "threads": 2, "batch": batch, "steps": steps, "decoder": "full", **dict.fromkeys(FIELDS),
        "student_ms": 0.6 * total,
        "decoder_ms": 0.3 * total, "total_ms": total, "rounds": 7, "roofline": 0.42, "passed": True,
    }  # fmt: skip
    return made | more


ROWS = [
    row("openvino", "fp32", 10.0, speedup=2.0, speedup_low=1.9, speedup_high=2.125),
    row("openvino", "int8", 4.0, passed=False, faults="step 1: tokens differ", speedup=5.0),
    row("torch-eager", "fp32", 20.0, image_psnr=float("inf")),
    row("naive", "fp32", 30.0, error="the worker was ended by SIGKILL", passed=None),
    row("openvino", "bf16", 3.0, batch=4, notes="no limits", passed=None),
]


def test_tables_for_people():
    """A line a row; what no row has is no column; everything odd is said."""
    times, parity = (text.splitlines() for text in tables(ROWS).split("\n\n"))
    assert [line.split()[-1] for line in times[1:]] == ["ok", "WRONG", "ok", "failed", "?"]
    assert "teacher ms" not in times[0] and "threads" not in times[0] and "p99" not in times[0]
    assert "2.00x [1.90, 2.12]" in times[1] and ratio(ROWS[1]) == "5.00x" and "42%" in times[1]
    assert "equal" in parity[3]
    assert [line.partition(":")[0] for line in remarks(ROWS)] == ["WRONG", "failed", "note"]
    few, many = bench_bars(ROWS, "a machine"), bench_bars(ROWS[:2] * 6, "a machine")
    assert few.width == many.width == 1000 and many.height > few.height


def test_only_what_is_right_and_comparable_is_saved():
    """The first precision, one step, the smallest batch, all threads."""
    rows = [
        row("onnxruntime", total=20.0, batch=2), row("openvino", total=12.0, batch=2),
        row("openvino", total=30.0, batch=4), row("openvino", "int8", 1.0, batch=2),
        row("torch-eager", total=1.0, batch=2), row("openvino", total=1.0, batch=2, steps=2),
        row(total=1.0, batch=2, threads=1), row(total=1.0, batch=2, device="cuda:0"),
        row("fast", total=1.0, passed=False), row("fast", total=1.0, passed=None),
        row("fast", total=1.0, error="died"),
    ]  # fmt: skip
    assert times_to_save(rows, "fp32") == {"onnxruntime": 10.0, "openvino": 6.0}
    assert times_to_save(rows, "fp16") == {}
