"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The figures of one server. model: the id of a bundle, "" where a request names none that there is."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "ddexport_requests", "Requests under /v1", ["model", "code"], registry=self.registry
        )
        self.duration = self._seconds("request_duration", "From the request to its answer", ["model"])
        self.inference = self._seconds("inference", "Of a batch in a stage", ["model", "stage"])
        self.batches = Histogram(
            "ddexport_batch_size", "Images of a batch", ["model"], buckets=IMAGES, registry=self.registry
        )
        self.queue = Gauge(
            "ddexport_queue_images", "Images that wait to be drawn", ["model"], registry=self.registry
        )

    def _seconds(self, name: str, text: str, labels: list[str]) -> Histogram:
        title = f"ddexport_{name}_seconds"
        return Histogram(title, text, labels, buckets=SECONDS, registry=self.registry)

    def watch_queue(self, model: str, waiting: Callable[[], int]) -> None:
        """Asks for the number of waiting images when it is read, so that it cannot drift."""
        self.queue.labels(model).set_function(waiting)

    def drew(self, model: str, images: int, batch: int, seconds: Mapping[str, float]) -> None:
        """Counts images that were drawn in batches of `batch`, and the seconds by stage."""
        for start in range(0, images, batch):
            self.batches.labels(model).observe(min(batch, images - start))
        for stage, spent in seconds.items():
            self.inference.labels(model, stage).observe(spent)

    def answered(self, model: str, code: int, seconds: float) -> None:
        """Counts an answer."""
        self.requests.labels(model, str(code)).inc()
        self.duration.labels(model).observe(seconds)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self.registry)
