"""Calibration: samples that need no data, and the ranges that they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

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
    calibrate(student, [decoder], recipe, images)  # type: ignore[arg-type]
    return student, decoder


def test_the_student_sees_noise_and_then_what_it_has_drawn(golden_recipe: Recipe) -> None:
    """The passes are those of all schedules. The noise is the runtime's with a seed of its own; a second pass
    keeps what the first has drawn, not noise in the place of data."""
    assert student_passes(golden_recipe) == (0, 5)
    student, _ = drawn(golden_recipe, 6)
    first, second = student.seen[0::2], student.seen[1::2]
    length, width = golden_recipe.sequence.length, golden_recipe.sequence.width
    noise = gaussian_noise(SEED, range(6), length, width)
    np.testing.assert_array_equal(np.concatenate([feeds["latents"] for feeds in first]), noise)
    kept = np.concatenate([feeds["latents"] for feeds in second])
    np.testing.assert_array_equal(kept[:, :5], noise[:, :5] + 100.0)
    np.testing.assert_array_equal(kept[:, 5:], noise[:, 5:])
    assert {feeds["latents"].dtype for feeds in student.seen} == {np.dtype(np.float32)}
    assert [{*feeds["known"].tolist()} for feeds in student.seen] == [{0}, {5}] * len(first)


def test_labels_spread_over_the_classes(golden_recipe: Recipe) -> None:
    for images, wanted in ((5, [0, 2, 4, 6, 8]), (20, sorted([*range(10), *range(10)]))):
        student, _ = drawn(golden_recipe, images)
        first = [feeds["label"] for feeds in student.seen if not feeds["known"].any()]
        assert np.concatenate(first).tolist() == wanted
        assert max(map(len, first)) <= calibration.BATCH, "memory does not grow with the number of images"


def test_the_decoder_sees_each_pass_in_turn(golden_recipe: Recipe) -> None:
    """Images of one step and of two, from the first batch on and across batches."""
    student, decoder = drawn(golden_recipe, 7)
    passes = [student.seen[0::2], student.seen[1::2]]
    got = np.concatenate([feeds["sequence"] for feeds in decoder.seen])
    inputs = [np.concatenate([feeds["latents"] for feeds in some]) for some in passes]
    wanted = np.stack([inputs[image % 2][image] + 100.0 for image in range(7)])
    np.testing.assert_array_equal(got, wanted)


def test_ranges_widen_and_outputs_stay(tmp_path: Path) -> None:
    """Of y = |2 x|, with the doubled value inside. A range that was never measured does not look like one."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 3] x) => (float[batch, 3] y) <float two = {2}> { d = Mul (x, two) y = Abs (d) }""")
    onnx.save(model, tmp_path / "g.onnx")
    observed = Observed(tmp_path / "g.onnx", ["d", "y", "d"])
    assert observed.ranges == {}
    got = observed.run({"x": np.array([[-1, 0.5, 2]], np.float32)})
    assert list(got) == ["y"] and got["y"].tolist() == [[2, 1, 4]]
    assert observed.ranges == {"d": (-2, 4), "y": (1, 4)}
    observed.run({"x": np.array([[0, 0, 3], [-4, 0, 0]], np.float32)})
    observed.run({"x": np.ones((1, 3), np.float32)})
    assert observed.ranges == {"d": (-8, 6), "y": (0, 8)}
