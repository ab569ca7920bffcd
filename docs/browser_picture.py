"""Makes the picture in the README: `python docs/browser_picture.py SITE PNG`, of a site of digits-var."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ddexport.validate.browser import chromium, serving

REQUEST = "#model=digits-var&label=3&label=7&steps=1&steps=2&steps=teacher&seed=3&n=8"


def picture(site: Path, target: Path) -> None:
    """After a second drawing, because the first one warms the graphs up."""
    with chromium() as browser, serving(site) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(address + REQUEST)
        for _ in range(2):
            page.get_by_text(re.compile(r"48 images in \d")).wait_for()
            page.click("#draw")
        page.get_by_text(re.compile(r"48 images in \d")).wait_for()
        page.mouse.move(5, 5)
        page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
        page.wait_for_timeout(1000)  # until the images have faded in
        page.screenshot(path=target)


if __name__ == "__main__":
    picture(Path(sys.argv[1]), Path(sys.argv[2]))
