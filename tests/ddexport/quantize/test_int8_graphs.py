"""The int8 graphs of a bundle: files, weights that are shared, the same bytes again, and what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from msgspec import structs
from onnx import numpy_helper

from ddexport.card import read_accuracy
from ddexport.commands.onnx import command
from ddexport.export import WeightRequest, export_bundle
from ddexport.precision.cast import PrecisionError
from ddexport.quantize.graphs import check_int8, int8_graphs
from ddexport.recipe import Limits, Recipe
from ddexport.runtime.bundle import Graph, read_manifest
from ddexport.runtime.errors import VerificationError
from ddexport.runtime.pipeline import load

LIMITS = Limits(token_margin=100.0, embedding_error=1.0, image_psnr=5.0, image_max=255)
TIGHT = Limits(token_margin=1e-6, embedding_error=1e-6, image_psnr=150.0, image_max=0)


@pytest.fixture
def folder(golden_bundle: Path, tmp_path: Path) -> Path:
    """The float32 graphs of the golden bundle, and its student again under other names, as another split."""
    for name in ("student.onnx", "decoder.onnx"):
        shutil.copyfile(golden_bundle / name, tmp_path / name)
    other = onnx.compose.add_prefix(
        onnx.load(tmp_path / "student.onnx"), "b_", rename_inputs=False, rename_outputs=False
    )
    onnx.save(other, tmp_path / "student_split9.onnx")
    return tmp_path


def made(folder: Path, bundle: Path, recipe: Recipe, images: int = 2) -> list[Graph]:
    student, decoder = read_manifest(bundle, verify=False).graphs
    split = structs.replace(student, split=9, file="student_split9.onnx")
    teacher = structs.replace(decoder, role="teacher", file="missing.onnx")
    return int8_graphs(folder, [student, decoder, split, teacher], recipe, images, lambda name: nullcontext())


def arrays(path: Path) -> list[np.ndarray]:
    return [numpy_helper.to_array(t, str(path.parent)) for t in onnx.load(path).graph.initializer]


def test_students_share_their_weights_and_ranges(
    folder: Path, golden_bundle: Path, golden_recipe: Recipe
) -> None:
    """One file holds them, and a split that was never run itself has the scales of the plain student."""
    graphs = made(folder, golden_bundle, golden_recipe)
    assert [(g.role, g.split, g.precision) for g in graphs] == [
        ("student", None, "int8"), ("decoder", None, "int8"), ("student", 9, "int8"),
    ]  # fmt: skip
    assert [[info.file for info in g.files] for g in graphs] == [
        ["student_int8.onnx", "student_int8.onnx.data"],
        ["decoder_int8.onnx"],
        ["student_split9_int8.onnx", "student_int8.onnx.data"],
    ]
    for graph in graphs:
        assert [info.bytes for info in graph.files] == [(folder / i.file).stat().st_size for i in graph.files]
    plain, other = (arrays(folder / name) for name in ("student_int8.onnx", "student_split9_int8.onnx"))
    key = sorted(a.tobytes() for a in plain), sorted(a.tobytes() for a in other)
    assert key[0] == key[1]
    size = (folder / "student_int8.onnx.data").stat().st_size
    assert size < 0.6 * (folder / "student.onnx").stat().st_size


def test_two_runs_give_the_same_bytes_and_nothing_else(
    folder: Path, golden_bundle: Path, golden_recipe: Recipe
) -> None:
    """Neither a temporary file, nor a path or name of this machine, is left in a bundle."""
    before = set(folder.iterdir())
    made(folder, golden_bundle, golden_recipe)
    new = sorted(set(folder.iterdir()) - before)
    assert [path.name for path in new] == [
        "decoder_int8.onnx", "student_int8.onnx", "student_int8.onnx.data", "student_split9_int8.onnx",
    ]  # fmt: skip
    first = {path: path.read_bytes() for path in new}
    assert not any(str(folder.parent).encode() in content for content in first.values())
    made(folder, golden_bundle, golden_recipe)
    assert {path: path.read_bytes() for path in new} == first


def test_graphs_say_what_they_are(folder: Path, golden_bundle: Path, golden_recipe: Recipe) -> None:
    made(folder, golden_bundle, golden_recipe, images=3)
    model = onnx.load(folder / "decoder_int8.onnx", load_external_data=False)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["precision"] == "int8" and said["role"] == "decoder"
    assert said["calibration"].startswith("3 images of noise, seed ")


@pytest.fixture
def quantisable(golden_recipe: Recipe) -> Callable[[Limits], Recipe]:
    """The golden recipe with limits for int8."""
    return lambda limits: structs.replace(
        golden_recipe, parity=structs.replace(golden_recipe.parity, int8=limits)
    )


def test_a_bundle_of_both_precisions_runs(
    replayed_trace: object,
    golden_files: dict[str, Path],
    quantisable: Callable[[Limits], Recipe],
    tmp_path: Path,
) -> None:
    """float32 stays the default; int8 is another arithmetic, close to it, and its accuracy is on record."""
    target, recipe = tmp_path / "bundle", quantisable(LIMITS)
    exported = export_bundle(
        recipe, target, WeightRequest(golden_files), precisions=("int8", "fp32"), calibration=2
    )
    assert exported.manifest.precisions == ("fp32", "int8")
    for role in ("student", "decoder"):
        accuracy = read_accuracy(target)[exported.manifest.graph(role, "int8").file]
        assert accuracy["engine"] == "onnxruntime"
        assert {row["batch"] for row in accuracy["errors"]} == {1, 2, 3, 8}
        assert accuracy["weights"]["int8"] > accuracy["weights"]["fp32"] > 0
    images = {}
    for precision in ("fp32", "int8"):
        with load(target, "onnxruntime", 1, precision) as pipe:
            assert pipe.precision == pipe.backend.configuration.graphs == precision
            images[precision] = np.asarray(pipe(3, 2, seed=5, output="sequence").images)
    different = np.abs(images["int8"] - images["fp32"])
    assert 0 < different.mean() < 0.5 * np.abs(images["fp32"]).mean()


def test_int8_alone_leaves_no_float_graph(
    replayed_trace: object,
    golden_files: dict[str, Path],
    quantisable: Callable[[Limits], Recipe],
    tmp_path: Path,
) -> None:
    target = tmp_path / "bundle"
    exported = export_bundle(
        quantisable(LIMITS), target, WeightRequest(golden_files), precisions=("int8",), calibration=1
    )
    assert {path.name for path in target.iterdir()} == {
        "bundle.json", "labels.json", "README.md", "parity", "student_int8.onnx", "decoder_int8.onnx",
    }  # fmt: skip
    assert exported.manifest.precisions == ("int8",)
    assert re.search(r"decoder_int8\.onnx \| [5-9]\d\.\d%", (target / "README.md").read_text())
    read_manifest(target, verify=True)


def test_a_graph_past_its_limits_is_not_let_out(
    replayed_trace: object,
    golden_files: dict[str, Path],
    quantisable: Callable[[Limits], Recipe],
    tmp_path: Path,
) -> None:
    with pytest.raises(VerificationError, match=r"student_int8\.onnx is too far from float32") as caught:
        export_bundle(
            quantisable(TIGHT),
            tmp_path / "bundle",
            WeightRequest(golden_files),
            precisions=("int8",),
            calibration=1,
        )
    assert "--calibration" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


class TestRefused:
    def test_a_precision_without_limits(self, golden_recipe: Recipe, tmp_path: Path) -> None:
        with pytest.raises(PrecisionError, match="no parity limits for int8") as caught:
            export_bundle(golden_recipe, tmp_path / "b", WeightRequest({}), precisions=("int8",))
        assert "docs/int8.md" in str(caught.value.hint)

    def test_a_teacher_without_float32(self) -> None:
        """Nothing is traced before this is said."""
        with pytest.raises(PrecisionError, match="teacher has no int8 graph") as caught:
            check_int8(["student", "tokenizer", "teacher"], 64, keep_float=False)
        assert "--precision fp32,int8" in str(caught.value.hint)
        check_int8(["student", "tokenizer", "teacher"], 64, keep_float=True)

    def test_no_images(self) -> None:
        with pytest.raises(PrecisionError, match="on 0 images"):
            check_int8(["student", "tokenizer"], 0, keep_float=True)

    @pytest.mark.parametrize(
        "options",
        [["--calibration", "8"], ["--precision", "int8", "--calibration", "0"], ["--precision", "int4"],
         ["--precision", "fp32,int8", "--keep-fp32", "blocks.0"]],
    )  # fmt: skip
    def test_options_that_do_not_go_together(self, options: list[str]) -> None:
        result = CliRunner().invoke(command, ["--model", "digits-var", *options])
        assert result.exit_code == 2, result.output

    def test_tensorrt_has_no_int8(self) -> None:
        """QDQ graphs with floating-point ends are not what its builder is checked with."""
        from ddexport.commands.trt import command as trt

        result = CliRunner().invoke(trt, ["anything", "--precision", "int8"])
        assert result.exit_code == 2 and "int8" in result.output
