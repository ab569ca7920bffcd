"""The command as it is typed: what it prints where, what it writes, and how it ends."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from msgspec import structs
from onnx import numpy_helper

from ddexport.runtime.backends import choose
from ddexport.runtime.bundle import file_info, read_manifest
from ddexport.validate.bench import run as running
from ddexport.validate.bench.cli import command
from ddexport.validate.bench.report import marks_of
from ddexport.validate.bench.worker import WorkerError

START, END = marks_of()

KEYS = {
    "model", "backend", "precision", "batch", "steps", "student_ms", "decoder_ms", "total_ms", "images_per_s",
    "peak_mib", "roofline", "tokens_equal", "image_psnr", "against", "speedup", "speedup_low", "speedup_high",
    "teacher_ms", "percentiles", "rounds", "embedding_error", "image_max", "passed", "faults", "flops",
    "threads", "device", "processes", "version", "machine",
}  # fmt: skip
QUICK = ("--duration", "0", "--no-roofline", "--threads", "1", "--precision", "fp32")


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def bench(monkeypatch, in_process):
    """The command, with its workers in this process."""
    monkeypatch.setattr(running, "run_bench", partial(running.run_bench, start=in_process))

    def run(*words):
        return CliRunner().invoke(command, list(map(str, words)))

    return run


def damage(bundle: Path, role: str, factor: float) -> None:
    """The largest weight of a graph is another one; hash and size are made right again."""
    path = bundle / f"{role}.onnx"
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda one: numpy_helper.to_array(one).size)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * factor, weight.name))
    onnx.save(model, path)
    manifest = json.loads((bundle / "bundle.json").read_text())
    for graph in manifest["graphs"]:
        if graph["file"] == path.name:
            graph["files"] = [structs.asdict(file_info(path, bundle))]
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def test_real_workers_and_pure_json(copied):
    """In processes of their own: stdout is a JSON list of rows, whatever is said on stderr."""
    words = [copied, "--backend", "onnxruntime", "--against", "published", "--batch", "2", *QUICK, "--json"]
    done = CliRunner().invoke(command, list(map(str, words)))
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(one["backend"], one["batch"], one["steps"]) for one in rows] == [
        ("onnxruntime", 2, 1),
        ("published", 2, 1),
    ]
    for one in rows:
        assert set(one) >= KEYS
        assert one["passed"] is True and one["rounds"] == 5 and one["peak_mib"] > 10
        assert one["images_per_s"] > 0 and one["threads"] == 1
        assert one["speedup_low"] <= one["speedup"] <= one["speedup_high"]
        assert set(one["percentiles"]["total"]) == {"50", "90", "99"}
    assert not (copied / "bench.json").exists()


def test_tables_plot_and_page(bench, copied, tmp_path):
    page, plot = tmp_path / "page.md", tmp_path / "plot.png"
    page.write_text(f"top\n{START}\n{END}\nend\n")
    done = bench(
        copied, "--backend", "onnxruntime,torch", "--steps", "1,2,9", *QUICK, "--plot", plot, "--update", page
    )
    assert done.exit_code == 0, done.output
    assert "onnxruntime fp32" in done.stdout and "best" in done.stdout and "GFLOP an image" in done.stdout
    assert "steps 9: tiny has no schedule of 9 steps" in done.stderr
    text = page.read_text()
    assert text.startswith("top\n") and text.endswith("\nend\n")
    assert "--backend onnxruntime,torch --steps 1,2,9" in text and "--no-roofline" in text
    assert "](plot.png)" in text and plot.stat().st_size > 0
    assert "skipped: tiny: onnxruntime fp32, steps 9" in text


@pytest.mark.parametrize("role", ["student", "decoder"])
def test_a_fast_wrong_row_is_marked_and_ends_with_3(bench, copied, role):
    """A damaged weight that no checksum tells: everything is printed, then the exit code says it."""
    damage(copied, role, 1.5)
    done = bench(copied, "--backend", "onnxruntime,torch", *QUICK)
    assert done.exit_code == 3, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith("onnxruntime")]
    assert len(lines) == 2 and all(line.endswith("WRONG") for line in lines)
    assert next(line for line in done.stdout.splitlines() if line.startswith("torch")).endswith("best")
    assert "miss the bundle's limits: onnxruntime fp32, batch 1, steps 1" in done.stderr
    rows = json.loads(bench(copied, "--backend", "onnxruntime", *QUICK, "--json").stdout)
    assert rows[0]["passed"] is False and rows[0]["faults"]


def test_auto_follows_what_was_saved(bench, copied):
    """And nothing that was wrong is saved: neither by itself nor in place of what was right."""
    pytest.importorskip("openvino")
    done = bench(copied, "--backend", "openvino", *QUICK, "--save")
    assert done.exit_code == 0 and "auto takes openvino, cpu, fp32" in done.stderr
    manifest = read_manifest(copied)
    assert choose(copied, manifest).backend == "openvino"
    assert choose(copied, manifest, precision="fp32").backend == "openvino"
    damage(copied, "decoder", 1.5)
    done = bench(copied, "--backend", "onnxruntime", *QUICK, "--save")
    assert done.exit_code == 3 and "nothing to save" in done.stderr
    assert choose(copied, read_manifest(copied)).backend == "onnxruntime"  # these are other graphs


def test_several_bundles_are_one_list(bench, bundle, copied):
    done = bench(bundle, copied, "--backend", "onnxruntime", *QUICK, "--json")
    assert [Path(one["bundle"]) for one in json.loads(done.stdout)] == [bundle, copied]


def test_nothing_left_ends_with_1(bench, bundle):
    done = bench(bundle, "--backend", "onnxruntime", "--precision", "int8")
    assert done.exit_code == 1
    assert "skipped: tiny: onnxruntime int8: the bundle has no graphs in int8" in done.stderr
    assert "nothing that was asked for can be timed" in done.stderr and not done.stdout


def test_a_row_that_could_not_be_timed_ends_with_1(monkeypatch, bench, bundle, in_process):
    def send(self, *call):
        raise WorkerError("the worker was ended by SIGSEGV")

    monkeypatch.setattr(in_process, "send", send)
    done = bench(bundle, "--backend", "onnxruntime", *QUICK, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)[0]["error"] == "the worker was ended by SIGSEGV"
    assert "could not be timed" in done.stderr


def test_a_device_has_two_names(bench, bundle):
    for option in ("--device", "--provider"):
        done = bench(bundle, "--backend", "onnxruntime", option, "gpu")
        assert done.exit_code == 1 and "no device 'gpu'" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--backend", "nonsense"],
            "there is: onnxruntime, openvino, tensorrt, torch, torch-compile, published",
        ),
        (["--precision", "fp31"], "there is: fp32, fp16, bf16, int8"),
        (["--against", "nonsense"], "there is: onnxruntime"),
        (["--against", "torch,published"], "it takes one"),
        (["--against-steps", "1"], "give both"),
        (["--backend", ","], "there is: onnxruntime"),
        (["--steps", "one"], "teacher"),
        (["--steps", "0"], "teacher"),
        (["--batch", "1,x"], "list of numbers"),
        (["--percentile", "101"], "list of percentiles"),
        (["--plot", "plot.pdf"], ".png"),
    ],
)
def test_unknown_names_are_usage_errors_with_the_list(bench, bundle, words, said):
    done = bench(bundle, *words)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_a_page_without_marks_is_known_before_the_work(bench, bundle, tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    done = bench(bundle, "--update", tmp_path / "page.md")
    assert done.exit_code == 1 and "timing" not in done.stderr
