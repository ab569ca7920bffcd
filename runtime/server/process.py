"""The process of a server: loading, the socket, signals, the log, and how it ends."""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import click
import uvicorn

from ddexport.runtime.errors import BundleError, DDError
from ddexport.runtime.pipeline import load
from ddexport.runtime.server.app import create_app
from ddexport.runtime.server.batcher import Batcher
from ddexport.runtime.server.metrics import Metrics
from ddexport.runtime.server.service import Service

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's, which on SIGTERM first says at /readyz that it will stop, for `grace` seconds, and then
    answers what it has accepted. Ctrl-C skips the wait; a second signal drops what is left."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self.service, self.grace = service, grace
        self.interrupted = False
        self._stop_at = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs between two instructions of the main thread."""
        self.force_exit = self.service.draining
        self.service.draining = True
        self.interrupted = self.interrupted or sig == signal.SIGINT
        at_once = self.force_exit or self.interrupted
        self._stop_at = 0.0 if at_once else time.monotonic() + self.grace

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        return await super().on_tick(counter) or time.monotonic() >= self._stop_at


def serve(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    api_key_file: Path | None,
    max_queue: int,
    max_batch: int | None,
    max_images: int,
    log_json: bool,
    grace: float,
    no_verify: bool = False,
    **how: Any,
) -> None:
    """Serves until a signal ends it. how: backend, device, precision, threads.

    Raises DDError for what cannot be loaded or listened on, BackendError for an engine that fails for good.
    """
    keys = read_keys(api_key_file) if api_key_file else ()
    start_log(log_json)
    metrics, batchers = Metrics(), dict[str, Batcher]()
    listener = listen(host, port)

    def failed(error: DDError) -> None:
        server.should_exit = True

    with ExitStack() as closing:
        closing.callback(listener.close)
        for bundle in bundles:
            pipe = load(bundle, verify=not no_verify, **how)
            name = pipe.manifest.name
            if name in batchers:
                raise BundleError(f"two bundles are called {name}", "Serve each from a server of its own.")
            logger.info("%s: %s", name, pipe.backend.configuration)
            batchers[name] = Batcher(pipe, max_batch, max_queue, metrics, failed)
            closing.callback(batchers[name].close)
        service = Service(batchers, metrics, max_images, keys)
        config = uvicorn.Config(
            create_app(service), loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None,
            access_log=False, proxy_headers=False, server_header=False,
        )  # fmt: skip
        server = Server(config, service, grace)
        shown, port = listener.getsockname()[:2]
        click.echo(f"http://{f'[{shown}]' if ':' in shown else shown}:{port}")
        sys.stdout.flush()
        server.run([listener])
    faults = [batcher.fault for batcher in batchers.values() if batcher.fault is not None]
    if faults:
        raise faults[0]
    if server.interrupted:
        raise click.Abort


def listen(host: str, port: int) -> socket.socket:
    """A socket on which clients may wait from now on. Raises DDError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # asyncio does so for its own sockets only; an answer is two writes, and would take 40 ms more.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        hint = "Give another --port, or 0 for any that is free."
        raise DDError(f"cannot listen on {host}:{port}: {error.strerror or error}", hint) from error


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys in a file, one a line; not blank lines and those that start with #. Raises DDError."""
    try:
        lines = [line.strip() for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise DDError(f"{path}: {error.strerror}", "Give a file with one key a line.") from error
    keys = tuple(line for line in lines if line and not line.startswith(b"#"))
    if not keys:
        raise DDError(f"{path} has no key", "Write one key a line, or leave --api-key-file out.")
    return keys


class _Lines(logging.Formatter):
    """`12:00:00 info: answered status=200`, or JSON, an object a line."""

    def __init__(self, as_json: bool) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S%z")
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        when, level = self.formatTime(record, self.datefmt), record.levelname.lower()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self.as_json:
            traced = {"traceback": trace} if trace else {}
            return json.dumps(
                {"time": when, "level": level, "message": record.getMessage(), **facts, **traced}
            )
        # A path is what a client sent, line breaks included.
        shown = "".join(
            f" {name}={str(value).encode('unicode_escape').decode()}" for name, value in facts.items()
        )
        return f"{when} {level}: {record.getMessage()}{shown}" + (f"\n{trace}" if trace else "")


def start_log(as_json: bool) -> None:
    """Everything that is logged goes to stderr, in the form of a server's log."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines(as_json))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
