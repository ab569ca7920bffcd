"""hf://USER/NAME[@REVISION] as a bundle: a directory of copies from the Hub's cache."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from msgspec import structs

from ddexport.card import ACCURACY_FILE
from ddexport.hub.errors import MissingFileError, explained
from ddexport.hub.files import HubFile, fetch, licence_remark, parse, require_room
from ddexport.runtime.bundle import (
    FILE_NAME,
    PREFIXES,
    TEACHER,
    TEXT_ROLES,
    FileInfo,
    Manifest,
    manifest_from,
    resolve,
)
from ddexport.runtime.check import FILE as GOLDEN
from ddexport.runtime.files import atomic_write

BESIDE = (ACCURACY_FILE, GOLDEN)  # files of a whole bundle that the manifest does not list; and its reports


def local_bundle(address: str, precisions: Sequence[str | None], steps: Sequence[int | str | None]) -> Path:
    """The directory of a bundle on the Hub, which holds what these precisions and steps need; all if empty.

    It lies among the assets of huggingface_hub's cache. What commands write into it stays there.
    Raises HubError, and BundleError or ScheduleError for what the bundle does not have.
    """
    from huggingface_hub import cached_assets_path

    repository, _, revision = parse(address)
    [listing] = fetch([HubFile(repository, FILE_NAME, revision)])
    manifest = manifest_from(listing.path)
    part = part_of(manifest, precisions, steps)
    whole = part == manifest
    text = listing.path.read_bytes() if whole else part.to_json().encode()
    digest = hashlib.sha256(text).hexdigest()[:12]
    with explained(HubFile(repository, FILE_NAME)):
        folder: Path = cached_assets_path("ddexport", repository, f"{listing.commit}-{digest}")
    places = {info.file: resolve(folder, info.file) for info in part.files()}
    listed = folder / FILE_NAME

    def absent() -> list[FileInfo]:
        return [info for info in part.files() if not _is_there(places[info.file], info.bytes)]

    if not absent() and listed.is_file() and listed.read_bytes() == text:
        return folder  # which may be read-only
    with FileLock(folder / ".lock"):
        for partial in folder.rglob(".ddexport-*.part"):  # of a copy that was killed
            partial.unlink()
        require_room(folder, sum(info.bytes for info in absent()))
        wanted = [HubFile(repository, info.file, listing.commit) for info in absent()]
        for fetched in fetch(wanted, remark=licence_remark(manifest.licence)):
            _copy(fetched.path, places[fetched.name])
        for file in _beside(manifest) if whole else ():
            with suppress(MissingFileError):
                [fetched] = fetch([HubFile(repository, file, listing.commit)])
                _copy(fetched.path, folder / file)
        with atomic_write(listed) as stream:  # last: until then it is no bundle
            stream.write(text)
    return folder


def part_of(
    manifest: Manifest, precisions: Sequence[str | None], steps: Sequence[int | str | None]
) -> Manifest:
    """The manifest with the graphs that these precisions and steps need, and the schedules those can run.

    A precision that the bundle has no graphs of needs all: an engine may compute in it by itself.
    """
    first = manifest.precisions[0]
    kept = {precision or first for precision in precisions}
    if not kept or not kept <= set(manifest.precisions):
        kept = set(manifest.precisions)
    if "bf16" in kept:
        kept.add("fp32")  # of which OpenVINO computes bf16, on CPUs alone
    schedules = [manifest.schedule(number) for number in steps] or [*manifest.schedules.values()]
    splits = {None, manifest.sequence.split, *(schedule.split for schedule in schedules)}
    teacher = manifest.teacher if not steps or any(schedule.teacher for schedule in schedules) else None
    if teacher and not any(graph.role == TEACHER and graph.precision in kept for graph in manifest.graphs):
        kept.add(first)  # a teacher is not reduced as far as its student
    return structs.replace(
        manifest,
        teacher=teacher,
        pipelines=() if steps or precisions else manifest.pipelines,
        graphs=tuple(
            graph
            for graph in manifest.graphs
            if (graph.precision in kept or graph.role in TEXT_ROLES)
            and graph.split in splits
            and (teacher or graph.role not in (TEACHER, PREFIXES[TEACHER]))
        ),
        schedules={
            number: schedule
            for number, schedule in manifest.schedules.items()
            if schedule.split in splits and (teacher or not schedule.teacher)
        },
    )


def _beside(manifest: Manifest) -> list[str]:
    kinds = ("parity-{}", "fid-{}", *(f"fid-{{}}-{name}" for name in manifest.decoders))
    reports = [f"parity/{kind.format(p)}.json" for kind in kinds for p in manifest.precisions]
    return [*BESIDE, *reports]


def _is_there(place: Path, size: int) -> bool:
    return place.is_file() and place.stat().st_size == size


def _copy(source: Path, place: Path) -> None:
    """A plain file: onnx and OpenVINO refuse weights behind a link, whether symbolic or hard."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(place) as stream, source.open("rb") as content:
        shutil.copyfileobj(content, stream)
