"""The int8 graphs of a bundle: files, weights that are shared, the same bytes again, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec import structs

from ddexport.card import read_accuracy
from ddexport.export import Exported, WeightRequest, export_bundle
from ddexport.precision.cast import PrecisionError
from ddexport.quantize.graphs import check_int8, int8_graphs
from ddexport.recipe import Limits, Recipe
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import VerificationError
from ddexport.runtime.pipeline import load

LIMITS = Limits(token_margin=100.0, embedding_error=1.0, image_psnr=5.0, image_max=255)
TIGHT = Limits(token_margin=1e-6, embedding_error=1e-6, image_psnr=150.0, image_max=0)
NEW = ["decoder_int8.onnx", "student_int8.onnx", "student_int8.onnx.data", "student_split9_int8.onnx"]


def test_graphs_of_a_folder(golden_bundle: Path, golden_recipe: Recipe, tmp_path: Path) -> None:
    """One file holds the weights of all students, and a split that was never run itself has the scales of
    the plain student, whatever its values are called. A second run gives the same bytes; neither a temporary
    file, nor a path of this machine, is left in a bundle."""
    for name in ("student.onnx", "decoder.onnx"):
        shutil.copyfile(golden_bundle / name, tmp_path / name)
    student, decoder = read_manifest(golden_bundle, verify=False).graphs
    renamed = onnx.compose.add_prefix(
        onnx.load(tmp_path / "student.onnx"), "b_", rename_inputs=False, rename_outputs=False
    )
    onnx.save(renamed, tmp_path / "student_split9.onnx")
    split = structs.replace(student, split=9, file="student_split9.onnx")
    teacher = structs.replace(decoder, role="teacher", file="missing.onnx")
    before, contents = set(tmp_path.iterdir()), []
    for _ in range(2):
        graphs = int8_graphs(
            tmp_path, [student, decoder, split, teacher], golden_recipe, 2, lambda name: nullcontext()
        )
        new = sorted(set(tmp_path.iterdir()) - before)
        contents.append([path.read_bytes() for path in new])
    assert [path.name for path in new] == NEW
    assert contents[0] == contents[1]
    assert not any(str(tmp_path.parent).encode() in content for content in contents[0])
    assert [(g.role, g.split, g.precision, [info.file for info in g.files]) for g in graphs] == [
        ("student", None, "int8", [NEW[1], NEW[2]]),
        ("decoder", None, "int8", [NEW[0]]),
        ("student", 9, "int8", [NEW[3], NEW[2]]),
    ]
    for graph in graphs:
        assert all(info.bytes == (tmp_path / info.file).stat().st_size for info in graph.files)
    plain, other = (onnx.load(tmp_path / name).graph.initializer for name in (NEW[1], NEW[3]))
    assert sorted(t.raw_data for t in plain) == sorted(t.raw_data for t in other)
    assert (tmp_path / NEW[2]).stat().st_size < 0.6 * (tmp_path / "student.onnx").stat().st_size
    said = {entry.key: entry.value for entry in onnx.load(tmp_path / NEW[0]).metadata_props}
    assert (said["precision"], said["role"]) == ("int8", "decoder")
    assert said["calibration"].startswith("2 images of noise, seed ")


@pytest.fixture
def export(
    replayed_trace: object, golden_files: dict[str, Path], golden_recipe: Recipe, tmp_path: Path
) -> Callable[..., Exported]:
    """export(limits, precisions): the golden bundle with int8 graphs, calibrated on one image."""

    def make(limits: Limits, *precisions: str) -> Exported:
        recipe = structs.replace(golden_recipe, parity=structs.replace(golden_recipe.parity, int8=limits))
        request = WeightRequest(golden_files)
        return export_bundle(recipe, tmp_path / "bundle", request, precisions=precisions, calibration=1)

    return make


def test_a_bundle_of_both_precisions_runs(export: Callable[..., Exported]) -> None:
    """float32 stays the default; int8 is another arithmetic, close to it, and its accuracy is on record."""
    exported = export(LIMITS, "int8", "fp32")
    assert exported.manifest.precisions == ("fp32", "int8")
    for role in ("student", "decoder"):
        accuracy = read_accuracy(exported.path)[exported.manifest.graph(role, "int8").file]
        assert accuracy["engine"] == "onnxruntime"
        assert {row["batch"] for row in accuracy["errors"]} == {1, 3}
        assert accuracy["weights"]["int8"] > accuracy["weights"]["fp32"] > 0
    images = {}
    for precision in ("fp32", "int8"):
        with load(exported.path, "onnxruntime", 1, precision) as pipe:
            assert pipe.precision == pipe.backend.configuration.graphs == precision
            images[precision] = np.asarray(pipe(3, 2, seed=5, output="sequence").images)
    different = np.abs(images["int8"] - images["fp32"])
    assert 0 < different.mean() < 0.5 * np.abs(images["fp32"]).mean()


def test_int8_alone_leaves_no_float_graph(export: Callable[..., Exported], tmp_path: Path) -> None:
    """And nothing at all where a graph is past its limits."""
    with pytest.raises(VerificationError, match=r"student_int8\.onnx"):
        export(TIGHT, "int8")
    assert list(tmp_path.iterdir()) == []
    exported = export(LIMITS, "int8")
    assert {path.name for path in exported.path.glob("*.onnx*")} == {"student_int8.onnx", "decoder_int8.onnx"}
    assert read_manifest(exported.path, verify=True).precisions == ("int8",)


def test_what_is_refused_before_anything_is_traced() -> None:
    """A teacher without float32."""
    parts = ["student", "tokenizer", "teacher"]
    check_int8(parts, 64, keep_float=True)
    with pytest.raises(PrecisionError):
        check_int8(parts, 64, keep_float=False)
