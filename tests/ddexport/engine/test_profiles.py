"""The sizes of a teacher's engine: every pass that the runtime's loop makes, and no more than that needs."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddexport.runtime.engines import Profile, SizeRange
from ddexport.runtime.manifest import (
    FileInfo,
    Graph,
    ImageSize,
    Manifest,
    Schedule,
    SequenceSize,
    Span,
    Teacher,
    contract,
    read_manifest,
)
from ddexport.runtime.schedules import moved
from ddexport.runtime.teacher import draw

from ddexport.engine.build import key_parts
from ddexport.engine.builder import _add_profile
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions
from ddexport.engine.profiles import profiles_for

_spec = importlib.util.spec_from_file_location("fake_tensorrt", Path(__file__).with_name("fake_tensorrt.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

BATCHES = (Profile(1, 4, 8), Profile(16, 16, 16))
SCALES = (0, 1, 5, 14, 30, 55, 91, 155, 255, 424, 680)
VAR_D16 = {
    1: Schedule((0,)),
    3: Schedule((0, 55), 55, Span(30, 55)),
    4: Schedule((0, 55), 255, Span(14, 55)),
    6: Schedule((55,), 424, Span(0, 55)),
}
LLAMAGEN = {2: Schedule((0, 80)), 22: Schedule((0, 80), 180, Span(60, 80))}


def teacher_of(starts: tuple[int, ...]) -> Teacher:
    return Teacher(
        starts=starts,
        layers=1,
        heads=2,
        head_width=4,
        guidance="constant",
        cfg=1.0,
        top_k=1,
        top_p=1.0,
        temperature=1.0,
        codebook=FileInfo("codebook.npy", "0" * 64, 1),
    )


@pytest.fixture
def with_teacher(toy_bundle: Any) -> Any:
    """`with_teacher(starts, schedules)`: a manifest, and its teacher's graph."""

    def make(starts: tuple[int, ...], schedules: dict[int, Schedule]) -> tuple[Manifest, Graph]:
        teacher, length = teacher_of(starts), starts[-1]
        sequence = SequenceSize(length=length, width=4, codebook=8, split=1)
        tensors = contract("teacher", sequence, ImageSize(8, 8, 3), teacher)
        graph = Graph("teacher", "fp32", "teacher.onnx", (), *tensors)
        manifest = read_manifest(toy_bundle(precisions=("fp32",)))
        return dataclasses.replace(
            manifest,
            sequence=sequence,
            schedules=schedules,
            teacher=teacher,
            graphs=(*manifest.graphs, graph),
        ), graph

    return make


@pytest.mark.parametrize(
    ("starts", "schedules", "new", "capacity"),
    [
        # The passes have 55; 30, 25; 1, 4, 9, 16, 25; and the ten scales: of all the median.
        (SCALES, VAR_D16, (1, 25, 680), (55, 680, 680)),
        (tuple(range(257)), LLAMAGEN, (1, 1, 256), (80, 256, 256)),
        (tuple(range(257)), {1: Schedule((0,))}, (1, 1, 256), (256, 256, 256)),
    ],
)
def test_ranges_come_from_the_schedules(
    with_teacher: Any, starts: Any, schedules: Any, new: Any, capacity: Any
) -> None:
    """Smallest, typical, largest; the teacher alone is among them though it is in no schedule."""
    manifest, graph = with_teacher(starts, schedules)
    others = (SizeRange("new", *new), SizeRange("capacity", *capacity))
    assert profiles_for(graph, manifest, BATCHES) == (
        Profile(1, 4, 8, others),
        Profile(16, 16, 16, others),
    )
    assert profiles_for(manifest.graph("student"), manifest, BATCHES) == BATCHES


@pytest.mark.parametrize(("starts", "schedules"), [(SCALES, VAR_D16), (tuple(range(257)), LLAMAGEN)])
def test_every_pass_of_every_request_is_within(with_teacher: Any, starts: Any, schedules: Any) -> None:
    """The very sizes that the loop feeds, from every start that a request may choose; all ends are met."""
    manifest, graph = with_teacher(starts, schedules)
    teacher, (profile,) = manifest.teacher, profiles_for(graph, manifest, BATCHES[:1])
    seen: set[tuple[int, int]] = set()

    def run(feeds: Any) -> dict[str, Any]:
        new, capacity = len(feeds["positions"]), feeds["key_0"].shape[3]
        seen.add((new, capacity))
        rows = np.zeros((2, 1, teacher.heads, new, teacher.head_width), np.float32)
        return {"logits": np.zeros((1, new, 8), np.float32), "new_key_0": rows, "new_value_0": rows}

    def pick(logits: Any, positions: slice) -> Any:
        return np.zeros((1, positions.stop - positions.start), np.int64)

    for steps in (*schedules, "teacher"):
        schedule = manifest.schedule(steps)
        if schedule.teacher is None:
            continue
        for start in (0, *(each for each in starts[-20:] if 0 < each < schedule.teacher.end)):
            span = moved(schedule, teacher, start).teacher
            draw(run, teacher, span, np.zeros((1, start), np.int64), np.zeros(1, np.int64), 1.0, pick)
    for name, sizes in zip(("new", "capacity"), zip(*seen, strict=True), strict=True):
        least, _, most = profile.range_of(name)
        assert (min(sizes), max(sizes)) == (least, most)
    assert profile.range_of("capacity")[0] >= 1, "TensorRT was never asked for an empty cache"


def test_every_input_gets_its_sizes(with_teacher: Any) -> None:
    """The batch is the second axis of a cache, and not in every input."""
    manifest, graph = with_teacher(SCALES, VAR_D16)
    (profile,) = profiles_for(graph, manifest, BATCHES[:1])
    config = fake.Config()
    _add_profile(fake.fake_tensorrt("11.4.0.106").Builder(None), config, graph, profile)
    shapes = config.profiles[0]
    assert shapes["tokens"] == ((1, 680), (4, 680), (8, 680))
    assert shapes["positions"] == ((1,), (25,), (680,))
    assert shapes["filled"] == ((1,), (1,), (1,))
    assert shapes["key_0"] == ((2, 1, 2, 55, 4), (2, 4, 2, 680, 4), (2, 8, 2, 680, 4))
    assert shapes["value_0"] == shapes["key_0"]
    assert shapes.keys() == {spec.name for spec in graph.inputs}


def test_the_sizes_are_part_of_the_key(with_teacher: Any) -> None:
    """Another schedule is another engine of the same graph; students keep the keys that they had."""
    manifest, graph = with_teacher(SCALES, VAR_D16)
    rtx = TensorRT("tensorrt-rtx", None, "1.7.1.116", None)

    def parts(graph: Graph, manifest: Manifest) -> dict[str, Any]:
        options = BuildOptions(profiles=profiles_for(graph, manifest, BATCHES))
        return key_parts(graph, rtx, options, ("default",))

    fewer = dataclasses.replace(manifest, schedules={1: Schedule((0,))})
    assert parts(graph, manifest) != parts(graph, fewer)
    assert parts(manifest.graph("student"), manifest)["profiles"] == [[1, 4, 8], [16, 16, 16]]
