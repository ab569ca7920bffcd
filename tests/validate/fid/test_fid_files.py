"""Features on disk: rows of both sides, and runs that were stopped, killed, or are somebody else's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.lib import format as npy

from ddexport.runtime.errors import OutputError
from ddexport.validate.features._base import Extractor, Readings
from ddexport.validate.fid.draws import Order
from ddexport.validate.fid.files import (
    BUNDLE,
    REFERENCE,
    FeatureFiles,
    StateError,
    columns_of,
    draw_features,
    largest_difference,
    readings_of,
)

RUN = {"seed": 1, "images": 50_000, "graphs": {"student.onnx": "ab" * 32}}
ORDER = Order(60, 3, classes=4, length=6, width=3)


class Corners(Extractor):
    """Four values as features, and as probabilities of four classes."""

    name, width, classes, identity = "corners", 4, 4, "corners:0"

    @classmethod
    def load(cls, weights):
        return cls()

    def _read(self, images):
        features = images[:, ::2, 0, ::2].reshape(len(images), 4).astype(np.float32)
        odds = features + 1
        return Readings(features / 50, odds / odds.sum(1, keepdims=True))


COLUMNS = columns_of([BUNDLE, REFERENCE], [1, 2], Corners())


def files_in(directory, run=RUN, images=60, columns=COLUMNS):
    return FeatureFiles(directory, run, images, columns)


def drawn(files, seen=None):
    """All rows of two sides that draw a little differently; seen: the images, by index."""
    seen = {} if seen is None else seen

    def side(name, error):
        def draw(order, indices):
            labels, noise = order.labels(indices), order.noise(indices)
            shades = 100 + 20 * noise[:, :3] + 5 * labels[:, None, None] + error
            images = {steps: np.repeat(shades[..., None] + steps, 3, 3).astype(np.uint8) for steps in (1, 2)}
            seen.update({(name, steps, indices): part for steps, part in images.items()})
            return images

        return draw

    sides = {BUNDLE: side(BUNDLE, 3), REFERENCE: side(REFERENCE, 0)}
    draw_features(ORDER, 8, sides, Corners(), files, lambda count: None)
    return files


def content(files):
    return {name: array.tobytes() for name, array in files.arrays.items()}


def test_every_row_is_what_the_extractor_reads_off_its_image(tmp_path):
    kept = {}
    files = drawn(files_in(tmp_path), kept)
    assert files.filled.all()
    for side in (BUNDLE, REFERENCE):
        for steps in (1, 2):
            images = np.concatenate([part for (a, b, _), part in kept.items() if (a, b) == (side, steps)])
            for row, expected in zip(readings_of(files, side, steps), Corners()(images), strict=True):
                np.testing.assert_allclose(row, expected, rtol=1e-6)
                assert row.dtype == np.float32 and isinstance(row, np.memmap)


def test_pairs_are_compared_image_by_image():
    """By hand: one image of three is off by 40 in one value, another by 2."""
    first = np.full((3, 3, 3, 3), 100, dtype=np.uint8)
    second = first.copy()
    second[1, 0, 0, 0], second[2, 2, 0, 0] = 60, 102
    assert largest_difference(first, second).tolist() == [0, 40, 2]


@pytest.mark.parametrize("where", ["draw", "write", "mark"])
def test_a_stopped_run_goes_on_to_the_same_rows(tmp_path, monkeypatch, where):
    """At any batch, and at any moment in it: what counts is whole, and not one bit of the end differs."""
    whole = content(drawn(files_in(tmp_path / "whole")))
    for stop in (0, 3, 7):
        directory = tmp_path / str(stop)
        files = files_in(directory)
        with monkeypatch.context() as patch:
            if where == "draw":  # two calls a batch, one a schedule
                stopped = stopping(largest_difference, 2 * stop)
                patch.setattr("ddexport.validate.fid.files.largest_difference", stopped)
            elif where == "write":
                files.arrays["difference-1"] = Stopping(files.arrays["difference-1"], stop)
            else:
                patch.setattr(FeatureFiles, "_checksums", stopping(FeatureFiles._checksums, stop))
            with pytest.raises(KeyboardInterrupt):
                drawn(files)
        again, seen = files_in(directory), {}
        assert int(again.filled.sum()) == 8 * stop
        drawn(again, seen)
        assert min(indices.start for _, _, indices in seen) == 8 * stop  # nothing is drawn twice
        assert content(again) == whole


def stopping(fine, after):
    calls = []

    def call(*args):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return fine(*args)

    return call


class Stopping:
    """An array that is stopped while a batch is written, its first values there already."""

    def __init__(self, array, batches):
        self.array, self.batches = array, batches

    def __setitem__(self, rows, values):
        if not self.batches:
            self.array[rows.start] = 255
            raise KeyboardInterrupt
        self.batches -= 1
        self.array[rows] = values

    def __getitem__(self, rows):
        return self.array[rows]

    def flush(self):
        self.array.flush()


def test_rows_that_were_damaged_are_drawn_again(tmp_path):
    """A flipped bit, or data that never reached the disk although their mark did."""
    whole = content(drawn(files_in(tmp_path)))
    columns = ("bundle-1", "reference-2-probabilities", "difference-2", "marks")
    for column, flipped in itertools.product(columns, (True, False)):
        path = tmp_path / f"{column}.npy"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data) if flipped else bytes(data[:-1]))
        again = files_in(tmp_path)
        assert np.flatnonzero(~again.filled).tolist() == [59], (column, flipped)
        assert content(drawn(again)) == whole


def test_the_state_of_another_run_is_refused(tmp_path):
    """Its rows would be mixed with those of other images."""
    drawn(files_in(tmp_path))
    for changed in ({"seed": 2}, {"extra": True}, {"graphs": {"student.onnx": "cd" * 32}}):
        with pytest.raises(StateError) as caught:
            files_in(tmp_path, {**RUN, **changed})
        assert next(iter(changed)) in caught.value.message and "--state" in caught.value.hint
    assert files_in(tmp_path).filled.all()  # and is still there for its owner


def test_a_damaged_state_is_an_error(tmp_path):
    """Not a wrong figure, and not a silent beginning from nothing."""
    damages = itertools.product(("run.json", "bundle-1.npy", "marks.npy"), (b"", b"{", b"[1]", b"no npy"))
    for number, (file, damage) in enumerate(damages):
        files_in(tmp_path / str(number))
        (tmp_path / str(number) / file).write_bytes(damage)
        with pytest.raises(StateError):
            files_in(tmp_path / str(number))
    files_in(tmp_path / "other", images=50)  # the same run, other shapes: of another version of the program
    with pytest.raises(StateError):
        files_in(tmp_path / "other")


def test_files_that_were_not_all_made_are_made_again(tmp_path, monkeypatch):
    """A full disk is told before the first image, and no run is said to be there."""
    fine, calls = npy.write_array, []

    def full(stream, array):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        fine(stream, array)

    with monkeypatch.context() as patch:
        patch.setattr(npy, "write_array", full)
        with pytest.raises(OutputError, match="No space left"):
            files_in(tmp_path)
    assert not (tmp_path / "run.json").exists()
    assert drawn(files_in(tmp_path)).filled.all()
    size = (tmp_path / "bundle-1.npy").stat()
    assert size.st_blocks * 512 >= 60 * 4 * 4  # no hole, which a full disk would make fatal


def test_the_end_removes_the_state_and_nothing_else(tmp_path):
    (tmp_path / "other").touch()
    files_in(tmp_path).discard()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    files_in(tmp_path / "own").discard()
    assert not (tmp_path / "own").exists()
