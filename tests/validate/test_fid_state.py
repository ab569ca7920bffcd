"""The state of a long measurement: whole or not there, and nobody else's."""

from __future__ import annotations

import numpy as np
import pytest

from ddexport.runtime.errors import OutputError
from ddexport.validate import fid_state
from ddexport.validate.fid_state import FILE, State, StateError, digest_of

KEY = {"seed": 1, "images": 50_000, "bundle": {"student.onnx": "ab" * 32}}
ARRAYS = {"sum": np.arange(6.0).reshape(2, 3), "count": np.array(7)}


def loaded(state):
    found = {}
    done = state.load(lambda arrays: found.update({name: arrays[name] for name in ARRAYS}))
    return done, found


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path):
    State(tmp_path, KEY).save(640, ARRAYS.items())
    done, found = loaded(State(tmp_path, KEY))
    assert done == 640
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_nothing_saved_is_a_beginning(tmp_path):
    assert loaded(State(tmp_path / "new", KEY)) == (0, {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 2}, "seed 1, here 2"),
        ({"images": 100}, "images 50000, here 100"),
        ({"extra": True}, "extra null, here true"),
        ({"bundle": {"student.onnx": "cd" * 32}}, "bundle"),
    ],
)
def test_the_state_of_another_run_is_refused_and_the_difference_named(tmp_path, changed, message):
    """Its numbers would be mixed with those of other images."""
    State(tmp_path, KEY).save(640, ARRAYS.items())
    with pytest.raises(StateError) as caught:
        loaded(State(tmp_path, {**KEY, **changed}))
    assert message in caught.value.message
    assert "--state" in caught.value.hint
    assert loaded(State(tmp_path, KEY))[0] == 640  # and is still there for its owner


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
def test_a_damaged_state_is_an_error(tmp_path, damage):
    """Not a wrong figure, and not a silent beginning from nothing."""
    state = State(tmp_path, KEY)
    state.save(640, {"sum": np.arange(4000.0), "count": np.array(7)}.items())
    content = bytearray(state.path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    kept = {"cut": content[: len(content) // 2], "flipped": content, "text": b"no npz", "empty": b""}
    state.path.write_bytes(bytes(kept[damage]))
    with pytest.raises(StateError, match="cannot be read as the state of a run"):
        loaded(State(tmp_path, KEY))


def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    state = State(tmp_path, KEY)
    state.save(640, ARRAYS.items())

    def broken():
        yield "sum", ARRAYS["sum"]
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        state.save(1280, broken())
    assert loaded(State(tmp_path, KEY))[0] == 640
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_end_removes_the_state_and_nothing_else(tmp_path):
    (tmp_path / "other").touch()
    state = State(tmp_path, KEY)
    state.save(640, ARRAYS.items())
    state.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    own = State(tmp_path / "own", KEY)
    own.save(640, ARRAYS.items())
    own.discard()
    assert not (tmp_path / "own").exists()


def test_saving_is_not_what_the_time_goes_to(tmp_path, monkeypatch):
    """A gigabyte of state that takes ten seconds is not written every thirty."""
    now = [0.0]
    monkeypatch.setattr(fid_state.time, "monotonic", lambda: now[0])
    state = State(tmp_path, KEY)

    def slow():
        now[0] += 10.0
        yield "sum", ARRAYS["sum"]

    now[0] += fid_state.SAVE_SECONDS
    assert state.due()
    state.save(1, slow())
    now[0] += 199.0
    assert not state.due()
    now[0] += 1.0
    assert state.due()


def test_runs_have_names_of_their_own():
    assert digest_of(KEY) == digest_of(dict(reversed(KEY.items())))
    assert digest_of(KEY) != digest_of({**KEY, "seed": 2})
