"""Times bundles in headless Chromium: `python docs/browser_times.py BUNDLE:PRECISION:DECODER...` prints JSON.

Each runs in a browser of its own, in WebAssembly on one thread. A row has the medians of three images in one
step, and the largest resident set of a process of the browser, which is that of the page.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ddexport.site import parts_of, write_site
from ddexport.validate.browser import BLANK, chromium, serving

IMAGES = 3
TIME = """async ([url, options, decoder, n]) => {
  const { load } = await import(location.href);
  const began = performance.now();
  const pipe = await load(url, { ...options, decoder, device: "wasm", threads: 1 });
  const loaded = (performance.now() - began) / 1000;
  const { drawn } = await pipe([pipe.labels.length - 1], { steps: 1, n, decoder });
  const median = (part) => drawn.map(({ seconds }) => seconds[part]).sort((a, b) => a - b)[Math.floor(n / 2)];
  return { loaded, student_seconds: median("student"), decoder_seconds: median("decoder") };
}"""


def peak_mib() -> float:
    """The largest resident set that a running process of Chromium has had."""
    peaks = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            facts = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue  # it has ended
        if facts["Name"].strip().startswith("chrom"):
            peaks.append(int(facts.get("VmHWM", "0 kB").split()[0]))
    return max(peaks) / 1024


def timed(bundle: Path, precision: str, decoder: str) -> dict[str, Any]:
    """A row of the table."""
    [part] = parts_of([bundle], precision)
    graphs = [part.manifest.graph("student", precision), part.manifest.decoder(decoder, precision)]
    size = sum(info.bytes for graph in graphs for info in graph.files)
    row = {"model": part.manifest.name, "precision": precision, "decoder": decoder, "mib": size / 2**20}
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        write_site([part], Path(folder))
        with serving(Path(folder)) as address:
            page = browser.new_page()
            page.set_default_timeout(0)
            page.goto(address + BLANK)
            words = [f"bundles/{part.manifest.name}/", {"precision": precision}, decoder, IMAGES]
            return row | page.evaluate(TIME, words) | {"peak_mib": peak_mib()}


if __name__ == "__main__":
    asked_for = [words.split(":") for words in sys.argv[1:]]
    rows = [timed(Path(path), precision, decoder) for path, precision, decoder in asked_for]
    sys.stdout.write(json.dumps({"rows": rows}))
