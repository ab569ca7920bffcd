"""Servers in processes of their own, whose engine a test holds, slows or breaks by files in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[3]
SECONDS = 60  # a busy machine is no fault of the code
PROGRAM = """
import sys, time
from pathlib import Path
from ddexport.runtime.backends.onnxruntime import OnnxRuntime

switches, run = Path(sys.argv.pop(1)), OnnxRuntime._run

def switched(self, session, feeds, names):
    while (switches / "hold").exists():
        (switches / "held").touch()
        time.sleep(0.005)
    if (switches / "broken").exists():
        raise RuntimeError("CUDA error 700 in /secret/engine.cc")
    if (switches / "poison").exists() and 1 in feeds.get("label", ()):
        raise ValueError("a defect that label 1 meets, in /secret/file.py")
    return run(self, session, feeds, names)

OnnxRuntime._run = switched
from ddexport.runtime.server import app
encoded = app.encoded

def defective(images, kind):
    if (switches / "defect").exists():
        raise KeyError("/secret/app.py")
    return encoded(images, kind)

app.encoded = defective
from ddexport.runtime.server.command import command
command()
"""
PATH = "/v1/images/generations"


class Server:
    """A running server. pid: of its process, which the test may signal."""

    def __init__(self, process: subprocess.Popen[str], switches: Path, url: str) -> None:
        self.process, self.switches, self.url = process, switches, url
        self.http = httpx.Client(
            base_url=url, timeout=SECONDS, limits=httpx.Limits(max_connections=100), trust_env=False
        )

    def draw(self, prompt: str = "zero", **parameters: Any) -> httpx.Response:
        return self.http.post(PATH, json={"prompt": prompt, **parameters})

    def switch(self, name: str, on: bool = True) -> None:
        path = self.switches / name
        path.touch() if on else path.unlink()

    def hold(self, draw_in: ThreadPoolExecutor, **parameters: Any) -> Any:
        """Sends a request at which the engine stops, and returns its future when it has."""
        (self.switches / "held").unlink(missing_ok=True)
        self.switch("hold")
        held = draw_in.submit(self.draw, **parameters)
        until(lambda: (self.switches / "held").exists() and self.figure("ddexport_queue_images") == 0)
        return held

    def figure(self, name: str) -> float:
        """The sum of a figure over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def wait(self) -> int:
        """The exit code, once it ends."""
        return self.process.wait(SECONDS)

    @property
    def log(self) -> str:
        return (self.switches / "log").read_text()


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextmanager
def serving(folder: Path, *arguments: object) -> Iterator[Server]:
    """`ddexport serve ARGUMENTS` on a free port, killed at the end if it still runs."""
    switches = folder / "switches"
    switches.mkdir()
    words = [sys.executable, "-c", PROGRAM, str(switches), "--port", "0", *map(str, arguments)]
    with (switches / "log").open("w") as log:
        process = subprocess.Popen(
            words, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url, (switches / "log").read_text()
        server = Server(process, switches, url)
        with server.http:
            yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(SECONDS)
        process.stdout.close()
