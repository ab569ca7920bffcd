"""What services, containers and other people's shells are like: nothing of the user's is lost in them."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

ROOT = str(Path(__file__).parents[2])
SAMPLE = (sys.executable, "-m", "ddexport.runtime.infer")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes devices and mounts: needs root")


def sample(*arguments: object, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own; `shell` goes behind the command, as in `>&-`."""
    words = [*SAMPLE, *map(str, arguments)]
    command = ["bash", "-c", f'"$@" {shell}', "bash", *words]
    return subprocess.run(
        command, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": ROOT, **environment}
    )


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
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    assert sample(shared_bundle, "-o", link, "--dump", fifo).returncode == 0
    reader.join()
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert link.is_symlink()
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "copy.npz").write_bytes(got[0])
    assert "images" in np.load(tmp_path / "copy.npz")
    piped = tmp_path / "piped"
    done = sample(shared_bundle, "-o", tmp_path / "x.png", "--dump", "/dev/stdout", shell=f"| cat > {piped}")
    assert done.returncode == 0 and piped.read_bytes()[:2] == b"PK"


@as_root
def test_a_device_is_written_into(shared_bundle: Path, tmp_path: Path) -> None:
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_bytes(b"")
    except OSError:
        pytest.skip("this container may not make devices")
    assert sample(shared_bundle, "-o", tmp_path / "x.png", "--dump", null).returncode == 0
    assert stat.S_ISCHR(null.stat().st_mode)


@as_root
def test_a_mounted_file_is_written_into(shared_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    (tmp_path / "volume").touch()
    script = f"mount --bind volume x.png && {' '.join(SAMPLE)} {shared_bundle} -o x.png"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], cwd=tmp_path, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": ROOT},
    )  # fmt: skip
    if b"unshare" in done.stderr or b"mount" in done.stderr:
        pytest.skip("this container may not mount")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "volume").read_bytes().startswith(b"\x89PNG")


def test_a_name_may_be_long_and_not_utf8(shared_bundle: Path, tmp_path: Path) -> None:
    output = os.fsencode(tmp_path) + b"/" + b"a" * 230 + b"\xff.png"
    done = sample(shared_bundle, "-o", os.fsdecode(output), "--json", LC_ALL="C", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["output"]) == output
    assert Path(os.fsdecode(output)).is_file()
    assert "too long" in in_two_lines(sample(shared_bundle, "-o", tmp_path / ("a" * 300 + ".png")))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_bundle_may_lie_in_a_directory_that_is_not_utf8(
    shared_bundle: Path, tmp_path: Path, backend: str
) -> None:
    bundle = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shutil.copytree(shared_bundle, bundle)
    done = sample(bundle, "--backend", backend, "-o", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("shell", "code"), [("> /dev/full", 1), (">&-", 0), ("<&- >&- 2>&-", 0)])
def test_standard_streams_may_be_full_or_closed(
    shared_bundle: Path, tmp_path: Path, shell: str, code: int
) -> None:
    done = sample(shared_bundle, "-o", tmp_path / "x.png", shell=shell)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "x.png").is_file()
    if code:
        assert "No space left" in in_two_lines(done)


def test_a_file_may_be_limited(shared_bundle: Path, tmp_path: Path) -> None:
    words = " ".join([*SAMPLE, str(shared_bundle), "-o", str(tmp_path / "x.png")])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 0; {words}"], capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": ROOT},
    )  # fmt: skip
    assert "x.png cannot be written: File too large" in in_two_lines(done)
    assert list(tmp_path.iterdir()) == []


def test_too_many_images_are_refused_before_they_are_drawn(shared_bundle: Path, tmp_path: Path) -> None:
    done = sample(shared_bundle, "-n", 10**9, "-o", tmp_path / "x.png")
    assert "too many for one picture" in in_two_lines(done)


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
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert done.stdout.split() == [b"1", b"openvino.tools.ovc.telemetry_stub"]
