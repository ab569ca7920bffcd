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
from click.testing import CliRunner, Result

from ddexport.runtime import console
from ddexport.runtime.errors import DDError, VerificationError

ROOT = Path(__file__).parents[2]


def run(body: Callable[[], Any] | BaseException, *words: str) -> Result:
    """A command that does or raises something, in a group."""

    @click.group(cls=console.Group)
    def main() -> None: ...

    @main.command()
    @console.debug_option
    def go() -> Any:
        if isinstance(body, BaseException):
            raise body
        return body()

    return CliRunner().invoke(main, words or ["go"])


def test_errors_and_exit_codes() -> None:
    """A user's error is two lines, with a traceback for one run of --debug. A defect is not dressed up; usage
    is 2; an int is the exit code; interruption is 130. Logs go to stderr, and the handler goes away."""
    result = run(DDError("it is\nbroken", "mend it"))
    assert result.stderr == "error: it is broken\nhint: mend it\n"
    assert (result.stdout, result.exit_code) == ("", 1)
    assert run(DDError("broken")).stderr == "error: broken\n"
    result = run(VerificationError("off"), "go", "--debug")
    assert "Traceback" in result.stderr and "error: off" in result.stderr and result.exit_code == 3
    result = run(VerificationError("off"))
    assert "Traceback" not in result.stderr and result.exit_code == 3
    assert isinstance(run(ZeroDivisionError("ours")).exception, ZeroDivisionError)
    assert run(lambda: None, "gone").exit_code == 2
    assert [run(lambda value=value: value).exit_code for value in (3, None, True)] == [3, 0, 0]
    assert run(lambda: None, "go", "--help").exit_code == 0
    assert run(KeyboardInterrupt()).exit_code == 130
    before = list(logging.getLogger().handlers)
    assert run(lambda: logging.getLogger("ddexport.runtime.x").warning("mind")).stderr == "warning: mind\n"
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


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_control_c_and_a_reader_that_leaves(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    for what, code in (("wait", 130), ("write", 141)):
        with subprocess.Popen([sys.executable, tmp_path / "script.py", what], **pipes) as process:
            assert process.stdout and process.stderr
            if what == "wait":
                assert process.stderr.readline() == b"working ...\n"
                process.send_signal(signal.SIGINT)
            else:
                assert process.stdout.readline() == b"line 0\n"
                process.stdout.close()
            rest = process.stderr.read()
        assert process.returncode == code
        assert b"Traceback" not in rest and (b"interrupted" in rest) == (what == "wait")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_draws_on_a_terminal_only_and_only_for_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (Terminal(), 0.0, True), (Terminal(), 2.0, False), (io.StringIO(), 0.0, False)
    for stream, wait, drawn in rows:
        monkeypatch.setattr(console, "BAR_AFTER_SECONDS", wait)
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(console.progress([1, 2, 3, 4], "drawing")) == [1, 2, 3, 4]
        assert ("1/4" in stream.getvalue()) == drawn
        assert stream.getvalue().endswith("\r\x1b[K") == drawn  # the bar is wiped off
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress(10, "drawing") as bar:
        bar.advance(5)
    assert "[############............]  5/10" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A stage says how long it took, also when it fails, or nothing where nobody looks; JSON is strict."""
    with console.stage("exporting"):
        pass
    with pytest.raises(ValueError, match="x"), console.stage("checking"):
        raise ValueError("x")
    with console.stage("loading", keep=False):
        pass
    lines = capsys.readouterr().err.splitlines()
    starts = ("exporting ...", "exporting: ", "checking ...", "checking: stopped after ")
    assert len(lines) == 4 and all(map(str.startswith, lines, starts))
    rows = {0.0012: "1.2 ms", 0.085: "85 ms", 4.21: "4.2 s", 185.2: "3 min 05 s"}
    assert {seconds: console.duration(seconds) for seconds in rows} == rows

    @dataclasses.dataclass
    class Figure:
        psnr: float
        worst: Path

    figures = {1: Figure(float("inf"), Path("a")), "n": np.int64(3), "x": np.array([1.5, np.nan]), "t": (1,)}
    console.emit_json(figures)
    expected = {"1": {"psnr": None, "worst": "a"}, "n": 3, "x": [1.5, None], "t": [1]}
    assert json.loads(capsys.readouterr().out) == expected
