"""Schedules that involve a teacher: what they mean, and one test for each way to contradict oneself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ddexport.runtime.errors import BundleError, ScheduleError
from ddexport.runtime.manifest import Manifest, Schedule, Span, read_manifest
from ddexport.runtime.schedules import moved

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def manifest(shared_teacher_bundle: Path) -> Manifest:
    return read_manifest(shared_teacher_bundle)


def test_reading_and_writing_give_the_same_manifest(shared_teacher_bundle: Path) -> None:
    manifest = read_manifest(shared_teacher_bundle)
    assert manifest.to_json() == (shared_teacher_bundle / "bundle.json").read_text()
    assert manifest.schedules[3] == Schedule((0, 4), 2, Span(2, 4))
    assert manifest.schedules[2] == Schedule((0, 4), 4)
    assert manifest.graph("student", split=4).key == "student@4"
    assert manifest.graph("student", split=2).file == manifest.graph("student").file == "student.onnx"
    assert manifest.graph("teacher").inputs[5].shape == (2, "batch", 1, "capacity", 2)
    assert "codebook.npy" in [info.file for info in manifest.files()]


def test_a_bundle_without_a_teacher_says_nothing_of_one(shared_bundle: Path) -> None:
    """Its manifest has none of the keys that older runtimes do not know."""
    text = (shared_bundle / "bundle.json").read_text()
    assert "teacher" not in text
    assert text.count('"split"') == 1  # of the sequence
    with pytest.raises(ScheduleError, match="no schedule of teacher steps") as caught:
        read_manifest(shared_bundle).schedule("teacher")
    assert caught.value.hint == "It can draw in: 1, 2, 3."


def test_what_runs_before_and_after_the_teacher(manifest: Manifest) -> None:
    cases = {
        Schedule((0, 4)): ((0, 4), (), 2),
        Schedule((0, 4), None, Span(2, 4)): ((0,), (4,), 3),
        Schedule((4,), None, Span(0, 4)): ((), (4,), 4),
        Schedule((0,), None, Span(2, 6)): ((0,), (), 3),
        Schedule((), None, Span(0, 6)): ((), (), 4),
    }
    for schedule, (before, after, steps) in cases.items():
        assert (schedule.before, schedule.after) == (before, after)
        assert manifest.number_of_steps(schedule) == steps
    assert manifest.schedule("teacher") == Schedule((), None, Span(0, 6))


def test_another_start_gives_another_number_of_steps(manifest: Manifest) -> None:
    teacher, three = manifest.teacher, manifest.schedules[3]
    assert moved(three, teacher, 1) == Schedule((0, 4), 2, Span(1, 4))
    assert moved(three, teacher, 0) == Schedule((4,), 2, Span(0, 4))
    assert moved(manifest.schedules[4], teacher, 2) == Schedule((0, 4), 4, Span(2, 4))
    assert moved(manifest.schedule("teacher"), teacher, 4) == Schedule((0,), None, Span(4, 6))
    for start in (3, 4, 9):
        with pytest.raises(ScheduleError, match=f"cannot start at position {start}") as caught:
            moved(three, teacher, start)
        assert caught.value.hint == "It can start at: 0, 1, 2."
    with pytest.raises(ScheduleError, match="schedules that involve the teacher"):
        moved(manifest.schedules[1], teacher, 0)


def drop(content: dict[str, Any], key: str) -> None:
    """Removes the graphs of a key."""
    role, _, split = key.partition("@")
    content["graphs"] = [
        graph for graph in content["graphs"] if graph["role"] != role or str(graph.get("split", "")) != split
    ]


LIES: list[tuple[str, Edit]] = [
    ("schedules.3 involves a teacher, and the bundle has none", lambda c: c.update(teacher=None)),
    ("schedules.3.known must be [0, 4] around that teacher", lambda c: c["schedules"]["3"].update(known=[0])),
    ("schedules.4.known must be [4] around", lambda c: c["schedules"]["4"].update(known=[0, 4])),
    ("schedules.5 has 3 steps", lambda c: c["schedules"].update({"5": c["schedules"]["3"]})),
    (
        "schedules.3.teacher must go from one AR step's start to a later one's, not 3 to 4",
        lambda c: c["schedules"]["3"].update(teacher={"start": 3, "end": 4}),
    ),
    ("not 4 to 2", lambda c: c["schedules"]["3"].update(teacher={"start": 4, "end": 2})),
    ("schedules.3.split must be from 1 to 6", lambda c: c["schedules"]["3"].update(split=7)),
    (
        "an unknown key schedules.3.teacher.stop",
        lambda c: c["schedules"]["3"]["teacher"].update(stop=3),
    ),
    ("teacher.starts must rise from 0 to 6", lambda c: c["teacher"].update(starts=[0, 2, 2, 6])),
    ("teacher.starts must rise from 0 to 6", lambda c: c["teacher"].update(starts=[0, 2, 4])),
    ("teacher.layers must be at least 1", lambda c: c["teacher"].update(layers=0)),
    ("teacher.guidance is 'falling'", lambda c: c["teacher"].update(guidance="falling")),
    ("teacher must have cfg of at least 0", lambda c: c["teacher"].update(top_p=1.5)),
    ("teacher.cfg must be float", lambda c: c["teacher"].update(cfg="much")),
    ("teacher.cfg must be float, but is 1000", lambda c: c["teacher"].update(cfg=10**400)),
    ("graphs[2].inputs has no caches for 1000000000000 layers", lambda c: c["teacher"].update(layers=10**12)),
    ("bundle.json lacks the key teacher.codebook", lambda c: c["teacher"].pop("codebook")),
    ("graphs lacks the teacher in fp32", lambda c: drop(c, "teacher")),
    ("graphs lacks the student@4 in fp32", lambda c: drop(c, "student@4")),
    ("graphs[2].inputs must be", lambda c: c["teacher"].update(layers=2)),
    ("graphs[3].outputs must be", lambda c: c["graphs"][3].update(split=3)),
    ("graphs[3].split is for students whose split", lambda c: c["graphs"][3].update(split=2)),
    ("graphs[2].split is for students", lambda c: c["graphs"][2].update(split=4)),
    ("graphs lists one role and precision twice", lambda c: c["graphs"].append(c["graphs"][3])),
]


@pytest.mark.parametrize(("message", "edit"), LIES, ids=[message for message, _ in LIES])
def test_a_lie_about_the_teacher_is_refused(message: str, edit: Edit, teacher_bundle: Path) -> None:
    path = teacher_bundle / "bundle.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError) as caught:
        read_manifest(teacher_bundle)
    assert message in caught.value.message


def test_an_integer_is_a_number_too(teacher_bundle: Path) -> None:
    """Other writers of JSON have one kind of number."""
    path = teacher_bundle / "bundle.json"
    path.write_text(path.read_text().replace('"cfg": 2.0', '"cfg": 2'))
    teacher = read_manifest(teacher_bundle).teacher
    assert teacher is not None
    assert isinstance(teacher.cfg, float)
    assert teacher == dataclasses.replace(teacher, cfg=2.0)


def test_a_damaged_codebook_is_seen(teacher_bundle: Path) -> None:
    path = teacher_bundle / "codebook.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"SHA-256 of codebook\.npy"):
        read_manifest(teacher_bundle)
