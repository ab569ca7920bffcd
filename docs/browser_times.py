"""Times bundles in headless Chromium, and prints figures as JSON: `python docs/browser_times.py BUNDLE:PRECISION:DECODER...`.

Each runs in a browser of its own, in WebAssembly on one thread: the median of three images in one step, and the
largest resident set of a process of the browser, which is that of the page's.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ddexport.site import parts_of, write_site
from ddexport.validate.browser import BLANK, asked, chromium, serving

IMAGES = 3
TIME = """async ([url, options, decoder, n]) => {
  const { load } = await import(new URL("ddexport.js", location.href).href);
  const began = performance.now();
  const pipe = await load(url, { ...options, decoder, device: "wasm", threads: 1 });
  const loaded = (performance.now() - began) / 1000;
  const { drawn } = await pipe([pipe.labels.length - 1], { steps: 1, n, decoder });
  return { loaded, student: drawn.map((one) => one.seconds.student), decoder: drawn.map((one) => one.seconds.decoder) };
}"""


def peak_mib() -> float:
    """The largest resident set that a process of Chromium has had."""
    peaks = [0]
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
    row = {"model": part.manifest.name, "precision": precision, "decoder": decoder}
    row["mib"] = sum(info.bytes for graph in graphs for info in graph.files) / 2**20
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        site = Path(folder) / "site"
        write_site([part], site)
        (site / BLANK).write_text("<!doctype html>")
        with serving(site) as address:
            page = browser.new_page()
            page.set_default_timeout(0)
            page.goto(address + BLANK)
            try:
                options = {"precision": precision}
                url = f"bundles/{part.manifest.name}/"
                got = asked(page, TIME, (url, options, decoder, IMAGES))
            except Exception as error:
                return row | {"fault": str(error), "peak_mib": peak_mib()}
        seconds = {name: statistics.median(got[name]) for name in ("student", "decoder")}
        return row | seconds | {"loaded": got["loaded"], "peak_mib": peak_mib(), "total": sum(seconds.values())}


if __name__ == "__main__":
    rows = []
    for words in sys.argv[1:]:
        path, precision, decoder = words.split(":")
        rows.append(timed(Path(path), precision, decoder))
        print(rows[-1], file=sys.stderr)
    print(json.dumps({"rows": rows}))
