"""The runtime in processes of its own: in services, containers and other people's shells, where nothing of
the user's is lost. `.ci/wheel` runs it without the build time."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = str(Path(__file__).parents[2])
SCRIPT = Path(ROOT) / "runtime" / "infer.py"
SAMPLE = (sys.executable, "-m", "ddexport.runtime.infer")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes devices and mounts: needs root")


def run(*words: object, environment: Any = (), **options: Any) -> subprocess.CompletedProcess[bytes]:
    given = {**os.environ, "PYTHONPATH": ROOT, **dict(environment)}
    return subprocess.run([*map(str, words)], capture_output=True, check=False, env=given, **options)


def sample(*arguments: object, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own; `shell` goes behind the command, as in `>&-`."""
    return run("bash", "-c", f'"$@" {shell}', "bash", *SAMPLE, *arguments, environment=environment)


def in_two_lines(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, len(lines)) == (1, 2), done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_fifo_and_a_link_stay_what_they_are(shared_bundle: Path, tmp_path: Path) -> None:
    got: list[bytes] = []
    fifo, link = tmp_path / "fifo.npz", tmp_path / "link.png"
    os.mkfifo(fifo)
    link.symlink_to("real.png")
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()), daemon=True)
    reader.start()
    assert sample(shared_bundle, "-o", link, "--dump", fifo).returncode == 0
    reader.join(timeout=60)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert link.is_symlink()
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "copy.npz").write_bytes(got[0])
    assert "images" in np.load(tmp_path / "copy.npz")
    piped = tmp_path / "piped"
    done = sample(shared_bundle, "-o", tmp_path / "x.png", "--dump", "/dev/stdout", shell=f"| cat > {piped}")
    assert done.returncode == 0 and piped.read_bytes()[:2] == b"PK"


@as_root
def test_devices_and_mounted_files_are_written_into(shared_bundle: Path, tmp_path: Path) -> None:
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_bytes(b"")
    except OSError:
        pytest.skip("this container may not make devices")
    for name in ("x.png", "volume"):
        (tmp_path / name).touch()
    script = f"mount --bind volume x.png && {' '.join(SAMPLE)} {shared_bundle} -o x.png --dump null"
    done = run("unshare", "-m", "bash", "-c", script, cwd=tmp_path)
    if b"unshare" in done.stderr or b"mount" in done.stderr:
        pytest.skip("this container may not mount")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "volume").read_bytes().startswith(b"\x89PNG")
    assert stat.S_ISCHR(null.stat().st_mode)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_names_may_be_long_and_not_utf8(shared_bundle: Path, tmp_path: Path, backend: str) -> None:
    """Of the bundle's directory and of the output."""
    bundle = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shutil.copytree(shared_bundle, bundle)
    output = os.fsencode(tmp_path) + b"/" + b"a" * 230 + b"\xff.png"
    words = (bundle, "--backend", backend, "-o", os.fsdecode(output), "--json")
    done = sample(*words, LC_ALL="C", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["output"]) == output
    assert Path(os.fsdecode(output)).is_file()
    assert "too long" in in_two_lines(sample(bundle, "-o", tmp_path / ("a" * 300 + ".png")))


@pytest.mark.parametrize(("shell", "code"), [("> /dev/full", 1), (">&-", 0), ("<&- >&- 2>&-", 0)])
def test_standard_streams_may_be_full_or_closed(
    shared_bundle: Path, tmp_path: Path, shell: str, code: int
) -> None:
    done = sample(shared_bundle, "-o", tmp_path / "x.png", shell=shell)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "x.png").is_file()
    if code:
        assert "No space left" in in_two_lines(done)


def test_engines_do_not_report(shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime and OpenVINO write identifiers under HOME unless they are told not to."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)  # which importing ddexport has set here
    home = tmp_path / "home"
    home.mkdir()
    for backend in ("onnxruntime", "openvino"):
        done = sample(shared_bundle, "--backend", backend, "-o", tmp_path / "x.png", HOME=str(home))
        assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []
    script = "import os, ddexport.runtime.backends.openvino, openvino.tools.ovc.telemetry_utils as used;"
    script += "print(os.environ['ORT_DISABLE_TELEMETRY'], used.tm.__name__)"
    done = run(sys.executable, "-c", script)
    assert done.stdout.split() == [b"1", b"openvino.tools.ovc.telemetry_stub"]


def test_no_entrance_brings_an_error_class_in_twice(tmp_path: Path) -> None:
    """Else an error that is raised under one name would not be caught under the other."""
    for words in (("runtime/infer.py", "nowhere"), ("-m", "validate", "parity", "nowhere")):
        done = run(sys.executable, *words, cwd=ROOT)
        assert "nowhere" in in_two_lines(done)


def test_the_script_runs_from_anywhere(shared_bundle: Path, tmp_path: Path) -> None:
    """A file of the working directory or of the script's own must not pass for another module."""
    for name in ("ddexport.py", "runtime.py", "labels.py", "click.py"):
        (tmp_path / name).write_text("raise RuntimeError('wrong module')")
    nowhere = {"PYTHONPATH": ""}
    done = run(sys.executable, SCRIPT, shared_bundle, "--label", "one", cwd=tmp_path, environment=nowhere)
    assert done.returncode == 0 and (tmp_path / "out.png").is_file(), done.stderr
    code = f"""
import runpy, sys
sys.argv, sys.path[0] = ['infer.py', '-h'], {str(SCRIPT.parent)!r}
try:
    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')
except SystemExit:
    assert {str(SCRIPT.parent)!r} not in sys.path and {ROOT!r} == sys.path[0], sys.path
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path, environment=nowhere).returncode == 0
