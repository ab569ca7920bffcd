"""What a request gives, however it is split, and what a wrong request is told."""

from __future__ import annotations

import io
import pickle
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from onnx import numpy_helper
from PIL import Image

import ddexport
from ddexport import runtime
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import ImageSize, SequenceSize
from ddexport.runtime.errors import BackendError, DDError
from ddexport.runtime.images import grid, grid_columns, to_uint8
from ddexport.runtime.noise import gaussian_noise
from ddexport.runtime.pipeline import DIFFUSERS, MAX_BATCH, REFUSED, Pipeline, default_batch_size
from ddexport.runtime.result import joined
from tests.runtime import toy


@pytest.fixture
def pipe(shared_bundle: Path) -> Iterator[Pipeline]:
    with runtime.load(shared_bundle, threads=1) as pipeline:
        yield pipeline


def assert_same(one: Any, other: Any) -> None:
    """Equal tokens and noise; floats to rounding, which another batch size may change."""
    np.testing.assert_array_equal(one.noise, other.noise)
    np.testing.assert_array_equal(one.labels, other.labels)
    for step, its in zip(one.steps, other.steps, strict=True):
        np.testing.assert_array_equal(step.tokens, its.tokens)
        np.testing.assert_allclose(step.sequence, its.sequence, atol=1e-5)
    assert abs(np.subtract(one.images, other.images, dtype=int)).max() <= 1


def test_an_image_is_what_the_graphs_say(pipe: Pipeline) -> None:
    """One step, recomputed in NumPy from the weights of the toy graphs."""
    result = pipe(["two", 0], steps=1, seed=3, num_images=2, output="numpy")
    weights = toy.constants(toy.student())
    noise = gaussian_noise(3, range(4), 6, 4)
    labels = np.array([2, 2, 0, 0])
    tokens = (noise[:, :2] @ weights["W"] + weights["label_rows"][labels]).argmax(-1)
    sequence = np.concatenate([weights["codebook"][tokens], noise[:, 2:] @ weights["A"]], axis=1)
    light = 1 / (1 + np.exp(-sequence.reshape(4, -1) @ toy.constants(toy.decoder())["D"]))
    pixels = (light.reshape(4, 3, 8, 8) * 255).transpose(0, 2, 3, 1)
    assert (len(result), result.labels.tolist(), result.seed) == (4, labels.tolist(), 3)
    assert result.uniforms is None
    np.testing.assert_array_equal(result.noise, noise)
    np.testing.assert_array_equal(result.steps[0].tokens, tokens)
    np.testing.assert_allclose(result.steps[0].sequence, sequence, atol=1e-5)
    np.testing.assert_allclose(result.images, pixels, atol=0.51)


def test_first_image_draws_a_part_of_a_long_run(pipe: Pipeline) -> None:
    """So that several machines can share one seed; and more images start with the same ones."""
    whole = pipe(1, 2, seed=5, num_images=8, output="numpy")
    np.testing.assert_array_equal(whole.noise[:2], pipe(1, seed=5, num_images=2).noise)
    parts = list(pipe.stream(1, 2, seed=5, num_images=5, first_image=3, batch_size=2, output="numpy"))
    assert [len(part) for part in parts] == [2, 2, 1]
    for part in (pipe(1, 2, seed=5, num_images=5, first_image=3, output="numpy"), joined(parts)):
        np.testing.assert_array_equal(part.noise, whole.noise[3:])
        np.testing.assert_array_equal(part.steps[-1].tokens, whole.steps[-1].tokens[3:])
        assert abs(np.subtract(part.images, whole.images[3:], dtype=int)).max() <= 1
    assert not np.array_equal(whole.noise[0], pipe(1, seed=6).noise[0])


def test_without_a_seed_a_fresh_one_is_drawn_and_told(pipe: Pipeline) -> None:
    results = [pipe([0, 1], num_images=2, seed=None, output="numpy", batch_size=size) for size in (4, 4, 1)]
    assert len({result.seed for result in results}) == 3
    for result in results:
        assert_same(pipe([0, 1], num_images=2, seed=result.seed, output="numpy"), result)
    parts = list(pipe.stream(0, num_images=3, seed=None, batch_size=1))
    assert len({part.seed for part in parts}) == 1


def test_outputs(pipe: Pipeline) -> None:
    pictures, latent = pipe([0, 1], seed=7), pipe([0, 1], seed=7, output="sequence")
    pixels = pipe([0, 1], seed=7, output="numpy")
    assert [picture.size for picture in pictures.images] == [(8, 8), (8, 8)]
    assert (pixels.images.shape, pixels.images.dtype) == ((2, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(pictures.images[1]), pixels.images[1])
    np.testing.assert_array_equal(latent.images, latent.steps[-1].sequence)
    assert list(pixels.seconds) == ["student", "decoder"] and min(pixels.seconds.values()) > 0
    # What a notebook shows: all images in one picture, also of arrays; nothing where nothing is decoded.
    for result in (pictures, pixels):
        shown = Image.open(io.BytesIO(result._repr_png_() or b""))
        assert shown.size == (256, 128)
        np.testing.assert_array_equal(np.asarray(shown)[8::16, 136::16], pixels.images[1])
    assert latent._repr_png_() is None
    assert "toy: onnxruntime, cpu, fp32" in repr(pipe) and "2 images, seed 7" in repr(pictures)
    assert ddexport.__version__ == runtime.__version__ and ddexport.load is runtime.load


def test_replayed_noise_gives_the_same_result(pipe: Pipeline) -> None:
    first = pipe([2, 0], 2, seed=9, num_images=2, output="numpy")
    again = pipe([2, 0], 2, num_images=2, noise=first.noise, batch_size=3, output="numpy")
    assert_same(again, first)
    assert again.seed is None and "seed" not in repr(again)
    parts = list(pipe.stream([2, 0], 2, num_images=2, noise=first.noise, batch_size=3, output="numpy"))
    assert [len(part) for part in parts] == [3, 1]
    assert_same(joined(parts), first)


def test_the_names_of_diffusers_are_understood_or_refused_with_the_right_word(pipe: Pipeline) -> None:
    wanted = pipe("one", 2, num_images=2, output="numpy")
    drawn = pipe(prompt="one", num_inference_steps=2, num_images_per_prompt=2, output_type="np")
    assert_same(drawn, wanted)
    again = pipe(class_labels=[1], num_inference_steps=2, num_images=2, latents=wanted.noise, output="numpy")
    assert_same(again, wanted)
    assert pipe("one", output_type="latent").images.shape == (1, 6, 4)
    (part,) = pipe.stream("one", num_inference_steps=2, num_images_per_prompt=2, output_type="np")
    assert_same(part, wanted)
    words = {"generator": "seed", "negative_prompt": "guidance", "height": "size", "width": "size",
             "callback_on_step_end": "on_pass", "eta": "noise", "return_dict": "result"}  # fmt: skip
    assert words.keys() == REFUSED.keys()
    for name, word in words.items():
        for call in (pipe, pipe.stream):
            with pytest.raises(DDError, match=name) as caught:
                call("one", **{name: None})  # type: ignore[operator]
            assert word in caught.value.hint
    for name in set(DIFFUSERS) - {"prompt"}:
        with pytest.raises(DDError, match=name) as caught:
            pipe(**{"labels": "one", name: 1, DIFFUSERS[name]: 1})
        assert DIFFUSERS[name] in caught.value.hint
    with pytest.raises(TypeError, match="nose, sead"):
        pipe("one", sead=1, nose=2)


def test_stream_checks_at_once_and_needs_constant_memory(pipe: Pipeline) -> None:
    """The peak grows by less than 100 bytes per image: the label and Python's own bookkeeping. The pixels
    alone are 192 bytes, noise and sequence 96 each."""
    requests = ({"labels": "no"}, {"steps": 7}, {"batch_size": 0}, {"num_images": 0}, {"noise": np.zeros(3)})
    for request in requests:
        with pytest.raises(DDError):
            pipe.stream(**{"labels": 0, **request})  # type: ignore[arg-type]

    def peak(count: int) -> int:
        tracemalloc.start()
        for _ in pipe.stream(0, num_images=count, batch_size=8, output="numpy"):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(16)  # what is allocated once
    assert peak(2000) - peak(100) < 100 * 1900


def test_the_batch_size_follows_the_sizes(pipe: Pipeline) -> None:
    """A small model gets the largest batch, images of 256 x 256 a few, and anything at least one."""
    assert default_batch_size(pipe.manifest) == MAX_BATCH
    sequence = SequenceSize(length=680, width=32, codebook=4096, split=55)
    large = replace(pipe.manifest, sequence=sequence, image=ImageSize(height=256, width=256, channels=3))
    assert 2 <= default_batch_size(large) <= 16
    huge = replace(large, image=ImageSize(height=4096, width=4096, channels=3))
    assert default_batch_size(huge) == 1


# Engines, threads, processes


def test_the_logits_are_never_fetched(pipe: Pipeline, runs: list[Any]) -> None:
    """8.5 MB per image for llamagen-l. Nor is anything decoded that is not asked for."""
    asked = ("student.onnx", ("sequence", "tokens"))
    pipe([0, 1], 3)
    assert [(file, names) for file, _, names in runs] == [asked] * 3 + [("decoder.onnx", None)]
    runs.clear()
    pipe([0, 1], 2, output="sequence")
    assert [(file, names) for file, _, names in runs] == [asked] * 2


def test_opening_a_graph_is_not_counted_as_drawing(
    teacher_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OnnxRuntime._open
    monkeypatch.setattr(OnnxRuntime, "_open", lambda *given: (time.sleep(0.5), original(*given))[1])
    with runtime.load(teacher_bundle, steps=1, threads=1) as pipe:
        for steps in (2, 3):  # another student, the teacher
            began = time.perf_counter()
            result = pipe(0, steps)
            assert sum(result.seconds.values()) < 0.5 < time.perf_counter() - began


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_pickled_pipeline_is_loaded_again_in_the_same_configuration(
    shared_bundle: Path, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its path, also when another folder is the current one."""
    monkeypatch.chdir(shared_bundle.parent)
    with runtime.load(shared_bundle.name, backend, threads=1) as pipe:
        data = pickle.dumps(pipe)
        wanted = pipe([0, 1, 2], 3, seed=4, output="numpy")
    with pytest.raises(BackendError, match="closed"):
        pipe(0)
    assert len(data) < 1000 and pipe.__reduce__()[0].keywords == {"device": "cpu"}  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    with pickle.loads(data) as again:
        assert again.backend.configuration == pipe.backend.configuration
        assert again.backend.threads == 1
        assert_same(again([0, 1, 2], 3, seed=4, output="numpy"), wanted)


# Pixels


def test_an_image_that_is_not_finite_is_refused(bundle: Path) -> None:
    model = toy.decoder()
    (weights,) = (value for value in model.graph.initializer if value.name == "D")
    weights.CopyFrom(numpy_helper.from_array(np.full((24, 192), np.nan, np.float32), "D"))
    toy.put_file(bundle, "decoder.onnx", model.SerializeToString())
    with runtime.load(bundle) as pipe, pytest.raises(BackendError, match="not finite"):
        pipe(0)


def test_bytes_are_rounded_and_clipped_and_the_channels_come_last() -> None:
    values = np.array([-1, 0, 0.4 / 255, 0.6 / 255, 0.5, 254.6 / 255, 1, 2], np.float32)
    image = np.broadcast_to(values, (1, 3, 1, 8))
    assert to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    image = np.zeros((1, 3, 2, 2), np.float32)
    image[0, 2, 0, 1] = 1
    assert np.argwhere(to_uint8(image)).tolist() == [[0, 0, 1, 2]]


def test_rows_are_labels_or_the_grid_is_nearly_square() -> None:
    """It keeps the order and enlarges by whole pixels."""
    rows = [(1, 1, 1), (10, 1, 5), (9, 1, 3), (7, 1, 3), (3, 4, 4), (1, 5, 5), (1, 2000, 50), (2, 600, 40)]
    assert [(labels, images, grid_columns(labels, images, 32, 32)) for labels, images, _ in rows] == rows
    with pytest.raises(DDError, match="1,000,000,000"):
        grid_columns(1, 10**9, 32, 32)
    colours = ["red", "green", "blue"]
    picture = grid([Image.new("RGB", (32, 32), colour) for colour in colours], columns=2)
    assert picture.size == (256, 256)
    corners = [picture.getpixel(place) for place in ((0, 0), (128, 127), (127, 128), (255, 255))]
    assert corners == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]
    assert grid([Image.new("RGB", (256, 256))], columns=1).size == (256, 256)
