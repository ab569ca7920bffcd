"""What a request gives, however it is split, and what a wrong request is told."""

from __future__ import annotations

import logging
import re
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from ddexport import runtime
from ddexport.runtime.bundle import ImageSize, SequenceSize
from ddexport.runtime.errors import BackendError, BundleError, DDError, LabelError, NoiseError, ScheduleError
from ddexport.runtime.images import grid, grid_columns, to_uint8
from ddexport.runtime.noise import gaussian_noise
from ddexport.runtime.pipeline import MAX_BATCH, Pipeline, default_batch_size


@pytest.fixture
def pipe(shared_bundle: Path) -> Iterator[Pipeline]:
    with runtime.load(shared_bundle, threads=1) as pipeline:
        yield pipeline


def constants(bundle: Path, role: str) -> dict[str, np.ndarray]:
    graph = onnx.load(bundle / f"{role}.onnx").graph
    return {value.name: numpy_helper.to_array(value) for value in graph.initializer}


def test_an_image_is_what_the_graphs_say(pipe: Pipeline, shared_bundle: Path) -> None:
    """One step, recomputed in NumPy from the weights of the toy graphs."""
    result = pipe(["two", 0], steps=1, seed=3, num_images=2, output="numpy")
    weights = constants(shared_bundle, "student")
    noise = gaussian_noise(3, range(4), 6, 4)
    labels = np.array([2, 2, 0, 0])
    tokens = (noise[:, :2] @ weights["W"] + weights["label_rows"][labels]).argmax(-1)
    sequence = np.concatenate([weights["codebook"][tokens], noise[:, 2:] @ weights["A"]], axis=1)
    light = 1 / (1 + np.exp(-sequence.reshape(4, -1) @ constants(shared_bundle, "decoder")["D"]))
    pixels = (light.reshape(4, 3, 8, 8) * 255).transpose(0, 2, 3, 1)
    assert result.labels.tolist() == labels.tolist()
    np.testing.assert_array_equal(result.noise, noise)
    np.testing.assert_array_equal(result.steps[0].tokens, tokens)
    np.testing.assert_allclose(result.steps[0].sequence, sequence, atol=1e-5)
    np.testing.assert_allclose(result.images, pixels, atol=0.51)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_batch_size_changes_nothing(pipe: Pipeline, steps: int) -> None:
    """The same seed gives the same tokens at batch sizes 1, 2, 3, 7 and the chosen one."""
    whole = pipe([0, 1, 2], steps, num_images=3, seed=11, output="numpy")
    for batch_size in (1, 2, 3, 7):
        parts = pipe([0, 1, 2], steps, num_images=3, seed=11, output="numpy", batch_size=batch_size)
        np.testing.assert_array_equal(parts.noise, whole.noise)
        np.testing.assert_array_equal(parts.labels, whole.labels)
        assert len(parts.steps) == steps
        for one, other in zip(parts.steps, whole.steps, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.sequence, other.sequence, atol=1e-5)
        assert abs(np.subtract(parts.images, whole.images, dtype=int)).max() <= 1


def test_more_images_of_a_seed_start_with_the_same_ones(pipe: Pipeline) -> None:
    few, many = pipe(1, seed=5, num_images=2), pipe(1, seed=5, num_images=5)
    np.testing.assert_array_equal(many.noise[:2], few.noise)
    assert not np.array_equal(many.noise[0], pipe(1, seed=6).noise[0])


def test_labels_as_numbers_names_or_one(pipe: Pipeline) -> None:
    for labels in (2, "2", "two", "TWO", "a pair", [2], ("two",), np.array([2])):
        assert pipe(labels).labels.tolist() == [2]
    assert pipe(["two", 0], num_images=2).labels.tolist() == [2, 2, 0, 0]


def test_outputs(pipe: Pipeline) -> None:
    pictures = pipe([0, 1]).images
    pixels = pipe([0, 1], output="numpy")
    latent = pipe([0, 1], output="sequence")
    assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]
    assert isinstance(pixels.images, np.ndarray)
    assert (pixels.images.shape, pixels.images.dtype) == ((2, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(pictures[1]), pixels.images[1])
    np.testing.assert_array_equal(latent.images, latent.steps[-1].sequence)
    assert latent.timings.decoder == 0
    assert pixels.timings.decoder > 0
    assert pixels.timings.student > 0
    assert len(pixels) == 2


def test_replayed_noise_gives_the_same_result(pipe: Pipeline) -> None:
    first = pipe([2, 0], steps=2, seed=9, num_images=2)
    again = pipe([2, 0], steps=2, num_images=2, noise=first.noise, batch_size=3)
    np.testing.assert_array_equal(first.steps[-1].tokens, again.steps[-1].tokens)
    np.testing.assert_allclose(first.steps[-1].sequence, again.steps[-1].sequence, atol=1e-5)


def not_finite() -> np.ndarray:
    noise = np.zeros((2, 6, 4), np.float32)
    noise[1, 3, 2] = np.nan
    return noise


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"labels": 3}, LabelError, "label 3 is out of range: the model has classes 0 to 2"),
        ({"labels": "tow"}, LabelError, "no class is called 'tow'"),
        ({"labels": []}, LabelError, "no label"),
        ({"steps": 4}, ScheduleError, "toy has no schedule of 4 steps"),
        ({"seed": -1}, NoiseError, "the seed must be from 0"),
        ({"num_images": 0}, DDError, "num_images must be an integer of at least 1, but is 0"),
        ({"batch_size": 0}, DDError, "batch_size must be"),
        ({"output": "jpeg"}, DDError, "unknown output 'jpeg'"),
        ({"noise": np.zeros((2, 6, 4))}, NoiseError, "must be a float32 array, but is float64"),
        ({"noise": [[0.0]]}, NoiseError, "must be a float32 array, but is <class 'list'>"),
        ({"noise": np.zeros((3, 6, 4), np.float32)}, NoiseError, "shape (2, 6, 4), but has (3, 6, 4)"),
        ({"noise": not_finite()}, NoiseError, "the noise is not finite: nan at (1, 3, 2)"),
    ],
)
def test_a_wrong_request_is_told_at_once(
    pipe: Pipeline, request_: dict[str, Any], error: type[DDError], message: str
) -> None:
    """By `stream` too, before the first batch is asked for."""
    given = {"labels": [0, 1], **request_}
    for call in (pipe, pipe.stream):
        with pytest.raises(error) as caught:
            call(**given)  # type: ignore[operator]
        assert message in caught.value.message
        assert caught.value.exit_code == 1


def test_stream_yields_batches_in_order(pipe: Pipeline) -> None:
    whole = pipe([2, 0, 1], num_images=3, seed=1)
    parts = list(pipe.stream([2, 0, 1], num_images=3, seed=1, batch_size=4))
    assert [len(part) for part in parts] == [4, 4, 1]
    np.testing.assert_array_equal(np.concatenate([part.noise for part in parts]), whole.noise)
    assert np.concatenate([part.labels for part in parts]).tolist() == whole.labels.tolist()


def test_stream_needs_constant_memory(pipe: Pipeline) -> None:
    """The peak grows by less than 100 bytes an image: the label and Python's own bookkeeping.

    The pixels alone are 192 bytes, noise and sequence 96 each.
    """

    def peak(count: int) -> int:
        tracemalloc.start()
        for _ in pipe.stream(0, num_images=count, batch_size=8, output="numpy"):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(16)  # what is allocated once
    assert peak(4000) - peak(100) < 100 * 3900


def test_the_batch_size_follows_the_sizes(pipe: Pipeline) -> None:
    """A small model gets the largest batch, images of 256 x 256 a few, and anything at least one."""
    assert default_batch_size(pipe.manifest) == MAX_BATCH
    large = replace(
        pipe.manifest,
        sequence=SequenceSize(length=680, width=32, codebook=4096, split=55),
        image=ImageSize(height=256, width=256, channels=3),
    )
    assert 2 <= default_batch_size(large) <= 16
    huge = replace(large, image=ImageSize(height=4096, width=4096, channels=3))
    assert default_batch_size(huge) == 1


def test_random_weights_are_said(
    random_bundle: Path, shared_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="runtime"):
        runtime.load(shared_bundle).close()
        assert not caplog.records
        runtime.load(random_bundle).close()
    assert "toy holds random weights (seed 7)" in caplog.text


def test_a_closed_pipeline_says_so(shared_bundle: Path) -> None:
    with runtime.load(shared_bundle) as pipe:
        pass
    with pytest.raises(BackendError, match="backend onnxruntime is closed"):
        pipe(0)


def test_a_precision_the_bundle_lacks(shared_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no student in precision fp16"):
        runtime.load(shared_bundle, precision="fp16")


def test_an_image_that_is_not_finite_is_refused(
    bundle: Path, replace_file: Callable[[str, bytes], None]
) -> None:
    model = onnx.load(bundle / "decoder.onnx")
    for value in model.graph.initializer:
        if value.name == "D":
            value.CopyFrom(numpy_helper.from_array(np.full((24, 192), np.nan, np.float32), "D"))
    replace_file("decoder.onnx", model.SerializeToString())
    with runtime.load(bundle) as pipe, pytest.raises(BackendError, match="image is not finite"):
        pipe(0)


def test_bytes_are_rounded_and_clipped() -> None:
    values = np.array([-1, 0, 0.4 / 255, 0.6 / 255, 0.5, 254.6 / 255, 1, 2], np.float32)
    image = np.broadcast_to(values, (1, 3, 1, 8))
    assert to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_bytes_put_the_channels_last() -> None:
    image = np.zeros((1, 3, 2, 2), np.float32)
    image[0, 2, 0, 1] = 1
    assert np.argwhere(to_uint8(image)).tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize(
    ("labels", "num_images", "columns"), [(1, 1, 1), (10, 1, 5), (9, 1, 3), (7, 1, 3), (3, 4, 4), (1, 5, 5)]
)
def test_rows_are_labels_or_the_grid_is_nearly_square(labels: int, num_images: int, columns: int) -> None:
    assert grid_columns(labels, num_images) == columns


def test_the_grid_keeps_the_order_and_enlarges_by_whole_pixels() -> None:
    colours = ["red", "green", "blue"]
    picture = grid([Image.new("RGB", (32, 32), colour) for colour in colours], columns=2)
    assert picture.size == (256, 256)
    corners = [picture.getpixel(place) for place in ((0, 0), (128, 127), (127, 128), (255, 255))]
    assert corners == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]
    assert grid([Image.new("RGB", (256, 256))], columns=1).size == (256, 256)


def test_a_grid_beyond_reason_asks_for_a_directory() -> None:
    with pytest.raises(DDError, match=re.escape("65 x 1 images of 256 x 256")) as caught:
        grid([Image.new("RGB", (256, 256))] * 65, columns=65)
    assert "directory" in caught.value.hint
