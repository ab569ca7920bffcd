"""Loads a `ddexport serve` and prints figures as JSON: `python docs/serve_load.py BUNDLE WHAT...`.

Servers run on this machine, with one thread of the engine; clients are threads of this process. WHAT is load
(requests a second with and without batches), leaving (1,000 clients that leave), full (a full queue for a
minute) or memory (of the server over 100,000 images).
"""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATH = "/v1/images/generations"
PROGRAM = "from ddexport.runtime.server.command import command; command()"
ROUNDS, SECONDS, LEAVING, FULL_SECONDS, IMAGES = 5, 4, 1000, 60, 100_000


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, int]]:
    """Host and port of a server."""
    words = [sys.executable, "-c", PROGRAM, *arguments, "--port", "0", "--threads", "1", "--grace", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        host, port = process.stdout.readline().strip().removeprefix("http://").split(":")
        yield host, int(port)
    finally:
        process.terminate()
        if code := process.wait():
            raise SystemExit(f"the server ended with {code}")


def figure(place: tuple[str, int], name: str) -> float:
    """A figure of /metrics, summed over its labels."""
    connection = http.client.HTTPConnection(*place)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def load(place: tuple[str, int], clients: int, seconds: float, images: int = 1, most: float = 1e9) -> Row:
    """What `clients`, each with one request at a time, see in so many seconds, or until `most` answers."""
    times: list[float] = []
    codes: list[int] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(*place)
        while time.perf_counter() < end and len(codes) < most:
            body = json.dumps({"prompt": str(number % 10), "n": images, "seed": len(codes)})
            began = time.perf_counter()
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            codes.append(answer.status)
            if answer.status == 200:
                times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - began
    times.sort()
    refused = codes.count(429)
    assert len(times) + refused == len(codes), set(codes)
    return {
        "clients": clients,
        "requests_per_second": len(times) / spent,
        "p50_ms": 1e3 * times[len(times) // 2],
        "p99_ms": 1e3 * times[int(len(times) * 0.99)],
        "answered": len(times),
        "refused": refused,
    }


def compared(bundle: str) -> list[Row]:
    """Batches of up to 16 images and of one, in turn, so that other work on the machine slows both: medians
    of the rounds."""
    rows = []
    with serving(bundle, "--max-batch", "16") as many, serving(bundle, "--max-batch", "1") as one:
        for clients in (1, 8, 32):
            rounds = [[load(place, clients, SECONDS) for place in (many, one)] for _ in range(ROUNDS)]
            for batch, runs in zip((16, 1), zip(*rounds, strict=True), strict=True):
                medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                rows.append({"max_batch": batch, **medians})
    return rows


def leaving(place: tuple[str, int]) -> Row:
    """1,000 clients that send a request and close; how many images were drawn for them."""
    before = figure(place, "ddexport_batch_size_sum")
    body = json.dumps({"prompt": "0"})
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    for _ in range(LEAVING // 50):
        sockets = [socket.create_connection(place) for _ in range(50)]
        for client in sockets:
            client.sendall(f"{head}\r\n\r\n{body}".encode())
        for client in sockets:
            client.close()
    while figure(place, "ddexport_queue_images"):
        time.sleep(0.05)
    return {"left": LEAVING, "drawn": figure(place, "ddexport_batch_size_sum") - before} | load(place, 1, 2)


def memory(place: tuple[str, int]) -> list[Row]:
    """Resident memory of the server while images are drawn, ten a request, by eight clients."""
    rows, images = [], 0
    load(place, 8, 1e9, 10, 50)
    for _ in range(5):
        load(place, 8, 1e9, 10, IMAGES / 50)
        images += IMAGES // 5
        rows.append({"images": images, "mib": figure(place, "process_resident_memory_bytes") / (1 << 20)})
    return rows


def main(bundle: str, *what: str) -> None:
    rows: list[Row] = []
    if "load" in what:
        rows += compared(bundle)
    if "leaving" in what:
        with serving(bundle, "--max-queue", "1000") as place:
            rows.append(leaving(place))
    if "full" in what:
        with serving(bundle, "--max-queue", "16", "--max-images", "10") as place:
            rows.append({"queue": 16, **load(place, 64, FULL_SECONDS)})
    if "memory" in what:
        with serving(bundle) as place:
            rows += memory(place)
    sys.stdout.write(json.dumps({"rows": rows}))


Row = dict[str, Any]

if __name__ == "__main__":
    main(*sys.argv[1:])
