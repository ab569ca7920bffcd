"""`ddexport trt` as a user meets it: exit codes and JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ddexport.commands.trt import command
from ddexport.engine.module import TensorRT


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """`run(...)` gives the exit code, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            command.main([str(argument) for argument in arguments], prog_name="ddexport trt")
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


QUICK = ("--backend", "tensorrt-rtx", "--batch", "1,2,4", "--builder-optimization-level", "0")


@pytest.mark.tensorrt
def test_engines_are_built_and_listed(toy_bundle: Any, run: Any, rtx: TensorRT) -> None:
    folder = toy_bundle()
    code, out, err = run(folder, *QUICK, "--precision", "fp16,bf16", "--json")
    assert code == 0, err
    rows = json.loads(out)["engines"]
    assert [(row["engine"]["role"], row["engine"]["precision"]) for row in rows] == [
        ("student", "fp16"), ("decoder", "fp16"), ("student", "bf16"), ("decoder", "bf16"),
    ]  # fmt: skip
    assert all((folder / row["plan"]).is_file() and row["origin"] == "built" for row in rows)
    code, out, _ = run(folder, *QUICK)
    assert code == 0 and out.count("_fp16.plan") == 2 and "2 in float16, 1 in float32" in out


@pytest.mark.tensorrt
def test_what_cannot_be_built_is_an_error(toy_bundle: Any, run: Any, rtx: TensorRT) -> None:
    """Scripts trust the exit code: other tools ended with 0 and a float32 engine."""
    code, out, err = run(toy_bundle("liar", really={"fp16": "fp32"}), *QUICK)
    assert code == 3 and not out and "error:" in err and "hint:" in err
    assert run(toy_bundle("plain", precisions=("fp32",)), *QUICK)[0] == 1
    code, _, err = run(toy_bundle(), *QUICK, "--compute-capability", "sm90")
    assert code == 1 and "sm90" in err and "hint:" in err and "Traceback" not in err


def test_no_package_is_an_error_with_a_remedy(
    toy_bundle: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TensorRT help works, and a build says what to install."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, _, err = run(toy_bundle())
    assert code == 1 and "ddexport[tensorrt-rtx]" in err
    assert run("--help")[0] == 0
