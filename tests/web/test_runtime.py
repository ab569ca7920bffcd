"""The JavaScript runtime beside the one in Python: what parity of the embedded models does not reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddexport import recipes
from ddexport.runtime.errors import LabelError
from ddexport.runtime.labels import read_labels
from ddexport.runtime.teacher import Sampling, choose
from tests.web.conftest import Visit

pytestmark = pytest.mark.web
Go = Callable[[str], Visit]

CALL = """async ([file, name, shared, calls]) => {
  const module = await import(new URL(file, location.href).href);
  return calls.map((given) => {
    try { return module[name](...shared, ...given); } catch (error) { return [error.code, error.message]; }
  });
}"""
LOAD = """async ([before, options, requests]) => {
  new Function(before)();
  const attempt = (work) => work.catch(({ name, code, message }) => [name, code, message]);
  const { load } = await import(new URL("ddexport.js", location.href).href);
  const pipe = await attempt(load("bundles/digits-var", options));
  if (pipe instanceof Array) return [pipe];
  return Promise.all(requests.map((request) => attempt(pipe(["seven"], request))));
}"""
# What `navigator.gpu` finds.
GPU = "Object.defineProperty(navigator, 'gpu', { value: { requestAdapter: async () => (%s) } });"
# What a browser lacks or a user asks: a script before, options of load, the code.
FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("WebAssembly.validate = () => false", {}, "no_simd"),
    ("WebAssembly.Memory = class { constructor() { throw new RangeError('no'); } }", {}, "no_memory"),
    (GPU % "{ features: new Set() }", {"device": "webgpu", "precision": "fp16"}, "no_fp16"),
    (GPU % "null", {"device": "webgpu"}, "no_webgpu"),
    ("", {"device": "tpu"}, "invalid_value"),
    ("", {"precision": "fp64"}, "no_precision"),
    ("", {"decoder": "tiny"}, "no_decoder"),
]
REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"steps": 7}, "unknown_steps"),
    ({"seed": -1}, "invalid_value"),
    ({"seed": 0.5}, "invalid_value"),
    ({"n": 0}, "invalid_value"),
    ({"size": 64}, "invalid_value"),
    ({"decoder": "tiny"}, "no_decoder"),
]


def test_a_teacher_chooses_the_same_tokens(visit: Go, address: str) -> None:
    """By rules that the embedded models do not use: top-k, top-p, temperature, and logits that are equal."""
    generator = np.random.default_rng(0)
    for top_k, top_p, temperature in ((1, 1, 1), (5, 1, 1), (40, 0.8, 0.7), (64, 0.3, 2), (900, 0.95, 1)):
        # Of one decimal many are equal.
        logits = np.round(generator.normal(0, 3, (200, 64)), 1).astype(np.float32)
        numbers = generator.random(200)
        rules = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
        calls = [[row.tolist(), number, rules] for row, number in zip(logits, numbers, strict=True)]
        tokens = choose(logits, numbers, Sampling(1.0, **rules))
        assert (
            visit(f"{address}noise.js").page.evaluate(CALL, ["teacher.js", "choose", [], calls])
            == tokens.tolist()
        )


def test_labels_mean_the_same(visit: Go, address: str) -> None:
    """All names and numbers of ImageNet, in another case too, and what is wrong or ambiguous."""
    path = Path(recipes.__path__[0]) / "labels" / "imagenet.json"
    labels = read_labels(path, 1000)
    aliases = {str(number): list(words) for number, words in labels.aliases.items()}
    words = [word for names in aliases.values() for word in names]
    asked = [*labels.names, *words, "  Golden   RETRIEVER ", "7", "-1", "1000", "crane", "no such thing", ""]
    answers = visit(f"{address}noise.js").page.evaluate(
        CALL, ["labels.js", "labelIndex", [list(labels.names), aliases], [[word] for word in asked]]
    )
    for word, answer in zip(asked, answers, strict=True):
        try:
            assert answer == labels.index(word)
        except LabelError:
            assert answer[0] == "unknown_label"


@pytest.mark.parametrize(("before", "options", "code"), FAULTS, ids=[code for _, _, code in FAULTS])
def test_a_refusal_has_a_code_and_a_sentence(
    visit: Go, address: str, before: str, options: dict[str, Any], code: str
) -> None:
    [(kind, got, message)] = visit(f"{address}noise.js").page.evaluate(LOAD, [before, options, []])
    assert (kind, got, message[-1]) == ("DDError", code, "."), message


def test_so_has_that_of_a_request(visit: Go, address: str) -> None:
    requests = [request for request, _ in REQUESTS]
    answers = visit(f"{address}noise.js").page.evaluate(LOAD, ["", {}, requests])
    for (kind, got, message), (_, code) in zip(answers, REQUESTS, strict=True):
        assert (kind, got, message[-1]) == ("DDError", code, "."), message


@pytest.mark.parametrize(
    ("file", "change", "code"),
    [
        ("bundle.json", lambda body: body.replace(b'"schema": 2', b'"schema": 3'), "newer_schema"),
        ("bundle.json", lambda body: body.replace(b'"schema": 2', b'"schema": 1'), "older_schema"),
        ("bundle.json", lambda body: body.replace(b'"labels.json"', b'"../labels.json"'), "damaged"),
        ("bundle.json", lambda body: body[:-9], "damaged"),
        ("student.onnx", lambda body: body[:-1], "wrong_size"),
        ("student.onnx", lambda body: body[:-1] + b"?", "wrong_hash"),
        ("labels.json", lambda body: None, "not_found"),
    ],
)
def test_a_damaged_bundle_has_a_code(
    visit: Go, site: Path, address: str, file: str, change: Callable[[bytes], bytes | None], code: str
) -> None:
    page = visit(f"{address}noise.js").page
    body = change((site / "bundles" / "digits-var" / file).read_bytes())
    answer = {"status": 404} if body is None else {"body": body}
    page.route(f"**/{file}", lambda route: route.fulfill(**answer))
    assert page.evaluate(LOAD, ["", {}, [{}]])[0][1] == code
