"""One row for each lie a bundle can tell; the bundle of the fixture itself is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from ddexport.runtime import bundle as module
from ddexport.runtime.bundle import FILE_NAME, read_manifest
from ddexport.runtime.errors import BundleError, ScheduleError
from ddexport.runtime.schedule import Schedule, Span, schedule_fault

DOCS = Path(__file__).parents[2] / "docs"
GONE = object()


def refused(root: Path, *named: str, verify: bool = True) -> BundleError:
    """The error about a bundle, which has to name these things and to end the command with 1."""
    with pytest.raises(BundleError) as caught:
        read_manifest(root, verify)
    assert all(name in caught.value.message for name in named), (named, caught.value.message)
    assert caught.value.exit_code == 1 and caught.value.hint
    return caught.value


def change(root: Path, path: str, value: Any) -> None:
    """Puts a value at a dotted path of the manifest, or what a function makes of the one there."""
    content = node = json.loads((root / FILE_NAME).read_text())
    keys = path.split(".")
    *parents, last = [int(key) if key.isdecimal() and keys[0] == "graphs" else key for key in keys]
    for part in parents:
        node = node[part]
    if value is GONE:
        del node[last]
    else:
        node[last] = value(node[last]) if callable(value) else value
    (root / FILE_NAME).write_text(json.dumps(content))


def test_reading_and_writing_give_the_same_manifest(shared_bundle: Path, shared_teacher_bundle: Path) -> None:
    for root in (shared_bundle, shared_teacher_bundle):
        manifest = read_manifest(root)
        assert manifest.to_json() == (root / FILE_NAME).read_text()
    assert manifest.schedules[3] == Schedule(known=(0, 4), split=2, teacher=Span(start=2, end=4))
    assert manifest.graph("student", split=4).file == "student_split4.onnx"
    assert manifest.graph("student", "fp32", 2) is manifest.graph("student")
    assert {info.file for info in manifest.files()} == {
        "labels.json", "student.onnx", "student_split4.onnx", "decoder.onnx", "teacher.onnx", "codebook.npy"
    }  # fmt: skip
    assert "teacher" not in (shared_bundle / FILE_NAME).read_text()


def test_every_key_of_the_format_pages_is_a_field_and_the_reverse() -> None:
    """The examples of docs/ are the format: they have the keys that the runtime reads."""
    pages = [page.read_text() for page in sorted(DOCS.glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    (bundle,) = (json.loads(block) for block in blocks if '"sequence"' in block and '"graphs"' in block)
    (teacher,) = (json.loads(block)["teacher"] for block in blocks if '"starts"' in block)
    (text,) = (json.loads(block)["text"] for block in blocks if '"tokenizer"' in block)
    manifest = bundle | {"teacher": 0, "text": 0}
    for keys, record in ((manifest, module.Manifest), (teacher, module.Teacher), (text, module.Text)):
        assert set(keys) == {field.name for field in msgspec.structs.fields(record)}
    assert set(bundle["graphs"][0]) <= {field.name for field in msgspec.structs.fields(module.Graph)}
    assert bundle["schema"] == 2


def test_what_is_no_manifest(bundle: Path, tmp_path: Path) -> None:
    """Another schema says what to do, also when it has keys that this one does not know, or lacks some."""
    change(bundle, "titel", "A toy")
    assert "title" in refused(bundle).hint
    for schema, remedy in ((3, "pip install"), (1, "ddexport onnx")):
        change(bundle, "schema", schema)
        assert remedy in refused(bundle, f"schema {schema}").hint
    big = b" " * (9 << 20)
    for text in (b"{", b'{"schema": NaN}', b"\xff", b"[1]", b"[" * 100_000, b'{"a": 1, "a": 1}', big):
        (bundle / FILE_NAME).write_bytes(text)
        refused(bundle, "bundle.json")
    (tmp_path / "file").touch()
    for name in ("", "nowhere", "file"):
        refused(tmp_path / name, "not a bundle", str(tmp_path / name))


# Where in the manifest of the toy with a teacher, what stands there, and what the error names.
LIES: list[tuple[str, Any, str]] = [
    ("graphs.1.files.0.sha256", GONE, "`graphs[1].files[0]`"),
    ("sequence.depth", 1, "`depth` - at `sequence`"),
    ("classes", "3", "`classes`"),
    ("classes", 0, "`classes`"),
    ("schema", "2", "`schema`"),
    ("sequence.split", 7, "sequence.split"),
    ("schedules", {}, "schedules"),
    ("schedules.two", {"known": [0, 2]}, "schedules"),
    ("schedules." + "1" * 5000, {"known": [0]}, "schedules"),
    ("schedules.2.known", [0], "schedules.2.known"),
    ("schedules.2.known", [1, 4], "schedules.2.known"),
    ("schedules.2.known", [0, 6], "schedules.2.known"),
    ("schedules.2.known", [0, -1], "`schedules.2.known[1]`"),
    ("schedules.3", {"known": [0, 2, 2]}, "schedules.3.known"),
    ("weights.kind", "guess", "`weights.kind`"),
    ("graphs.1", GONE, "decoder"),
    ("graphs", lambda graphs: [*graphs, graphs[3]], "twice"),
    ("graphs.0.files", [], "graphs[0].files"),
    ("teacher", GONE, "schedules.3 involves a teacher"),
    ("schedules.3.known", [0], "schedules.3.known must be [0, 4]"),
    ("schedules.4.known", [0, 4], "schedules.4.known must be [4]"),
    ("schedules", lambda schedules: schedules | {"5": schedules["3"]}, "schedules.5 has 3 steps"),
    ("schedules.3.teacher", {"start": 3, "end": 4}, "3 to 4"),
    ("schedules.3.teacher", {"start": 4, "end": 2}, "4 to 2"),
    ("schedules.3.split", 7, "schedules.3.split"),
    ("schedules.3.teacher.stop", 3, "`schedules.3.teacher`"),
    ("teacher.starts", [0, 2, 2, 6], "teacher.starts"),
    ("teacher.starts", [0, 2, 4], "teacher.starts"),
    ("teacher.starts", [1, 6], "teacher.starts"),
    ("teacher.starts", [], "teacher.starts"),
    ("teacher.guidance", "falling", "`teacher.guidance`"),
    ("teacher.cfg", -0.5, "`teacher.cfg`"),
    ("teacher.cfg", 10**400, "teacher.cfg"),
    ("teacher.top_p", 1.5, "`teacher.top_p`"),
    ("teacher.top_p", 0, "`teacher.top_p`"),
    ("teacher.temperature", 0, "`teacher.temperature`"),
    ("graphs.2", GONE, "teacher in fp32"),
    ("graphs.3", GONE, "student of split 4 in fp32"),
    ("graphs.3.split", 2, "graphs[3].split"),
    ("graphs.2.split", 4, "graphs[2].split"),
]  # fmt: skip


def test_a_lie_in_the_manifest_is_named(teacher_bundle: Path) -> None:
    true = (teacher_bundle / FILE_NAME).read_bytes()
    for path, value, named in LIES:
        (teacher_bundle / FILE_NAME).write_bytes(true)
        change(teacher_bundle, path, value)
        refused(teacher_bundle, named, verify=False)
    (teacher_bundle / FILE_NAME).write_bytes(true)
    change(teacher_bundle, "teacher.cfg", 2)  # other writers of JSON have one kind of number
    assert isinstance(read_manifest(teacher_bundle).teacher.cfg, float)  # type: ignore[union-attr]


def test_nothing_outside_the_bundle_is_read(bundle: Path) -> None:
    """Nor is half a character, which JSON can write, and no terminal can print."""
    for path in ("/etc/passwd", "../x", "a/../../x", "", "C:\\x", "..\\x"):
        change(bundle, "labels.file", path)
        refused(bundle, "outside the bundle", repr(path))
    for name in ("\0", "a" * 300, "missing"):
        change(bundle, "labels.file", name)
        refused(bundle, "lacks", repr(name))
    for place in ("labels.file", "name", "published.\ud800"):
        change(bundle, place, "\ud800")
        refused(bundle, "surrogates")


def test_links_of_the_hubs_cache_are_followed_and_hashed(bundle: Path, tmp_path: Path) -> None:
    """Even where hashes are not asked for: a link may lead to any file."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in [path for path in bundle.iterdir() if path.is_file()]:
        path.symlink_to(path.rename(blobs / path.name))
    assert read_manifest(bundle, verify=False).labels.file == "labels.json"
    content = (blobs / "labels.json").read_bytes()
    (blobs / "labels.json").write_bytes(b" " * len(content))
    refused(bundle, "labels.json", verify=False)


def test_a_changed_file_is_named(teacher_bundle: Path) -> None:
    """One changed bit is seen unless verification is off; another size is seen always."""
    for name in ("student.onnx", "codebook.npy"):
        whole = (teacher_bundle / name).read_bytes()
        (teacher_bundle / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused(teacher_bundle, "SHA-256", name)
        assert read_manifest(teacher_bundle, verify=False).name == "toy"
        (teacher_bundle / name).write_bytes(whole[:-1])
        for verify in (True, False):
            refused(teacher_bundle, name, str(len(whole)), str(len(whole) - 1), verify=verify)
        (teacher_bundle / name).write_bytes(whole)


# Schedules


def test_which_schedules_and_graphs_there_are(shared_bundle: Path, shared_teacher_bundle: Path) -> None:
    plain, taught = read_manifest(shared_bundle), read_manifest(shared_teacher_bundle)
    assert plain.schedule().known == (0,)
    counts = [taught.number_of_steps(schedule) for schedule in taught.schedules.values()]
    one, whole = Schedule(known=(0,), teacher=Span(start=2, end=6)), taught.schedule("teacher")
    assert [*counts, taught.number_of_steps(one), taught.number_of_steps(whole)] == [1, 2, 3, 4, 3, 4]
    assert whole == Schedule(known=(), teacher=Span(start=0, end=6))
    for manifest, steps, have in (
        *((plain, steps, ": 1, 2, 3.") for steps in (4, 0, True, "teacher")),
        (taught, "student", ": 1, 2, 3, 4, teacher."),
    ):
        with pytest.raises(ScheduleError, match=f"{steps} steps") as missing:
            manifest.schedule(steps)
        assert have in missing.value.hint
    for split in (None, 4):
        with pytest.raises(BundleError, match="int8") as absent:
            taught.graph("student", "int8", split)
        assert "fp32" in absent.value.hint


def test_another_start_gives_another_schedule(shared_teacher_bundle: Path) -> None:
    """A recipe follows the same rules before its teacher is known: the starts come from the checkpoint."""
    manifest = read_manifest(shared_teacher_bundle)
    teacher, three, four = manifest.teacher, manifest.schedules[3], manifest.schedules[4]
    rows = [
        (three, 1, Schedule(known=(0, 4), split=2, teacher=Span(start=1, end=4))),
        (three, 0, Schedule(known=(4,), split=2, teacher=Span(start=0, end=4))),
        (four, 2, Schedule(known=(0, 4), split=4, teacher=Span(start=2, end=4))),
        (manifest.schedule("teacher"), 4, Schedule(known=(0,), teacher=Span(start=4, end=6))),
    ]
    for schedule, start, expected in rows:
        assert schedule.with_teacher_start(teacher, start) == expected
    for start in (3, 4, 9):
        with pytest.raises(ScheduleError, match=str(start)) as caught:
            three.with_teacher_start(teacher, start)
        assert ": 0, 1, 2." in caught.value.hint
    with pytest.raises(ScheduleError):
        manifest.schedules[1].with_teacher_start(teacher, 0)
    around = Schedule(known=(0, 4), teacher=Span(start=2, end=4))
    assert schedule_fault(9, around, 6, None) == schedule_fault(1, Schedule(known=(0,)), 6, None) == ""
    assert "[0, 4]" in schedule_fault(9, replace(around, known=(4,)), 6, None)
    assert "2 to 7" in schedule_fault(3, replace(around, teacher=Span(start=2, end=7)), 6, None)
