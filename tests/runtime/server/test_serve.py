"""`ddexport serve` as real processes: signals by pid, clients that leave, engines that break."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from ddexport.runtime.pipeline import load
from tests.runtime.server.serving import PATH, Server, serving, until


@pytest.fixture
def server(shared_teacher_bundle: Path, tmp_path: Path) -> Iterator[Server]:
    """Of the toy, which draws at most 8 images at once, and lets 32 wait."""
    with serving(
        tmp_path, shared_teacher_bundle, "--max-batch", 8, "--max-queue", 32, "--grace", 1
    ) as running:
        yield running


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as executor:
        yield executor


def files(response: httpx.Response) -> list[bytes]:
    assert response.status_code == 200, response.text
    return [base64.b64decode(image["b64_json"]) for image in response.json()["data"]]


def pngs(images: list[Image.Image]) -> list[bytes]:
    streams = [io.BytesIO() for _ in images]
    for image, stream in zip(images, streams, strict=True):
        image.save(stream, format="png")
    return [stream.getvalue() for stream in streams]


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    """An error in OpenAI's shape, which tells nothing of the server's insides."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert (error["code"], error["param"]) == (code, param)
    assert not any(word in response.text for word in ("Traceback", "/secret", ".py", ".onnx", "/tmp"))


def compare_company(bundle: Path, folder: Path, pool: ThreadPoolExecutor, prompts: list[str]) -> None:
    """32 requests drawn in one batch equal `pipe()` alone, and themselves alone."""
    with serving(folder, bundle, "--max-batch", 64) as server, load(bundle) as pipe:
        schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
        assert len(files(server.draw(**schemas["ImageRequest"]["examples"][0]))) == 2
        for steps in (1, 2):
            requests = [
                {"prompt": prompts[i % len(prompts)], "seed": i, "n": 1 + i % 2, "steps": steps}
                for i in range(32)
            ]
            held = server.hold(pool, prompt=prompts[0])
            company = [pool.submit(server.draw, **request) for request in requests]
            until(lambda: server.figure("ddexport_queue_images") == 48)
            batches = server.figure("ddexport_batch_size_count")
            server.switch("hold", False)
            answers = [files(answer.result()) for answer in company]
            assert len(files(held.result())) == 1
            assert server.figure("ddexport_batch_size_count") == batches + 2, "who was held, and all others"
            for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
                alone = pipe(request["prompt"], steps, seed=request["seed"], num_images=request["n"])
                assert answer == pngs(alone.images)
                assert i % 8 or answer == files(server.draw(**request))


def test_company(golden_bundle: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    compare_company(golden_bundle, tmp_path, pool, ["0", "1", "2"])


def test_company_of_texts(text_bundle: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Prompts of different length, of which one is empty."""
    compare_company(text_bundle, tmp_path, pool, ["a red fox in the snow", "", "fox", "an owl, a cup"])


def test_teacher(server: Server, shared_teacher_bundle: Path, pool: ThreadPoolExecutor) -> None:
    """Its draws are those of the seed, in company too."""
    requests = [{"prompt": "two", "seed": seed, "steps": "teacher", "n": 2} for seed in range(4)]
    held = server.hold(pool)
    answers = [pool.submit(server.draw, **request) for request in requests]
    until(lambda: server.figure("ddexport_queue_images") == 8)
    server.switch("hold", False)
    with load(shared_teacher_bundle) as pipe:
        for seed, answer in enumerate(answers):
            assert files(answer.result()) == pngs(pipe("two", "teacher", seed=seed, num_images=2).images)
    assert held.result().status_code == 200


def test_a_full_queue(server: Server, pool: ThreadPoolExecutor) -> None:
    """What does not fit is refused at once, and what waits is answered."""
    held = server.hold(pool)
    waiting = [pool.submit(server.draw, n=8, seed=seed) for seed in range(4)]
    until(lambda: server.figure("ddexport_queue_images") == 32)
    began = time.monotonic()
    for _ in range(20):
        answer = server.draw()
        refused(answer, 429, "queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert time.monotonic() - began < 5
    assert server.http.get("/readyz").status_code == server.http.get("/livez").status_code == 200
    server.switch("hold", False)
    assert [len(files(future.result())) for future in [held, *waiting]] == [1, 8, 8, 8, 8]
    files(server.draw())


def test_clients_that_leave(server: Server, pool: ThreadPoolExecutor) -> None:
    """Their places are free again, and nothing is drawn for them."""
    held = server.hold(pool)
    drawn = server.figure("ddexport_batch_size_sum")
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "one", "n": 2})
    lines = ("Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}")
    head = "\r\n".join((f"POST {PATH} HTTP/1.1", *lines, "", ""))
    left = [socket.create_connection((host, int(port))) for _ in range(16)]
    for client in left:
        client.sendall((head + body).encode())
    until(lambda: server.figure("ddexport_queue_images") == 32)
    refused(server.draw(), 429, "queue_full")
    for client in left:
        client.close()
    until(lambda: server.figure("ddexport_queue_images") == 0)
    server.switch("hold", False)
    files(held.result())
    assert server.figure("ddexport_batch_size_sum") == drawn + 1
    until(lambda: server.figure('ddexport_requests_total{code="499",model="toy"}') == 16)


def test_sigterm(server: Server, pool: ThreadPoolExecutor) -> None:
    """Not ready at once, while requests still come; all that were accepted are answered; exit code 0."""
    held = server.hold(pool)
    waiting = [pool.submit(server.draw, seed=seed) for seed in range(12)]
    until(lambda: server.figure("ddexport_queue_images") == 12)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.http.get("/readyz").status_code == 503)
    assert server.http.get("/livez").status_code == 200
    late = pool.submit(server.draw, seed=99)
    until(lambda: server.figure("ddexport_queue_images") == 13)
    time.sleep(1.5)
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/readyz")
    assert server.process.poll() is None
    server.switch("hold", False)
    assert all(len(files(future.result())) == 1 for future in [held, *waiting, late])
    assert server.wait() == 0


def test_a_second_signal(server: Server, pool: ThreadPoolExecutor) -> None:
    """Drops what waits; what the engine has begun it ends."""
    held = server.hold(pool)
    waiting = [pool.submit(server.draw, seed=seed) for seed in range(12)]
    until(lambda: server.figure("ddexport_queue_images") == 12)
    for _ in range(2):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert {future.result().status_code for future in [held, *waiting]} == {500}
    server.switch("hold", False)
    assert server.wait() == 0


def test_ctrl_c(server: Server) -> None:
    files(server.draw())
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 130


def test_a_broken_engine_ends_the_process(server: Server, pool: ThreadPoolExecutor) -> None:
    """For its supervisor to see; those who wait are told."""
    held = server.hold(pool)
    waiting = [pool.submit(server.draw, seed=seed) for seed in range(12)]
    until(lambda: server.figure("ddexport_queue_images") == 12)
    server.switch("broken")
    server.switch("hold", False)
    for future in [held, *waiting]:
        answer = future.result()
        refused(answer, answer.status_code, {500: "server_error", 503: "engine_failed"}[answer.status_code])
    assert server.wait() == 1
    assert "has failed for good" in server.log.splitlines()[-2]


def test_a_request_that_fails_harms_nobody(server: Server, pool: ThreadPoolExecutor) -> None:
    """Not the others of its batch, and not the server."""
    server.switch("poison")
    held = server.hold(pool)
    prompts = ["zero", "two", "one", "zero", "two"]
    answers = [pool.submit(server.draw, prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    until(lambda: server.figure("ddexport_queue_images") == 5)
    server.switch("hold", False)
    for prompt, future in zip(prompts, answers, strict=True):
        if prompt == "one":
            refused(future.result(), 500, "server_error")
        else:
            files(future.result())
    files(held.result())
    server.switch("defect")
    refused(server.draw("two"), 500, "server_error")
    until(lambda: "KeyError: '/secret/app.py'" in server.log)
    server.switch("defect", False)
    files(server.draw("two"))
    assert server.http.get("/readyz").status_code == 200


def test_openai_client(server: Server, shared_teacher_bundle: Path, pool: ThreadPoolExecutor) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5)
    extras: dict[str, Any] = {"seed": 3, "steps": 2}
    answer = client.images.generate(model="toy", prompt="a pair", n=2, size="auto", extra_body=extras)
    with load(shared_teacher_bundle) as pipe:
        same = pngs(pipe("a pair", 2, seed=3, num_images=2).images)
    assert answer.data and [base64.b64decode(image.b64_json or "") for image in answer.data] == same
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").to_dict()["labels"] == ["zero", "one", "two"]
    with pytest.raises(openai.BadRequestError, match="no class is called"):
        client.images.generate(model="toy", prompt="tow")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="dall-e-3", prompt="two")
    server.hold(pool)
    waiting = [pool.submit(server.draw, n=8) for _ in range(4)]
    until(lambda: server.figure("ddexport_queue_images") == 32)
    again = pool.submit(client.images.generate, model="toy", prompt="two")
    until(lambda: server.figure("ddexport_requests_total") >= 6)
    server.switch("hold", False)
    assert again.result().data and [len(files(future.result())) for future in waiting] == [8] * 4


def test_parameters(server: Server) -> None:
    """Each that is wrong is named."""
    for changes, param in (
        ({"prompt": "tow"}, "prompt"), ({"prompt": "3"}, "prompt"), ({"prompt": 1}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"), ({"steps": 9}, "steps"), ({"steps": "all"}, "steps"),
        ({"steps": True}, "steps"), ({"seed": -1}, "seed"), ({"seed": 2**64}, "seed"), ({"n": 0}, "n"),
        ({"n": 11}, "n"), ({"n": 1.5}, "n"), ({"size": "9x9"}, "size"), ({"decoder": "small"}, "decoder"),
        ({"response_format": "url"}, "response_format"), ({"output_format": "gif"}, "output_format"),
        ({"quality": "high"}, "quality"),
    ):  # fmt: skip
        refused(server.draw(**{"prompt": "two", **changes}), 400, "invalid_value", param)
    refused(server.draw(model="other"), 404, "model_not_found", "model")
    refused(server.http.get("/v1/models/other"), 404, "model_not_found", "model")
    refused(server.http.get("/v1/images/edits"), 404, "not_found")
    refused(server.http.get(PATH), 405, "method_not_allowed")
    refused(server.http.post(PATH, content=b"{"), 400, "invalid_value")
    refused(server.http.post(PATH, content=b"[" * 60_000), 400, "invalid_value")
    refused(server.draw(user="x" * 70_000), 413, "too_large")
    pieces = (b" " * 1000 for _ in range(100))
    refused(
        server.http.post(PATH, content=pieces, headers={"content-type": "application/json"}), 413, "too_large"
    )


def test_answers(server: Server) -> None:
    """A drawn seed draws the same again; the formats; nothing for browsers of other sites."""
    first = server.draw("two").json()
    again = server.draw("two", seed=first["seed"], steps=first["steps"], n=None, user="somebody")
    assert again.json()["data"] == first["data"] and first["size"] == "8x8"
    for kind in ("png", "jpeg", "webp"):
        (file,) = files(server.draw("two", seed=0, output_format=kind))
        image = Image.open(io.BytesIO(file))
        assert (image.format, image.size) == (kind.upper(), (8, 8))
    answer = server.http.post(
        PATH, json={"prompt": "two"}, headers={"origin": "https://example.com", "x-request-id": "mine-7"}
    )
    assert answer.headers["x-request-id"] == "mine-7" and "access-control-allow-origin" not in answer.headers
    until(lambda: "mine-7" in server.log and PATH in server.log)
    server.http.get("/no%0Ainfo: forged")
    until(lambda: "\\ninfo: forged" in server.log)
    assert "openapi" in server.http.get("/docs").text
    details = server.http.get("/v1/models/toy").json()
    assert [schedule["steps"] for schedule in details["schedules"]][:2] == [1, 2]
    assert (details["prompts"], details["max_images"], details["aliases"]) == (
        "labels",
        10,
        {"2": ["a pair"]},
    )


def test_keys_and_several_bundles(golden_bundle: Path, shared_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the team\nfirst-key\n\nsecond-key\n")
    with serving(tmp_path, golden_bundle, shared_bundle, "--api-key-file", keys, "--log-json") as server:
        for value in (
            "",
            "Bearer",
            "Bearer third-key",
            "Bearer first-key second-key",
            "Basic first-key",
            "first-key",
        ):
            refused(server.http.get("/v1/models", headers={"authorization": value}), 401, "invalid_api_key")
        refused(server.draw(), 401, "invalid_api_key")
        assert {server.http.get(path).status_code for path in ("/livez", "/readyz", "/metrics")} == {200}
        server.http.headers["authorization"] = "Bearer second-key"
        names = [model["id"] for model in server.http.get("/v1/models").json()["data"]]
        assert len(names) == 2 and "toy" in names
        refused(server.draw(), 400, "missing_parameter", "model")
        sizes = {server.draw("0", model=name).json()["size"] for name in names}
        assert len(sizes) == 2
        until(lambda: server.log.count('"images"') == 2)
        records = [json.loads(line) for line in server.log.splitlines()]
        drawn = [record for record in records if record.get("images")]
        assert [record["model"] for record in drawn] == names
        assert all(record["request_id"] and record["seconds"] >= record["waited"] >= 0 for record in drawn)
        assert "second-key" not in server.log


def test_the_page_lies_beside_the_interface(server: Server) -> None:
    """Its files with their types, whatever the system says, and nothing else of the package."""
    for path, kind in (
        ("/", "text/html"),
        ("/noise.js", "text/javascript"),
        ("/site.json", "application/json"),
    ):
        answer = server.http.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
    assert server.http.get("/site.json").json() == {"server": "v1/"}
    assert server.http.get("/noise.js").headers["x-content-type-options"] == "nosniff"
    for path in ("/absent.js", "/..%2fnoise.py", "/%2e%2e/noise.py", "/onnxruntime", "/noise.js/x"):
        refused(server.http.get(path), 404, "not_found")


def test_an_engine_that_rounds_by_batch(
    shared_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is given one image at a time, whatever the request."""
    from ddexport.runtime.backends.onnxruntime import OnnxRuntime
    from ddexport.runtime.server.batcher import Batcher, Job
    from ddexport.runtime.server.metrics import Metrics

    run, sizes = OnnxRuntime._run, []

    def rounding(self: Any, session: Any, feeds: Any, names: Any) -> Any:
        sizes.append(len(next(iter(feeds.values()))))
        results = run(self, session, feeds, names)
        if "image" in results:
            results = {**results, "image": results["image"] + np.float32(1e-6) * (sizes[-1] > 1)}
        return results

    monkeypatch.setattr(OnnxRuntime, "_run", rounding)
    batcher = Batcher(load(shared_bundle), 8, 8, Metrics())
    assert batcher.max_batch == 1 and "one by one" in caplog.text
    sizes.clear()
    job = Job("two", 4, 0)
    batcher.submit(job)
    assert len(job.future.result(60).images) == 4 and set(sizes) == {1}
    batcher.close()


def test_the_description_keeps_its_promises(server: Server) -> None:
    """schemathesis: no request that it makes of the description, right or wrong, is answered with 5xx."""
    import schemathesis
    from hypothesis import given, settings
    from schemathesis import GenerationMode

    operations = [
        result.ok()
        for result in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations()
    ]
    assert len(operations) == 6
    codes = set()
    for operation in operations:
        # What has no body takes no parameter, or any text.
        for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:

            @settings(max_examples=100 if operation.body else 5, deadline=None, database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                answer = case.call()
                codes.add(answer.status_code)
                assert answer.status_code < 500, answer.text

            check()
    assert {200, 400, 404} <= codes
