"""What `ddexport sample --shards` asks for: labels or prompts, and the task of the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from ddexport.runtime import console
from ddexport.runtime.bundle import Manifest, read_manifest, resolve
from ddexport.runtime.errors import LabelError, TextError
from ddexport.runtime.labels import read_labels
from ddexport.runtime.noise import uniform_labels
from ddexport.runtime.shards.run import draw_set
from ddexport.runtime.shards.worker import Task
from ddexport.runtime.text import read_prompts

UNIFORM = "uniform"


def sample_shards(
    bundle: Path,
    shards: Path,
    labels: tuple[str, ...],
    label_source: str | None,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    count: int | None,
    shard_size: int,
    workers: int | None,
    address: str | None,
    backend: str,
    device: str | None,
    threads: int | None,
    precision: str | None,
    batch_size: int | None,
    no_verify: bool,
    **request: Any,
) -> dict[str, Any]:
    """Draws a set of images, and returns the report. Raises DDError; what is drawn by then stays."""
    manifest = read_manifest(bundle, verify=not no_verify)
    texts = bool(prompts or prompt_file)
    if manifest.text is None:
        if texts:
            raise TextError(f"{manifest.name} draws classes, not texts", "Give --labels.")
        numbers = _classes(bundle, manifest, labels, label_source, count, request["seed"])
    else:
        if labels or label_source or bool(prompts) == bool(prompt_file):
            raise TextError(f"{manifest.name} draws from texts", "Give --prompt or --prompts, and no label.")
        prompts = tuple(read_prompts(prompt_file)) if prompt_file else prompts
        numbers = np.resize(np.arange(len(prompts)), count or len(prompts))
    engine = {"backend": backend, "device": device, "threads": threads or 1, "precision": precision}
    task = Task(bundle.resolve(), shards.resolve(), engine, request, prompts, batch_size)
    return draw_set(task, manifest, numbers, shard_size, workers, address)


def report_line(report: dict[str, Any]) -> str:
    """The report for people, in one line, and in another the digest."""
    engine = ", ".join((report["backend"], report["device"], report["precision"]))
    rate = f", {report['images_per_second']:.1f} a second" if report["images_per_second"] else ""
    return (
        f"{report['shards']}: {report['images']:,} images, {report['drawn']:,} of them drawn now in"
        f" {console.duration(report['seconds'])}{rate}; {engine}\n"
        f"sha256 {report['sha256']}"
    )


def _classes(
    bundle: Path,
    manifest: Manifest,
    labels: tuple[str, ...],
    source: str | None,
    count: int | None,
    seed: int,
) -> NDArray[np.int64]:
    """The class (N,) of each image. Raises LabelError."""
    if labels and source:
        raise click.UsageError("--label and --labels cannot be used together: give one of them.")
    if not labels and source in (None, UNIFORM):
        if count is None:
            raise click.UsageError("--labels uniform needs --count.")
        return uniform_labels(seed, range(count), manifest.classes)
    if source is not None:
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            hint = "Give uniform, or a file with one label a line."
            raise LabelError(f"{source} cannot be read: {error}", hint) from error
        labels = tuple(line for line in lines if line.strip())
    numbers = read_labels(resolve(bundle, manifest.labels.file), manifest.classes).indices(labels)
    return np.resize(numbers, count or len(numbers))
