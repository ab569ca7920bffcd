"""`ddexport trt` and `ddexport cache` as a user meets them: exit codes, two-line errors, JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ddexport.commands.cache import command as cache_command
from ddexport.commands.trt import command as trt_command
from ddexport.engine.module import TensorRT


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDEXPORT_CACHE_DIR", str(tmp_path / "user"))
    return tmp_path / "user" / "engines"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """`run("trt", ...)` gives the exit code, stdout and stderr."""

    def call(name: str, *arguments: str | Path) -> tuple[int, str, str]:
        command = {"trt": trt_command, "cache": cache_command}[name]
        with pytest.raises(SystemExit) as ended:
            command.main([str(argument) for argument in arguments], prog_name=f"ddexport {name}")
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


QUICK = ("--backend", "tensorrt-rtx", "--batch", "1,2,4", "--builder-optimization-level", "0")


@pytest.mark.tensorrt
def test_build_list_and_prune(toy_bundle: Any, run: Any, rtx: TensorRT, own_cache: Path) -> None:
    """Protects the whole way of a user: build, see it, find it in the cache, throw it away."""
    folder = toy_bundle()
    code, out, err = run("trt", folder, *QUICK, "--precision", "fp16,bf16", "--json")
    assert code == 0, err
    rows = json.loads(out)["engines"]
    assert [(row["engine"]["role"], row["engine"]["precision"]) for row in rows] == [
        ("student", "fp16"),
        ("decoder", "fp16"),
        ("student", "bf16"),
        ("decoder", "bf16"),
    ]
    assert all((folder / row["plan"]).is_file() and row["origin"] == "built" for row in rows)
    assert "building student fp16 with tensorrt-rtx" in err and "parsing student_fp16.onnx" in err

    code, out, _ = run("trt", folder, *QUICK)
    assert code == 0 and out.count("was there already") == 2 and "2 in float16, 1 in float32" in out

    code, out, _ = run("cache", "ls", "--json")
    listed = json.loads(out)
    assert code == 0 and listed["directory"] == str(own_cache) and len(listed["entries"]) == 4
    assert listed["bytes"] == sum(entry["bytes"] for entry in listed["entries"])
    code, out, _ = run("cache", "ls")
    assert code == 0 and "toy student fp16, tensorrt-rtx" in out and "4 engines" in out

    code, out, _ = run("cache", "prune", "--keep", "1", "--dry-run")
    assert code == 0 and "3 engines would be removed" in out
    code, out, _ = run("cache", "prune", "--max-size", "1GB", "--older-than", "1d", "--json")
    assert code == 0 and json.loads(out)["removed"] == []
    code, out, _ = run("cache", "prune", "--all")
    assert code == 0 and "4 engines removed" in out
    assert json.loads(run("cache", "ls", "--json")[1])["entries"] == []
    assert all((folder / row["plan"]).is_file() for row in rows)  # those of the bundle are its own


@pytest.mark.tensorrt
def test_a_lie_about_the_precision_ends_with_3(toy_bundle: Any, run: Any, rtx: TensorRT) -> None:
    """Protects scripts that trust the exit code: other tools ended with 0 and a float32 engine."""
    code, out, err = run("trt", toy_bundle(really={"fp16": "fp32"}), *QUICK)
    assert code == 3 and not out and "error: fp16 was asked for" in err and "hint:" in err


@pytest.mark.tensorrt
def test_without_fp16_the_export_is_named(toy_bundle: Any, run: Any, rtx: TensorRT) -> None:
    """Protects the default: never another precision in silence."""
    code, _, err = run("trt", toy_bundle(precisions=("fp32",)), *QUICK)
    assert code == 1 and "ddexport onnx --model toy --precision fp32,fp16" in err


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--version-compatible",), "lean runtime"),
        (("--hardware-compatibility-level", "ampere+"), "would ignore it"),
        (("--timing-cache", "x"), "no timing cache"),
        (("--compute-capability", "sm90"), "cannot build for sm90"),
    ],
)
def test_what_rtx_cannot_do_is_refused(
    toy_bundle: Any, run: Any, rtx: TensorRT, arguments: tuple[str, ...], said: str
) -> None:
    """Protects against an engine that is not what was asked for."""
    folder = toy_bundle()
    code, _, err = run("trt", folder, *QUICK, *arguments)
    assert code == 1 and said in err and "Traceback" not in err
    assert not (folder / "engines").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch", "8,4,1"),
        ("--batch", "x"),
        ("--precision", "fp8"),
        ("--precision", "fp16,fp16"),
        ("--precision", ""),
        ("--workspace", "much"),
        ("--workspace", ""),
        ("--compute-capability", "ada"),
        ("--compute-capability", ""),
        ("--builder-optimization-level", "6"),
        ("--hardware-compatibility-level", "hopper"),
        ("--backend", "onnx"),
    ],
)
def test_slips_are_usage_errors(tmp_path: Path, run: Any, arguments: tuple[str, ...]) -> None:
    """Protects exit code 2, and that nothing is imported or built for it."""
    code, _, err = run("trt", tmp_path, *arguments)
    assert code == 2 and arguments[0] in err


@pytest.mark.parametrize(
    "arguments", [("--older-than", "30"), ("--max-size", "big"), ("--keep", "-1"), ("--keep", "x")]
)
def test_slips_in_prune_are_usage_errors(run: Any, arguments: tuple[str, str]) -> None:
    """Protects the cache from a limit that was misread."""
    code, _, err = run("cache", "prune", *arguments)
    assert code == 2 and arguments[0] in err


def test_no_package_is_an_error_with_a_way_out(
    toy_bundle: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects users without TensorRT: help and lists work, a build says what to install."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, _, err = run("trt", toy_bundle())
    assert code == 1 and "no TensorRT package can build here" in err and "ddexport[tensorrt-rtx]" in err
    code, _, err = run("trt", toy_bundle("two"), "--backend", "tensorrt-rtx")
    assert code == 1 and "tensorrt_rtx is not installed" in err
    assert run("trt", "--help")[0] == 0
    assert run("cache", "ls")[0] == 0


def test_an_empty_cache_is_no_error(run: Any, own_cache: Path) -> None:
    """Protects the first use; looking makes no folders."""
    code, out, _ = run("cache", "ls")
    assert code == 0 and "0 engines" in out
    code, out, _ = run("cache", "prune", "--all")
    assert code == 0 and "0 engines removed" in out
    assert not own_cache.exists()
