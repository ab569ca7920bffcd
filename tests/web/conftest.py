"""A browser, and a site of both embedded models in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ddexport.cli import main
from ddexport.validate.browser import chromium, serving

MODELS = ("digits-var", "digits-llamagen")


@pytest.fixture(scope="session")
def site(embedded_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of both, as the command writes it; not to be changed."""
    folder = tmp_path_factory.mktemp("web") / "site"
    bundles = [str(embedded_bundle(model)) for model in MODELS]
    result = CliRunner().invoke(main, ["web", *bundles, "-o", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")  # playwright keeps a loop of asyncio, which other modules' tests refuse
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


class Visit:
    """A page that is open, and what happened in it: addresses asked for, and what it complained of."""

    def __init__(self, page: Any) -> None:
        self.page, self.asked, self.faults = page, [], []
        page.context.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda line: line.type in ("error", "warning") and self.faults.append(line.text))
        page.on("pageerror", lambda error: self.faults.append(str(error)))


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[[str], Visit]]:
    """visit(address): a page of a new context."""
    context = browser.new_context()

    def opened(address: str) -> Visit:
        visited = Visit(context.new_page())
        visited.page.goto(address)
        return visited

    yield opened
    context.close()


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    with serving(site) as url:
        yield url
