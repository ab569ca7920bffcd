"""A bundle in headless Chromium, drawn by the JavaScript runtime: `validate parity --backend browser`."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
BLANK = "parity.html"  # a page of the site without its policy, which forbids what playwright does
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--disable-gpu", "--disable-quic", "--disable-component-update", "--disable-sync")
LOAD = """async ([url, options]) => {
  const { load } = await import(new URL("ddexport.js", location.href).href);
  globalThis.pipe = await load(url, options);
}"""
DRAW = """async ([label, seed, steps, decoder]) => {
  const base64 = (array) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength).toBase64();
  const { drawn: [one] } = await globalThis.pipe([label], { seed: BigInt(seed), steps, decoder });
  const tokens = Int32Array.from(one.steps.flatMap((step) => [...step.tokens]));
  const { noise, uniforms = new Float64Array(), image: { data: pixels } } = one;
  const arrays = { noise, uniforms, pixels, tokens, sequence: one.steps.at(-1).sequence };
  return Object.fromEntries(Object.entries(arrays).map(([name, array]) => [name, base64(array)]));
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
    names = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else PROGRAMS
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        hint = "Install it (Debian: apt-get install chromium), or name the program in CHROMIUM."
        raise BackendError(f"there is no {' or '.join(names)} on this machine", hint)
    return path


@contextmanager
def chromium(*flags: str) -> Iterator[Any]:
    """A started Chromium of the system, as playwright's Browser. Raises BackendError if there is none."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program(), args=[*FLAGS, *flags])
        except Error as error:
            raise BackendError(f"{program()} does not start: {error.message}", "Start it by hand.") from error
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
        """What users get. Raises VerificationError where nothing runs, or the noise differs in a bit."""
        comparison = Comparison()
        for run in runs:
            for decoder in (FULL, *first_decoders(runs, run)):
                rows = []
                for row in range(len(request.labels)):
                    rows.append(self._drawn(run, decoder, request, row))
                    advance(2 * (decoder == FULL))
                got = Drawn(*map(np.stack, zip(*rows, strict=True)))
                comparison.drawn.append(drawn_pair(run, decoder, got, request.places))
        return comparison

    def _drawn(self, run: ReferenceRun, decoder: str, request: Request, row: int) -> tuple[Any, Any, Any]:
        """Tokens int64 (T,), sequence float32 (L, Cv), pixels uint8 (H, W, 3)."""
        words = (int(request.labels[row]), str(request.seeds[row]), steps_of(run), decoder)
        answer = {name: base64.b64decode(text) for name, text in asked(self.page, DRAW, words).items()}
        numbers = request.uniforms[row].tobytes() if run.plan.teacher else b""
        if (answer["noise"], answer["uniforms"]) != (request.noise[row].tobytes(), numbers):
            raise VerificationError(
                f"the browser's noise of seed {request.seeds[row]} is not that of docs/bundle.md",
                "runtime/web/noise.js is wrong, or this browser: please report it",
            )
        tokens = np.frombuffer(answer["tokens"], np.int32).astype(np.int64)
        sequence = np.frombuffer(answer["sequence"], np.float32).reshape(request.noise[row].shape)
        pixels = np.frombuffer(answer["pixels"], np.uint8).reshape(*run.pixels.shape[1:3], 4)
        return tokens, sequence, pixels[..., :3]


@contextmanager
def open_tab(root: Path, precision: str | None, emulate: bool | None, threads: int | None) -> Iterator[Tab]:
    """The bundle on a site of its own, open in a page. Raises DDError where that cannot be."""
    if emulate:
        raise UsageError("--emulate is for engines of this machine", "Leave it out.")
    with ExitStack() as stack:
        browser = stack.enter_context(chromium())
        [part] = parts_of([root], precision)
        site = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "site"
        write_site([part], site)
        (site / BLANK).write_text("<!doctype html><title>parity</title>")
        page = browser.new_page()
        page.goto(stack.enter_context(serving(site)) + BLANK)
        options = {"precision": part.precision, "device": "wasm", "threads": threads}
        asked(page, LOAD, (f"bundles/{part.manifest.name}/", options))
        yield Tab(page, part.precision)


def asked(page: Any, function: str, argument: Sequence[Any]) -> Any:
    """What a function of JavaScript returns in a page. Raises VerificationError."""
    from playwright.sync_api import Error

    try:
        return page.evaluate(function, list(argument))
    except Error as error:
        message = error.message.splitlines()[0].replace("Page.evaluate", "the bundle does not run")
        raise VerificationError(message, "docs/browser.md lists the errors.") from error
