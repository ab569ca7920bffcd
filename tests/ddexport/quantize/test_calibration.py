"""Calibration: samples that need no data, and the ranges that they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ddexport.quantize.calibration as calibration
from ddexport.quantize.calibration import SEED, Observed, calibrate, student_passes
from ddexport.recipe import Recipe
from ddexport.runtime.noise import gaussian_noise


class Recorder:
    """Stands for an observed graph: keeps its inputs; a student of it adds 100 to what it is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        self.seen.append({name: np.array(value) for name, value in feeds.items()})
        return {"sequence": feeds["latents"] + 100.0} if "latents" in feeds else {}


def drawn(recipe: Recipe, images: int) -> tuple[Recorder, Recorder]:
    student, decoder = Recorder(), Recorder()
    calibrate(student, decoder, recipe, images)  # type: ignore[arg-type]
    return student, decoder


class TestSamples:
    def test_the_passes_are_those_of_all_schedules(self, golden_recipe: Recipe) -> None:
        assert student_passes(golden_recipe) == (0, 5)

    def test_noise_is_the_runtimes_with_a_seed_of_its_own(self, golden_recipe: Recipe) -> None:
        student, _ = drawn(golden_recipe, 6)
        sequence = golden_recipe.sequence
        first = [feeds["latents"] for feeds in student.seen if not feeds["known"].any()]
        np.testing.assert_array_equal(
            np.concatenate(first), gaussian_noise(SEED, range(6), sequence.length, sequence.width)
        )
        assert {feeds["latents"].dtype for feeds in student.seen} == {np.dtype(np.float32)}

    def test_labels_spread_over_the_classes(self, golden_recipe: Recipe) -> None:
        for images, wanted in ((5, [0, 2, 4, 6, 8]), (20, sorted([*range(10), *range(10)]))):
            student, _ = drawn(golden_recipe, images)
            first = [feeds["label"] for feeds in student.seen if not feeds["known"].any()]
            assert np.concatenate(first).tolist() == wanted

    def test_second_passes_keep_what_the_first_has_drawn(self, golden_recipe: Recipe) -> None:
        """Not noise in the place of data, on which nobody runs the student."""
        student, _ = drawn(golden_recipe, 2)
        first, second = student.seen
        assert second["known"].tolist() == [5, 5]
        np.testing.assert_array_equal(second["latents"][:, :5], first["latents"][:, :5] + 100.0)
        np.testing.assert_array_equal(second["latents"][:, 5:], first["latents"][:, 5:])

    def test_the_decoder_sees_each_pass_in_turn(self, golden_recipe: Recipe) -> None:
        """Images of one step and of two, from the first batch on and across batches."""
        student, decoder = drawn(golden_recipe, 7)
        passes = [student.seen[0::2], student.seen[1::2]]
        got = np.concatenate([feeds["sequence"] for feeds in decoder.seen])
        inputs = [np.concatenate([feeds["latents"] for feeds in some]) for some in passes]
        wanted = np.stack([inputs[image % 2][image] + 100.0 for image in range(7)])
        np.testing.assert_array_equal(got, wanted)

    def test_batches_are_small_whatever_the_number(self, golden_recipe: Recipe) -> None:
        """Memory does not grow with the number of images."""
        student, _ = drawn(golden_recipe, 30)
        assert max(len(feeds["label"]) for feeds in student.seen) <= calibration.BATCH


@pytest.fixture
def doubled(tmp_path: Path) -> Path:
    """y = |2 x|, with the doubled value inside."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["d"]), helper.make_node("Abs", ["d"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.float32(2), "two")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


class TestObserved:
    def test_ranges_widen_and_outputs_stay(self, doubled: Path) -> None:
        graph = Observed(doubled, ["d", "y", "d"])
        got = graph.run({"x": np.array([[-1, 0.5, 2]], np.float32)})
        assert list(got) == ["y"] and got["y"].tolist() == [[2, 1, 4]]
        assert graph.ranges == {"d": (-2, 4), "y": (1, 4)}
        graph.run({"x": np.array([[0, 0, 3], [-4, 0, 0]], np.float32)})
        assert graph.ranges == {"d": (-8, 6), "y": (0, 8)}

    def test_nothing_is_known_before_the_first_run(self, doubled: Path) -> None:
        """A range that was never measured must not look like one."""
        assert Observed(doubled, ["d"]).ranges == {}

    def test_batches_do_not_matter(
        self, golden_bundle: Path, golden_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ranges = []
        for batch in (1, 4):
            monkeypatch.setattr(calibration, "BATCH", batch)
            student = Observed(golden_bundle / "student.onnx", _layers(golden_bundle / "student.onnx"))
            calibrate(student, Recorder(), golden_recipe, 5)  # type: ignore[arg-type]
            ranges.append(student.ranges)
        assert list(ranges[0]) == list(ranges[1])
        np.testing.assert_allclose([*ranges[0].values()], [*ranges[1].values()], rtol=1e-4, atol=1e-4)


def _layers(path: Path) -> list[str]:
    return [n.output[0] for n in onnx.load(path).graph.node if n.op_type == "LayerNormalization"]
