"""The tables, the page and the plot that people read."""

from __future__ import annotations

import dataclasses
import math

import pytest
from PIL import Image

from ddexport.runtime.errors import DDError, OutputError
from ddexport.validate.bench.plot import write_plot
from ddexport.validate.bench.report import address, block, check_page, marks_of, update
from ddexport.validate.bench.rows import Row, best_rows, times_to_save
from ddexport.validate.bench.table import parity_grid, ratio, remarks, times_grid, work_line
from ddexport.validate.bench.workload import RunnerConfiguration, Workload

START, END = marks_of()
PEAKS = {(2, "fp32"): 430.4, (2, "int8"): "no engine"}
WORK = {"student": 600e9, "decoder": 402e9, "total": 1002e9}


def row(backend="openvino", precision="fp32", total=10.0, batch=1, steps=1, runner=None, **more):
    given = {
        "bundle": "b", "model": "var-d16", "runner": runner or RunnerConfiguration(backend, precision, 2),
        "workload": Workload(batch, steps), "student_ms": 0.6 * total, "decoder_ms": 0.3 * total,
        "total_ms": total, "percentiles": {"total": {"50": total, "99": 1.5 * total}}, "rounds": 7,
        "images_per_s": 1e3 / total, "peak_mib": 1234.5, "roofline": 0.42, "tokens_equal": 1.0,
        "embedding_error": 3e-7, "image_psnr": 120.0, "image_max": 0.0, "passed": True, "flops": WORK,
    }  # fmt: skip
    return Row(**{**given, **more})


@pytest.fixture
def rows():
    return [
        row("openvino", "fp32", 10.0, speedup=2.0, speedup_low=1.9, speedup_high=2.125, against="torch"),
        row("openvino", "int8", 4.0, passed=False, faults=("step 1: tokens differ",), speedup=5.0),
        row("torch", "fp32", 20.0, image_psnr=math.inf, speedup=1.0, speedup_low=1.0, speedup_high=1.0),
        row("published", "fp32", 30.0, total_ms=None, error="the worker was ended by SIGKILL", passed=None),
        row("openvino", "bf16", 3.0, batch=4, notes=("1 of 55 tokens differ",)),
    ]


class TestTables:
    def test_the_best_is_the_fastest_that_is_right(self, rows):
        """Of each batch; a wrong row is never the best, however fast."""
        assert best_rows(rows) == {0, 4}
        marks = [line[-1] for line in times_grid(rows).cells]
        assert marks == ["best", "WRONG", "", "failed", "best"]

    def test_columns_that_nobody_fills_are_left_out(self, rows):
        headers = times_grid(rows, (50.0, 99.0)).headers
        assert "teacher ms" not in headers and "threads" not in headers
        assert "p99" in headers and "p50" not in headers
        assert "speed-up" in headers and "of peak" in headers
        bare = [dataclasses.replace(one, speedup=None, roofline=None, teacher_ms=3.0) for one in rows]
        assert not {"speed-up", "of peak"} & set(times_grid(bare).headers)
        assert "teacher ms" in times_grid(bare).headers

    def test_text_and_markdown_have_a_line_a_row(self, rows):
        for grid in (times_grid(rows), parity_grid(rows)):
            assert len(grid.text().splitlines()) == 1 + len(rows)
            lines = grid.markdown().splitlines()
            assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1

    def test_what_is_not_known_is_empty(self):
        unknown = Row("b", "m", RunnerConfiguration("torch", "fp32", 2), Workload(1, 1))
        assert set(times_grid([unknown]).cells[0]) == {"torch fp32", "1", "0", "", "?"}
        assert parity_grid([unknown]).cells[0][-1] == "?"

    def test_equal_images_and_ratios_in_words(self, rows):
        assert parity_grid(rows).cells[2][5] == "equal"
        assert ratio(rows[0]) == "2.00x [1.90, 2.12]"
        assert ratio(rows[1]) == "5.00x"
        assert ratio(row()) == ""

    def test_the_work_and_the_machine(self, rows):
        """A student's step, whichever schedule was timed, and the peaks that were measured."""
        text = work_line([dataclasses.replace(rows[0], workload=Workload(1, 2))], PEAKS)
        assert text == (
            "student 300 GFLOP, decoder 402 GFLOP an image; this machine multiplies at 430 (fp32), ? (int8:"
            " no engine) GFLOP/s with 2 threads"
        )
        teacher = dataclasses.replace(
            rows[0],
            workload=Workload(1, "teacher"),
            flops={"teacher": 5e9, "decoder": 1e9, "total": 6e9},
        )
        assert work_line([teacher], {}) == "teacher 5 GFLOP, decoder 1 GFLOP an image"

    def test_everything_odd_is_said(self, rows):
        assert remarks(rows) == [
            "WRONG: openvino int8, batch 1, steps 1: step 1: tokens differ",
            "failed: published fp32, batch 1, steps 1: the worker was ended by SIGKILL",
            "note: openvino bf16, batch 4, steps 1: 1 of 55 tokens differ",
        ]


class TestSaving:
    """What `--backend auto` goes by: the first precision, one step, the smallest batch, all threads."""

    def test_only_what_is_right_and_comparable_is_saved(self):
        rows = [
            row("onnxruntime", total=20.0, batch=2), row("openvino", total=12.0, batch=2),
            row("openvino", total=30.0, batch=4), row("openvino", "int8", 1.0, batch=2),
            row("torch", total=1.0, batch=2), row("openvino", total=1.0, batch=2, steps=2),
            row("openvino", total=1.0, runner=RunnerConfiguration("openvino", "fp32", 2, processes=2)),
            row(total=1.0, batch=2, runner=RunnerConfiguration("openvino", "fp32", 1)),
            row(total=1.0, batch=2, runner=RunnerConfiguration("tensorrt", "fp32", 2, "cuda:0")),
            row("fast", total=1.0, batch=1, passed=False), row("fast", total=1.0, batch=1, passed=None),
            row("fast", total=1.0, batch=1, error="died"),
        ]  # fmt: skip
        assert times_to_save(rows, "fp32") == {"onnxruntime": 10.0, "openvino": 6.0}
        assert times_to_save(rows, "fp16") == {}


class TestPage:
    def text(self, rows):
        return block(
            rows,
            PEAKS,
            "ddexport bench b --batch 1",
            "2026-01-02 03:04 UTC, A processor, 2 cores; torch 2.13.",
            (50.0, 99.0),
            ["x: not here"],
            "p/plot.png",
        )

    def test_a_reader_finds_the_command_the_machine_and_the_tables(self, rows):
        text = self.text(rows)
        for wanted in (
            "```\nddexport bench b --batch 1\n```", "2026-01-02 03:04 UTC, A processor, 2 cores; torch 2.13.",
            "| openvino bf16 |", "WRONG", "GFLOP",
            "- skipped: x: not here", "![times of the runners](p/plot.png)", "against torch",
        ):  # fmt: skip
            assert wanted in text

    def test_only_the_marked_block_is_replaced(self, rows, tmp_path):
        page = tmp_path / "page.md"
        before, after = "# Title\r\nkept\n\n", "\n\nkept too, without a newline at the end"
        page.write_bytes(f"{before}{START}\nold tables\n{END}{after}".encode())
        check_page(page)
        for _ in range(2):  # the second time changes nothing
            update(page, self.text(rows))
            text = page.read_bytes().decode()
            assert text == f"{before}{START}\n{self.text(rows)}\n{END}{after}"

    def test_blocks_with_names_do_not_touch_each_other(self, tmp_path):
        page = tmp_path / "page.md"
        page.write_text("\n".join([*marks_of(), *marks_of("one"), *marks_of("two"), "end"]))
        update(page, "first", "one")
        update(page, "second", "two")
        update(page, "nameless")
        lines = page.read_text().splitlines()
        assert [lines[i] for i in (1, 4, 7)] == ["nameless", "first", "second"] and lines[-1] == "end"
        with pytest.raises(OutputError, match="bench three"):
            check_page(page, "three")

    @pytest.mark.parametrize(
        "text",
        ["no marks", START, f"{END}\n{START}", f"{START}\n{END}\n{START}\n{END}", f"`{START}` and `{END}`"],
    )
    def test_a_page_without_its_marks_is_refused_and_left_alone(self, text, tmp_path):
        page = tmp_path / "page.md"
        page.write_text(text)
        with pytest.raises(OutputError, match="bench"):
            check_page(page)
        assert page.read_text() == text

    def test_a_page_that_is_not_there(self, tmp_path):
        with pytest.raises(OutputError, match="cannot be read"):
            check_page(tmp_path / "none.md")

    def test_the_plot_is_linked_from_where_the_page_is(self, tmp_path):
        assert (
            address(tmp_path / "docs" / "images" / "p.png", tmp_path / "docs" / "page.md") == "images/p.png"
        )
        assert address(tmp_path / "p.png", tmp_path / "docs" / "page.md") == "../p.png"


class TestPlot:
    def test_it_is_a_thousand_pixels_wide_and_grows_with_the_rows(self, rows, tmp_path):
        write_plot(rows, "a machine", tmp_path / "few.png")
        write_plot(rows * 3, "a machine", tmp_path / "many.png")
        few, many = (Image.open(tmp_path / name).size for name in ("few.png", "many.png"))
        assert few[0] == many[0] == 1000 and many[1] > few[1]

    def test_without_a_timed_row_there_is_nothing_to_plot(self, rows, tmp_path):
        with pytest.raises(DDError, match="no row was timed"):
            write_plot([rows[3]], "a machine", tmp_path / "p.png")
        with pytest.raises(OutputError):
            write_plot(rows, "a machine", tmp_path / "none" / "p.png")
