"""A bundle in headless Chromium, drawn by the JavaScript runtime: `validate parity --backend browser`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from ddexport.runtime.bundle import FULL
from ddexport.runtime.errors import BackendError, UsageError, VerificationError
from ddexport.site import PACKAGE, VERSION, parts_of, write_site
from ddexport.validate.compare import drawn_pair, first_decoders, steps_of
from ddexport.validate.metrics._base import Comparison, Drawn

if TYPE_CHECKING:
    from ddexport.validate.reference import ReferenceRun, Request

BROWSER = "browser"
BLANK = "ddexport.js"  # an address of the site without its policy, which forbids what playwright does
LOAD = """async ([url, options]) => {
  const { load } = await import(location.href);
  globalThis.pipe = await load(url, options);
}"""
DRAW = """async ([label, seed, steps, decoder]) => {
  const { drawn: [record] } = await globalThis.pipe([label], { seed: BigInt(seed), steps, decoder });
  const { noise, uniforms = [], image } = record;
  const tokens = record.steps.flatMap((step) => [...step.tokens]);
  return { noise, uniforms, tokens, sequence: record.steps.at(-1).sequence, pixels: image.data };
}"""


class Handler(SimpleHTTPRequestHandler):
    """Files, with the headers by which a page may have threads."""

    def end_headers(self) -> None:
        self.send_header("cross-origin-opener-policy", "same-origin")
        self.send_header("cross-origin-embedder-policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the command's."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address at which this process serves a folder to this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def program() -> str:
    """The Chromium of the system. Raises BackendError if there is none."""
    name = os.environ.get("CHROMIUM") or "chromium"
    if path := shutil.which(name):
        return path
    hint = "Install it (Debian: apt-get install chromium), or name the program in CHROMIUM."
    raise BackendError(f"there is no {name} on this machine", hint)


@contextmanager
def chromium() -> Iterator[Any]:
    """A started Chromium of the system, as playwright's Browser. Raises BackendError if there is none."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program(), args=["--disable-gpu"])
        except Error as error:
            raise BackendError(
                f"{program()} does not start: {error.message.splitlines()[0]}", "Start it by hand."
            ) from error
        with browser:
            yield browser


class Tab:
    """A bundle that the JavaScript runtime has open in a page. versions: of what runs it there."""

    def __init__(self, page: Any, precision: str) -> None:
        self.page, self.precision = page, precision
        self.versions = {"chromium": page.context.browser.version, PACKAGE: VERSION}

    def compare(
        self, runs: list[ReferenceRun], request: Request, advance: Callable[[int], None]
    ) -> Comparison:
        """What users get. Raises VerificationError where the noise differs in a bit."""
        comparison = Comparison()
        for run in runs:
            for decoder in (FULL, *first_decoders(runs, run)):
                rows = [self._drawn(run, decoder, request, row) for row in range(len(request.labels))]
                got = Drawn(*map(np.stack, zip(*rows, strict=True)))
                comparison.drawn.append(drawn_pair(run, decoder, got, request.places))
            advance(2 * len(request.labels))
        return comparison

    def _drawn(self, run: ReferenceRun, decoder: str, request: Request, row: int) -> tuple[Any, Any, Any]:
        """Tokens int64 (T,), sequence float32 (L, Cv), pixels uint8 (H, W, 3)."""
        seed, noise = request.seeds[row], request.noise[row]
        words = [int(request.labels[row]), str(seed), steps_of(run), decoder]
        answer = self.page.evaluate(DRAW, words)  # typed arrays arrive as lists
        uniforms = request.uniforms[row].tobytes() if run.plan.teacher else b""
        same = np.array(answer["noise"], np.float32).tobytes() == noise.tobytes()
        if not same or np.array(answer["uniforms"], np.float64).tobytes() != uniforms:
            raise VerificationError(
                f"the browser's noise of seed {seed} is not that of docs/bundle.md",
                "runtime/web/noise.js is wrong, or this browser: please report it",
            )
        sequence = np.array(answer["sequence"], np.float32).reshape(noise.shape)
        pixels = np.array(answer["pixels"], np.uint8).reshape(*run.pixels.shape[1:3], 4)
        tokens = np.array(answer["tokens"], np.int64)
        if tokens.size != run.drawn.tokens.shape[1]:
            fault = f"{run.title}: the browser drew {tokens.size} tokens, not {run.drawn.tokens.shape[1]}"
            raise VerificationError(fault, "runtime/web/ does not follow the schedule.")
        return tokens, sequence, pixels[..., :3]


@contextmanager
def open_tab(root: Path, precision: str | None, emulate: bool | None, threads: int | None) -> Iterator[Tab]:
    """The bundle on a site of its own, open in a page. Raises DDError where that cannot be, or ends so."""
    from playwright.sync_api import Error

    if emulate:
        raise UsageError("--emulate is for engines of this machine", "Leave it out.")
    [part] = parts_of([root], precision)
    options = {"precision": part.precision, "device": "wasm", "threads": threads}
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        write_site([part], Path(folder))
        with serving(Path(folder)) as address:
            page = browser.new_page()
            page.goto(address + BLANK)
            try:
                page.evaluate(LOAD, [f"bundles/{part.manifest.name}/", options])
                yield Tab(page, part.precision)
            except Error as error:
                message = error.message.splitlines()[0].replace("Page.evaluate", "the bundle does not run")
                raise VerificationError(message, "docs/browser.md lists the errors.") from error
