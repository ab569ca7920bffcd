"""One test for each lie a bundle can tell; the bundle of the fixture itself is true."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ddexport.runtime.errors import BundleError, ScheduleError
from ddexport.runtime.manifest import FILE_NAME, SCHEMA, Teacher, file_info, read_manifest

Edit = Callable[[dict[str, Any]], object]
EditManifest = Callable[[Edit], None]


def refused(bundle: Path, verify: bool = True) -> BundleError:
    with pytest.raises(BundleError) as caught:
        read_manifest(bundle, verify)
    assert caught.value.exit_code == 1
    assert caught.value.hint
    return caught.value


def test_reading_and_writing_give_the_same_manifest(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    text = manifest.to_json()
    assert text == (bundle / FILE_NAME).read_text()
    assert next(iter(json.loads(text))) == "schema"
    assert manifest.schedules[2].known == (0, 2)
    assert manifest.graph("decoder").file == "decoder.onnx"
    assert manifest.graph("student", "fp32").outputs[1].shape == ("batch", 2, 5)
    assert manifest.licence == {"weights": "Apache-2.0"}


def test_every_key_of_the_format_page_is_a_field_and_the_reverse(bundle: Path) -> None:
    """docs/bundle.md is the format: its example has the keys that the runtime reads, docs/teacher.md adds
    those of a bundle with a teacher."""
    example: dict[str, Any] = {}
    for name in ("bundle.md", "teacher.md"):
        page = (Path(__file__).parents[2] / "docs" / name).read_text()
        example |= json.loads(page.split("```json\n")[1].split("```")[0])
    assert set(example) == {field.name for field in dataclasses.fields(read_manifest(bundle))}
    keys = {field.name for field in dataclasses.fields(Teacher)}
    assert set(example["teacher"]) == keys


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    assert "has no bundle.json" in refused(tmp_path).message
    assert "not found" in refused(tmp_path / "nowhere").message
    (tmp_path / "file").touch()
    assert "is not a directory" in refused(tmp_path / "file").message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"schema": NaN}', "NaN is not JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1]", "the whole must be an object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"schema": 1, "schema": 1}', "stands twice"),
        (b" " * (8 << 20) + b"{}", "larger than 8 MiB"),
    ],
)
def test_a_malformed_manifest(bundle: Path, text: bytes, message: str) -> None:
    (bundle / FILE_NAME).write_bytes(text)
    assert message in refused(bundle).message


def test_a_newer_schema_asks_for_an_upgrade(bundle: Path, edit_manifest: EditManifest) -> None:
    """Also when the newer schema has keys that this one does not know."""
    edit_manifest(lambda m: m.update(schema=SCHEMA + 1, guidance={}))
    error = refused(bundle)
    assert f"has schema {SCHEMA + 1}, and this runtime reads up to {SCHEMA}" in error.message
    assert "pip install --upgrade" in error.hint


def set_graph(key: str, value: Any) -> Edit:
    return lambda m: m["graphs"][0].update({key: value})


LIES: list[tuple[Edit, str]] = [
    (lambda m: m.pop("classes"), "lacks the key classes"),
    (lambda m: m.pop("schema"), "lacks the key schema"),
    (lambda m: m["graphs"][1]["files"][0].pop("sha256"), "lacks the key graphs[1].files[0].sha256"),
    (lambda m: m.update(clases=3), "unknown key clases"),
    (lambda m: m["sequence"].update(depth=1), "unknown key sequence.depth"),
    (lambda m: m.update(classes="3"), 'classes must be int, but is "3"'),
    (lambda m: m.update(classes=True), "classes must be int, but is true"),
    (lambda m: m.update(classes=0), "classes must be at least 1"),
    (lambda m: m.update(schema=0), "schema must be at least 1"),
    (lambda m: m.update(graphs={}), "graphs must be a list"),
    (lambda m: m.update(schedules=[]), "schedules must be an object"),
    (lambda m: m["sequence"].update(width=-4), "sequence.width must be at least 1"),
    (lambda m: m["sequence"].update(split=7), "sequence.split is 7, past the length 6"),
    (lambda m: m.update(schedules={}), "schedules is empty"),
    (lambda m: m["schedules"].update(two={"known": [0, 2]}), "the key 'two', which is no number"),
    (lambda m: m["schedules"].update({"1" * 5000: {"known": [0]}}), "which is no number"),
    (lambda m: m["schedules"]["2"].update(known=[0]), "schedules.2.known must be 2 rising numbers"),
    (lambda m: m["schedules"]["2"].update(known=[1, 2]), "schedules.2.known must be"),
    (lambda m: m["schedules"]["2"].update(known=[0, 6]), "schedules.2.known must be"),
    (lambda m: m["schedules"]["3"].update(known=[0, 2, 2]), "schedules.3.known must be"),
    (lambda m: m["schedules"].update({"0": {"known": []}}), "schedules.0.known must be"),
    (lambda m: m["weights"].update(kind="guess"), "weights.kind is 'guess'"),
    (lambda m: m["weights"].update(seed="x"), "weights.seed must be int or NoneType"),
    (lambda m: m["graphs"].pop(), "graphs needs a student and a decoder"),
    (lambda m: m["graphs"].append(m["graphs"][0]), "lists one role and precision twice"),
    (lambda m: m["graphs"].append({**m["graphs"][0], "role": "x"}), "graphs[2].role is 'x'"),
    (set_graph("files", []), "graphs[0].files does not list student.onnx"),
    (set_graph("outputs", []), "graphs[0].outputs must be sequence float32['batch', 6, 4]"),
    (lambda m: m["graphs"][0]["inputs"][0].update(dtype="float16"), "graphs[0].inputs must be"),
    (lambda m: m["image"].update(height=9), "graphs[1].outputs must be"),
]


@pytest.mark.parametrize(("edit", "message"), LIES, ids=[message for _, message in LIES])
def test_a_lie_in_the_manifest_is_named(
    edit: Edit, message: str, bundle: Path, edit_manifest: EditManifest
) -> None:
    edit_manifest(edit)
    assert message in refused(bundle, verify=False).message


def test_a_mistyped_key_suggests_the_right_one(bundle: Path, edit_manifest: EditManifest) -> None:
    edit_manifest(lambda m: m.update(titel=m["title"]))
    assert refused(bundle).hint == "Did you mean title?"


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", "C:\\x", "..\\x"])
def test_a_path_outside_the_bundle(path: str, bundle: Path, edit_manifest: EditManifest) -> None:
    edit_manifest(lambda m: m["labels"].update(file=path))
    error = refused(bundle)
    assert "outside the bundle" in error.message
    assert repr(path) in error.message


def test_a_link_that_leaves_the_bundle(bundle: Path, tmp_path: Path) -> None:
    """Even to a file with the right content."""
    moved = (bundle / "labels.json").rename(tmp_path / "elsewhere.json")
    (bundle / "labels.json").symlink_to(moved)
    assert "outside the bundle: 'labels.json'" in refused(bundle).message


def test_a_link_within_the_bundle_is_fine(bundle: Path) -> None:
    (bundle / "labels.json").rename(bundle / "real.json")
    (bundle / "labels.json").symlink_to("real.json")
    assert read_manifest(bundle).labels.file == "labels.json"


@pytest.mark.parametrize("name", ["\0", "\ud800", "a" * 300])
def test_a_name_that_no_file_can_have(name: str, bundle: Path, edit_manifest: EditManifest) -> None:
    edit_manifest(lambda m: m["labels"].update(file=name))
    assert f"lacks its file {name!r}" in refused(bundle).message


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_named(bundle: Path, verify: bool) -> None:
    (bundle / "decoder.onnx").unlink()
    assert "lacks its file decoder.onnx" in refused(bundle, verify).message


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_of_the_wrong_size_is_named(bundle: Path, verify: bool) -> None:
    size = (bundle / "decoder.onnx").stat().st_size
    os.truncate(bundle / "decoder.onnx", size - 1)
    message = refused(bundle, verify).message
    assert message == f"decoder.onnx has {size - 1} bytes, but bundle.json says {size}"


def test_one_changed_bit_is_found_unless_verification_is_off(bundle: Path) -> None:
    data = bytearray((bundle / "student.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "student.onnx").write_bytes(data)
    assert "the SHA-256 of student.onnx" in refused(bundle).message
    assert read_manifest(bundle, verify=False).name == "toy"


def test_a_step_count_without_a_schedule_lists_those_there_are(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.schedule().known == (0,)
    for steps in (4, 0, True):
        with pytest.raises(ScheduleError) as caught:
            manifest.schedule(steps)
        assert caught.value.message == f"toy has no schedule of {steps} steps"
        assert caught.value.hint == "It can draw in: 1, 2, 3."


def test_a_precision_that_is_not_there_lists_those_there_are(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no student in precision int8") as caught:
        read_manifest(bundle).graph("student", "int8")
    assert caught.value.hint == "It has: fp32."


def test_file_info_describes_a_file_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x").write_bytes(b"abc")
    info = file_info(tmp_path / "deep" / "x", tmp_path)
    assert (info.file, info.bytes) == ("deep/x", 3)
    assert info.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
