"""`ddexport web` in Chromium: the page draws what the runtime draws on this CPU, and asks nobody else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ddexport.cli import main
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.pipeline import load
from tests.runtime.server.serving import serving
from tests.web.conftest import MODELS, Visit

pytestmark = pytest.mark.web
Go = Callable[[str], Visit]

CANVASES = """() => [...document.querySelectorAll("#results canvas")].map((canvas) =>
  canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data)"""
TOKENS = """async ([name, request]) => {
  const at = (path) => import(new URL(path, location.href).href);
  const site = await (await fetch("site.json")).json();
  const model = await (await at("local.js")).connect(site).open(name);
  const tokens = [];
  await model.draw(request, ({ steps }) => tokens.push(steps.flatMap((step) => [...step.tokens])));
  return tokens;
}"""
NUMBERS = """async ([seeds, count]) => {
  const { gaussianNoise, uniformNumbers } = await import(new URL("noise.js", location.href).href);
  return seeds.map(([seed, image]) =>
    [gaussianNoise, uniformNumbers].map((draw) => draw(BigInt(seed), BigInt(image), count)));
}"""


def drawn(visited: Visit, count: int, side: int = 32) -> np.ndarray:
    """The images (N, side, side, 3) that the page shows, once it has drawn so many."""
    page = visited.page
    page.locator("#results canvas").nth(count - 1).wait_for(timeout=120_000)
    return np.array(page.evaluate(CANVASES), np.uint8).reshape(-1, side, side, 4)[..., :3]


def same(images: np.ndarray, expected: np.ndarray) -> None:
    """Pixel for pixel: engines sum in another order, which can turn one value of a thousand by one."""
    difference = np.abs(images.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


# In CI `make parity` draws the other family's in Chromium.
@pytest.mark.parametrize("model", [pytest.param(MODELS[0], marks=pytest.mark.slow), MODELS[1]])
def test_the_page_draws_what_the_runtime_draws(
    visit: Go, address: str, embedded_bundle: Callable[[str], Path], model: str
) -> None:
    """By its controls, and by the engine behind them: tokens, pixels, and no request to another server."""
    visited = visit(f"{address}#model={model}&label=7&steps=1&steps=2&steps=teacher&seed=3&n=2")
    images = drawn(visited, 6)
    visited.page.fill("[name=seed]", str(2**64 - 1))
    visited.page.click("#draw")
    again = drawn(visited, 6)
    with load(embedded_bundle(model), "onnxruntime", threads=1, precision="fp32") as pipe:
        for number, steps in enumerate((1, 2, "teacher")):
            rows = slice(2 * number, 2 * number + 2)
            for seed, shown in ((3, images), (2**64 - 1, again)):
                result = pipe(["seven"], steps, seed=seed, num_images=2, output="numpy")
                same(shown[rows], result.images)
            request = {"label": 7, "steps": steps, "seed": 3, "n": 2, "decoder": "full"}
            result = pipe(["seven"], steps, seed=3, num_images=2, output="numpy")
            tokens = np.concatenate([step.tokens for step in result.steps], axis=1)
            assert visited.page.evaluate(TOKENS, [model, request]) == tokens.tolist()
    assert len(visited.asked) > 10 and all(url.startswith(address) for url in visited.asked), visited.asked
    assert visited.faults == []


def test_the_noise_is_equal_in_every_bit(visit: Go, address: str) -> None:
    seeds, count = [(0, 0), (1, 2), (2**32, 2**32 + 1), (2**64 - 1, 2**64 - 1)], 50_001
    words = [[list(map(str, pair)) for pair in seeds], count]
    answers = visit(f"{address}noise.js").page.evaluate(NUMBERS, words)
    for (seed, image), (normal, uniform) in zip(seeds, answers, strict=True):
        assert np.array(normal, np.float32).tobytes() == gaussian_noise(seed, [image], count, 1).tobytes()
        assert np.array(uniform).tobytes() == uniform_numbers(seed, [image], count).tobytes()


def test_one_file_opens_from_a_disk(
    visit: Go, embedded_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    page, bundle = tmp_path / "page.html", embedded_bundle("digits-var")
    words = ["web", str(bundle), "-o", str(page), "--single-file", "--precision", "int8"]
    assert CliRunner().invoke(main, words).exit_code == 0
    visited = visit(f"{page.as_uri()}#label=3&steps=2&n=2&decoder=small")
    with load(bundle, "onnxruntime", threads=1, precision="int8") as pipe:
        same(drawn(visited, 2), pipe([3], 2, num_images=2, output="numpy", decoder="small").images)
    assert all(url.startswith(("file:", "blob:", "data:")) for url in visited.asked)
    assert visited.faults == []


def test_a_server_draws_for_the_same_page(
    visit: Go, embedded_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = embedded_bundle("digits-var")
    with serving(
        tmp_path, bundle, "--backend", "onnxruntime", "--threads", 1, "--precision", "fp32"
    ) as server:
        visited = visit(f"{server.url}/#label=7&steps=2&seed=5&n=2")
        images = drawn(visited, 2)
    with load(bundle, "onnxruntime", threads=1, precision="fp32") as pipe:
        assert np.array_equal(images, pipe(["seven"], 2, seed=5, num_images=2, output="numpy").images)
    assert all(url.startswith((server.url, "blob:")) for url in visited.asked) and visited.faults == []


def test_a_server_draws_from_sentences(visit: Go, text_bundle: Path, tmp_path: Path) -> None:
    """One a line; as text they may hold anything."""
    prompts = ["a red fox", "<b>an owl & a cup</b>"]
    with serving(tmp_path, text_bundle, "--backend", "onnxruntime", "--threads", 1) as server:
        visited = visit(f"{server.url}/#steps=1&seed=5&n=1")
        visited.page.get_by_label("Sentences, one a line").fill("\n".join(prompts))
        visited.page.click("#draw")
        with load(text_bundle, "onnxruntime", threads=1) as pipe:
            result = pipe(prompts[:1], 1, seed=5, output="numpy")
            assert np.array_equal(drawn(visited, 2, pipe.manifest.image.height)[:1], result.images)
        assert visited.page.locator("h2").all_inner_texts()[:2] == prompts
    assert visited.faults == []


def test_a_damaged_bundle_is_told(visit: Go, site: Path, address: str, browser: Any) -> None:
    """In a sentence, by a page that stays usable: here a wrong hash."""
    with browser.new_context() as context:
        page = context.new_page()
        body = (site / "bundles" / "digits-var" / "decoder.onnx").read_bytes()
        page.route("**/decoder.onnx", lambda route: route.fulfill(body=body[:-1] + b"?"))
        page.goto(f"{address}#model=digits-var")
        page.get_by_text("The SHA-256 of decoder.onnx is not the one in bundle.json.").wait_for(
            timeout=60_000
        )


def test_a_site_holds_one_precision(embedded_bundle: Callable[[str], Path], site: Path) -> None:
    """Of bundles that are not changed otherwise."""
    bundle, copy = embedded_bundle("digits-var"), site / "bundles" / "digits-var"
    assert (copy / "bundle.json").read_bytes() == (bundle / "bundle.json").read_bytes()
    assert {path.name for path in copy.iterdir()} == {
        "README.md", "bundle.json", "codebook.npy", "decoder.onnx", "decoder_small.onnx", "labels.json",
        "student.onnx", "student.onnx.data", "student_split14.onnx", "teacher.onnx",
    }  # fmt: skip
    listing = json.loads((site / "site.json").read_text())
    assert [bundle["url"] for bundle in listing["bundles"]] == [f"bundles/{model}/" for model in MODELS]
