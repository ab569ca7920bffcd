"""hf://USER/NAME[@REVISION] as a bundle: a directory of copies from the Hub's cache."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from msgspec import structs

from ddexport.card import ACCURACY_FILE
from ddexport.hub.errors import HubError, MissingFileError
from ddexport.hub.files import HubFile, LocalFile, fetch, licence_remark, parse
from ddexport.runtime.bundle import FILE_NAME, TEACHER, Manifest, manifest_from, resolve
from ddexport.runtime.check import FILE as GOLDEN
from ddexport.runtime.files import atomic_write

BESIDE = ("README.md", ACCURACY_FILE, GOLDEN)  # of a whole bundle: what the manifest does not list


def local_bundle(address: str, precisions: Sequence[str | None], steps: Sequence[int | str | None]) -> Path:
    """The directory of a bundle on the Hub, which holds what these precisions and steps need; all if empty.

    It lies among the assets of huggingface_hub's cache. What commands write into it stays there.
    Raises HubError, and BundleError or ScheduleError for what the bundle does not have.
    """
    from huggingface_hub import cached_assets_path

    repository = parse(address)
    if repository.path:
        raise HubError(f"{address} names a file or a directory in a repository", "Give hf://USER/NAME alone.")
    try:
        [manifest_file] = fetch([repository._replace(path=FILE_NAME)])
    except MissingFileError as error:
        raise MissingFileError(
            f"{address} is no bundle: {error.message}",
            f"`ddexport push` publishes bundles; export a model with `ddexport onnx --model {address}`.",
        ) from error
    manifest = manifest_from(manifest_file.path)
    part = part_of(manifest, precisions, steps)
    whole = part == manifest
    text = manifest_file.path.read_bytes() if whole else part.to_json().encode()
    which = "whole" if whole else hashlib.sha256(text).hexdigest()[:12]
    folder: Path = cached_assets_path("ddexport", repository.repository, f"{manifest_file.commit}-{which}")
    files = [info.file for info in part.files()]
    places = {file: resolve(folder, file) for file in files}
    if not (folder / FILE_NAME).is_file() or not all(place.is_file() for place in places.values()):
        wanted = [HubFile(repository.repository, file, manifest_file.commit) for file in files]
        for fetched in fetch(wanted, remark=licence_remark(manifest.licence)):
            _copy(fetched, places[fetched.name])
        for file in BESIDE if whole else ():
            with suppress(MissingFileError):
                [beside] = fetch([HubFile(repository.repository, file, manifest_file.commit)])
                _copy(beside, folder / file)
        with atomic_write(folder / FILE_NAME) as stream:  # last: until then it is no bundle
            stream.write(text)
    return folder


def part_of(
    manifest: Manifest, precisions: Sequence[str | None], steps: Sequence[int | str | None]
) -> Manifest:
    """The manifest with the graphs that these precisions and steps need, and the schedules those can run.

    A precision that the bundle has no graphs of needs all: an engine may compute in it by itself.
    """
    first, schedules = manifest.precisions[0], [manifest.schedule(number) for number in steps]
    kept = {precision or first for precision in precisions}
    if not kept or not kept <= set(manifest.precisions):
        kept = set(manifest.precisions)
    if "bf16" in kept:
        kept.add("fp32")  # of which OpenVINO computes bf16, on CPUs alone
    splits = {schedule.split for schedule in schedules} - {manifest.sequence.split}
    teacher = not steps or any(schedule.teacher for schedule in schedules)
    if teacher and not any(graph.role == TEACHER and graph.precision in kept for graph in manifest.graphs):
        kept.add(first)  # a teacher is not reduced as far as its student
    graphs = tuple(
        graph
        for graph in manifest.graphs
        if graph.precision in kept
        and (graph.role != TEACHER or teacher)
        and (graph.split is None or not steps or graph.split in splits)
    )
    students = {graph.split or manifest.sequence.split for graph in graphs if graph.role == "student"}
    possible = {
        number: schedule
        for number, schedule in manifest.schedules.items()
        if (schedule.split or manifest.sequence.split) in students and (teacher or schedule.teacher is None)
    }
    involved = manifest.teacher if teacher else None
    return structs.replace(manifest, graphs=graphs, schedules=possible, teacher=involved)


def _copy(fetched: LocalFile, place: Path) -> None:
    """A plain file: onnx and OpenVINO refuse weights behind a link, whether symbolic or hard."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(place) as stream, fetched.path.open("rb") as content:
        shutil.copyfileobj(content, stream)
