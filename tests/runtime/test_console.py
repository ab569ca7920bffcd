"""The contract of every command line: two lines for a user's error, exit codes, quiet where nobody looks."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from ddexport.runtime import console
from ddexport.runtime.errors import DDError, VerificationError

ROOT = Path(__file__).parents[2]


def group_of(body: Callable[[], Any]) -> click.Group:
    @click.group(cls=console.Group)
    def main() -> None: ...

    @main.command()
    @console.debug_option
    def go() -> Any:
        return body()

    return main


def fail(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def test_a_user_error_is_two_lines_and_its_exit_code() -> None:
    result = CliRunner().invoke(group_of(fail(DDError("it is\nbroken", "mend it"))), ["go"])
    assert result.stderr == "error: it is broken\nhint: mend it\n"
    assert result.stdout == ""
    assert result.exit_code == 1


def test_an_error_without_a_hint_is_one_line() -> None:
    assert CliRunner().invoke(group_of(fail(DDError("broken"))), ["go"]).stderr == "error: broken\n"


def test_a_failed_verification_is_exit_code_3() -> None:
    assert CliRunner().invoke(group_of(fail(VerificationError("off"))), ["go"]).exit_code == 3


def test_debug_shows_the_traceback_and_keeps_the_exit_code() -> None:
    result = CliRunner().invoke(group_of(fail(VerificationError("off"))), ["go", "--debug"])
    assert "Traceback" in result.stderr
    assert "error: off" in result.stderr
    assert result.exit_code == 3
    after = CliRunner().invoke(group_of(fail(VerificationError("off"))), ["go"])
    assert "Traceback" not in after.stderr  # the switch is for one run


def test_a_defect_is_not_dressed_up() -> None:
    result = CliRunner().invoke(group_of(fail(ZeroDivisionError("ours"))), ["go"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_interruption_is_130() -> None:
    result = CliRunner().invoke(group_of(fail(KeyboardInterrupt())), ["go"])
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


def test_usage_is_2_and_an_int_is_the_exit_code() -> None:
    assert CliRunner().invoke(group_of(lambda: None), ["gone"]).exit_code == 2
    assert CliRunner().invoke(group_of(lambda: 3), ["go"]).exit_code == 3
    assert CliRunner().invoke(group_of(lambda: None), ["go"]).exit_code == 0
    assert CliRunner().invoke(group_of(lambda: True), ["go"]).exit_code == 0
    assert CliRunner().invoke(group_of(lambda: None), ["go", "--help"]).exit_code == 0


def test_logs_go_to_stderr_and_the_handler_goes_away() -> None:
    before = list(logging.getLogger().handlers)
    result = CliRunner().invoke(
        group_of(lambda: logging.getLogger("ddexport.runtime.x").warning("mind")), ["go"]
    )
    assert result.stderr == "warning: mind\n"
    assert logging.getLogger().handlers == before


SCRIPT = """
import sys, time
import click
from ddexport.runtime import console

@click.command(cls=console.Command)
@click.argument("what")
def main(what):
    if what == "write":
        for number in range(100_000):
            click.echo(f"line {number}")
    with console.stage("working"):
        time.sleep(60)

main()
"""


def start(tmp_path: Path, what: str) -> subprocess.Popen[bytes]:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def test_control_c_ends_cleanly(tmp_path: Path) -> None:
    with start(tmp_path, "wait") as process:
        assert process.stderr
        assert process.stderr.readline() == b"working ...\n"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert b"Traceback" not in rest
    assert b"interrupted" in rest


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    with start(tmp_path, "write") as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"line 0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_draws_on_a_terminal_only_and_only_for_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, wait, drawn in (
        (Terminal(), 0.0, True),
        (Terminal(), 2.0, False),
        (io.StringIO(), 0.0, False),
    ):
        monkeypatch.setattr(console, "BAR_AFTER_SECONDS", wait)
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(console.progress([1, 2, 3, 4], "drawing")) == [1, 2, 3, 4]
        assert ("1/4" in stream.getvalue()) == drawn
        assert stream.getvalue().endswith("\r\x1b[K") == drawn  # the bar is wiped off


def test_progress_as_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "BAR_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress(10, "drawing") as bar:
        bar.advance(5)
    assert "[############............]  5/10" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_stage_says_how_long_and_when_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with console.stage("exporting"):
        pass
    with pytest.raises(ValueError, match="x"), console.stage("checking"):
        raise ValueError("x")
    with console.stage("loading", keep=False):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "exporting ..."
    assert lines[1].startswith("exporting: ")
    assert lines[3].startswith("checking: stopped after ")
    assert len(lines) == 4  # a stage that is not kept leaves nothing where nobody looks


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0012, "1.2 ms"), (0.085, "85 ms"), (4.21, "4.2 s"), (185.2, "3 min 05 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_json_is_strict_whatever_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass
    class Figure:
        psnr: float
        worst: Path

    figures = {
        1: Figure(float("inf"), Path("a/b")),
        "n": np.int64(3),
        "x": np.array([1.5, np.nan]),
        "t": (1,),
    }
    console.emit_json(figures)
    expected = {"1": {"psnr": None, "worst": "a/b"}, "n": 3, "x": [1.5, None], "t": [1]}
    assert json.loads(capsys.readouterr().out) == expected
