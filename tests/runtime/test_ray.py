"""`ddexport sample --ray`, and examples/ray_serve.py: needs Ray (make test-all)."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddexport import runtime
from tests.runtime.test_shards import INFER, drawn, members, wait_for

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COUNT, SIZE = 6000, 1500
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def whole(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the same set from a process of this machine."""
    return drawn(shared_bundle, tmp_path_factory.mktemp("whole"), "--count", COUNT, "--workers", 1)


def start(bundle: Path, folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, INFER, bundle, "--shards", folder, "--count", COUNT, "--shard-size", SIZE]
    how = ("--ray", "local", "--json")
    return subprocess.Popen([*map(str, words), *how], stdout=subprocess.PIPE, text=True)


def actors() -> list[int]:
    """The processes of Ray that draw."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cmdline").read_bytes().startswith(b"ray::Worker"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def partial(folder: Path) -> list[Path]:
    return list(folder.glob(".ddexport-*.part"))


def test_an_actor_that_is_killed(shared_bundle: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    """Ray starts another one: every image once, the same bytes."""
    folder = tmp_path / "set"
    with start(shared_bundle, folder) as process:
        wait_for(lambda: partial(folder))
        os.kill(actors()[0], signal.SIGKILL)
        report = json.loads(process.communicate()[0])
    assert process.returncode == 0
    assert report["sha256"] == whole["sha256"]
    assert len(members(folder)) == 2 * COUNT
    assert not partial(folder)


def test_a_command_that_is_killed(shared_bundle: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    """The same command draws what is missing, and leaves what is there."""
    folder = tmp_path / "set"
    with start(shared_bundle, folder) as process:
        wait_for(lambda: list(folder.glob("*.tar")) and partial(folder))
        process.kill()
    wait_for(lambda: not actors())
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert 0 < len(kept) < COUNT // SIZE
    with start(shared_bundle, folder) as process:
        report = json.loads(process.communicate()[0])
    assert report["drawn"] == COUNT - SIZE * len(kept)
    assert report["sha256"] == whole["sha256"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not partial(folder)


def test_clusters_without_room(shared_bundle: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    """Workers that have no place are not waited for; nor are machines that no cluster has."""
    words = [sys.executable, INFER, shared_bundle, "--count", COUNT, "--ray", "local", "--json"]
    command = [*map(str, words), "--shards", str(tmp_path / "set")]
    done = subprocess.run([*command, "--workers", "64"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["sha256"] == whole["sha256"]
    done = subprocess.run([*command, "--threads", "4096"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: no machine of the cluster has 4096 CPU for a worker" in done.stderr


def test_actors_that_die_all_the_time(shared_bundle: Path, tmp_path: Path) -> None:
    """They end the command."""
    with start(shared_bundle, tmp_path / "set") as process:
        while process.poll() is None:
            for number in actors() if partial(tmp_path / "set") else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.05)
    assert process.returncode == 1


def test_no_cluster(shared_bundle: Path, tmp_path: Path) -> None:
    words = [sys.executable, INFER, shared_bundle, "--shards", tmp_path / "set", "--count", 4]
    command = [*map(str, words), "--ray", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2].startswith("error: no Ray cluster at 127.0.0.1:1")


@pytest.fixture
def served(shared_bundle: Path) -> Iterator[str]:
    """The address of the application of the example."""
    command = [
        str(Path(sys.executable).parent / "serve"),
        "run",
        "ray_serve:images",
        f"bundle={shared_bundle}",
    ]
    how: dict[str, Any] = {"cwd": ROOT / "examples", "env": {**os.environ, **QUIET}}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how) as process:
        address = "http://127.0.0.1:8000"
        for _ in range(60):
            time.sleep(1)
            try:
                urllib.request.urlopen(f"{address}/readyz")
                break
            except OSError:
                continue
        yield address
        process.send_signal(signal.SIGINT)


def test_the_server_on_ray(served: str, shared_bundle: Path) -> None:
    """What it answers is what the pipeline draws."""
    body = json.dumps({"prompt": "two", "n": 3, "seed": 4}).encode()
    headers = {"content-type": "application/json"}
    asked = urllib.request.Request(f"{served}/v1/images/generations", body, headers)
    with urllib.request.urlopen(asked) as answer:
        data = json.load(answer)["data"]
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in data]
    with runtime.load(shared_bundle) as pipe:
        assert np.array_equal(shown, pipe("two", num_images=3, seed=4, output="numpy").images)
