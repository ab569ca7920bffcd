"""Tokens from a teacher: what can be drawn, what is drawn, and a loop with a cache that changes nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from msgspec.structs import replace

from ddexport.runtime import teacher as module
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import BackendError, BundleError, NoiseError, ScheduleError
from ddexport.runtime.noise import uniform_numbers
from ddexport.runtime.schedule import Schedule, Span
from ddexport.runtime.teacher import (
    Sampling,
    by_uniforms,
    choose,
    generate,
    nearest_codes,
    sampling_of,
    weights,
)
from tests.runtime import toy

sampling = partial(Sampling, guidance_scale=1.0, top_k=100, top_p=1.0, temperature=1.0)
GREEDY = sampling(guidance_scale=2.0, top_k=1)
LARGEST = by_uniforms(np.zeros((9, 6)), GREEDY)


def literal_weights(logits: np.ndarray, choice: Sampling) -> np.ndarray:
    """One row, the way the published samplers filter it: sorted, cumulated, cut off."""
    scaled = logits.astype(np.float64) / choice.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = [i for i in order if scaled[i] >= scaled[order[min(choice.top_k, len(order)) - 1]]]
    mass = {i: np.exp(scaled[i] - scaled.max()) for i in kept}
    total, result = sum(mass.values()), np.zeros(len(logits))
    for i in kept:
        above = sum(mass[j] for j in kept if scaled[j] > scaled[i])
        if choice.top_p == 1.0 or above < choice.top_p * total:
            result[i] = mass[i]
    return result


def literal_token(mass: np.ndarray, number: float) -> int:
    running, target = 0.0, number * np.cumsum(mass)[-1]
    for index, one in enumerate(mass):
        running += one
        if running > target:
            return index
    raise AssertionError("the number was below 1")


@st.composite
def cases(draw: DrawFn) -> tuple[np.ndarray, np.ndarray, Sampling]:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 12)))
    logits = (3 * rng.standard_normal(shape)).astype(np.float32)
    if draw(st.booleans()):
        logits = np.rint(logits)  # with ties
    # Not a mass that a set of ties could have to the last bit.
    top_p, temperature = (
        st.sampled_from([1.0, 0.951, 0.803, 0.4999, 0.0101]),
        st.sampled_from([1.0, 0.5, 1.7]),
    )
    choice = sampling(top_k=draw(st.integers(2, 15)), top_p=draw(top_p), temperature=draw(temperature))
    return logits, rng.random(shape[:2]), choice


@given(cases(), st.integers(0, 100))
def test_tokens_are_those_of_the_published_filter(case: Any, seed: int) -> None:
    """Against a literal reading, ties included; the largest weight is 1. The token is where the cumulated
    mass passes the number. Permuted rows give permuted tokens, and one row alone gives its token."""
    logits, numbers, choice = case
    tokens = choose(logits, numbers, choice)
    assert (tokens.shape, tokens.dtype) == (numbers.shape, np.int64)
    filtered = weights(logits.reshape(-1, logits.shape[-1]), choice).reshape(logits.shape)
    for place in np.ndindex(*numbers.shape):
        np.testing.assert_allclose(filtered[place], literal_weights(logits[place], choice), rtol=1e-12)
        assert filtered[place].max() == 1.0
        assert tokens[place] == literal_token(filtered[place], numbers[place])
        assert filtered[place][tokens[place]] > 0
    order = np.random.default_rng(seed).permutation(len(logits))
    np.testing.assert_array_equal(choose(logits[order], numbers[order], choice), tokens[order])
    np.testing.assert_array_equal(choose(logits[:1, :1], numbers[:1, :1], choice), tokens[:1, :1])


@given(cases())
def test_one_candidate_is_the_largest_logit(case: Any) -> None:
    """Top-k 1 takes it whatever the number; so does a top-p below its probability."""
    logits, numbers, _ = case
    np.testing.assert_array_equal(choose(logits, numbers, GREEDY), logits.argmax(-1))
    sure = (logits + 50 * (np.arange(logits.shape[-1]) == 1)).astype(np.float32)
    assert (choose(sure, numbers, sampling(top_p=0.5)) == 1).all()


def test_tokens_follow_the_filtered_distribution() -> None:
    """A chi-square over 40,000 draws lies within five standard deviations; what is filtered out never
    comes."""
    logits = (1.5 * np.random.default_rng(1).standard_normal(40)).astype(np.float32)
    for top_k, top_p, temperature in ((100, 1.0, 1.0), (100, 0.9, 1.0), (12, 1.0, 1.5), (12, 0.8, 0.7)):
        choice = sampling(top_k=top_k, top_p=top_p, temperature=temperature)
        numbers = uniform_numbers(9, range(400), 100)
        tokens = choose(np.broadcast_to(logits, (400, 100, 40)), numbers, choice)
        mass = weights(logits[None], choice)[0]
        kept, expected = mass > 0, mass / mass.sum() * tokens.size
        counts = np.bincount(tokens.ravel(), minlength=40)
        assert (counts[~kept] == 0).all()
        chi = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
        freedom = kept.sum() - 1
        assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_what_top_p_and_top_k_keep() -> None:
    """Top-p keeps the token that crosses it and no more: of the probabilities 1/2, 1/4, 1/8 and 1/8, in an
    order in which position says nothing. Top-k keeps the largest of many, more than a sort does in one go.
    Top-p of one keeps a token too small to change the sum of all."""
    wanted = np.array([0.25, 1, 0.25, 0.5])
    for top_p, kept in ((0.49, 1), (0.5, 1), (0.501, 2), (0.75, 2), (0.76, 4), (0.9, 4), (0.999, 4)):
        choice = sampling(top_k=9, top_p=top_p, temperature=float(1 / np.log(2)))
        mass = weights(np.array([[-2, 0, -2, -1]], np.float32), choice)[0]
        np.testing.assert_array_equal(mass, np.where(wanted >= np.sort(wanted)[-kept], wanted, 0))
    logits = np.random.default_rng(0).permutation(1000).astype(np.float32)
    np.testing.assert_array_equal(weights(logits[None], sampling(temperature=50.0))[0] > 0, logits >= 900)
    mass = weights(np.array([[-50, 0]], np.float32), sampling(top_k=2))[0]
    np.testing.assert_allclose(mass, [np.exp(-50.0), 1])


def test_a_number_of_zero_draws_the_first_token_that_is_left() -> None:
    """And one just below 1 the last: those filtered out in front and behind never come."""
    logits = np.array([[[0, 5, 4, 0], [5, 0, 0, 4]]], np.float32)
    assert choose(logits, np.zeros((1, 2)), sampling(top_k=2)).tolist() == [[1, 0]]
    assert choose(logits, np.full((1, 2), np.nextafter(1, 0)), sampling(top_k=2)).tolist() == [[2, 3]]


def test_more_logits_than_are_chosen_from_at_once() -> None:
    """VAR's last scale from three images on. Sixteen equal logits a position, at a place of its own: the
    number says which, floor(16 u)."""
    batch, positions, codes = 3, 256, 4096
    assert batch * positions * codes > module.CHUNK
    first = (37 * np.arange(batch * positions) % 255 * 16).reshape(batch, positions)
    logits = np.full((batch, positions, codes), -1e9, np.float32)
    np.put_along_axis(logits, first[..., None] + np.arange(16), 0, axis=-1)
    numbers = uniform_numbers(1, range(batch), positions)
    tokens = choose(logits, numbers, sampling(top_k=codes))
    np.testing.assert_array_equal(tokens, first + np.floor(16 * numbers))


def test_logits_that_are_not_finite_are_refused() -> None:
    """In one row of two; a row may have some, but not all, of minus infinity."""
    for where, bad in ((2, np.nan), (2, np.inf), (slice(None), -np.inf)):
        logits = np.zeros((1, 2, 4), np.float32)
        logits[0, 1, where] = bad
        with pytest.raises(BackendError) as caught:
            choose(logits, np.zeros((1, 2)), GREEDY)
        assert caught.value.message == "the teacher's logits are not finite"
        assert caught.value.hint == "Try another precision of the bundle."


class Spy:
    """The toy graph in ONNX Runtime; remembers what it was fed."""

    def __init__(self, root: Path) -> None:
        self.session = onnxruntime.InferenceSession(root / "teacher.onnx", providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_outputs()]
        self.feeds: list[dict[str, Any]] = []
        self.addresses: set[int] = set()

    def __call__(self, feeds: Any) -> dict[str, np.ndarray]:
        self.feeds.append({name: array.copy() for name, array in feeds.items()})
        self.addresses.add(feeds["key_0"].ctypes.data)
        assert all(array.flags.c_contiguous for array in feeds.values())
        return dict(zip(self.names, self.session.run(self.names, dict(feeds)), strict=True))


@pytest.fixture
def spy(shared_teacher_bundle: Path) -> Spy:
    return Spy(shared_teacher_bundle)


@pytest.fixture(scope="module")
def teacher(shared_teacher_bundle: Path) -> Any:
    return read_manifest(shared_teacher_bundle).teacher


@pytest.mark.parametrize("choice", [GREEDY, sampling(guidance_scale=1.5, top_k=4, top_p=0.9)])
def test_the_cache_changes_nothing(choice: Sampling, teacher: Any, spy: Spy) -> None:
    """The graph with its cache draws what a loop draws that computes everything again in every AR step."""
    labels, scale = np.array([0, 1, 2, 1]), choice.guidance_scale
    for start, end in ((0, 6), (0, 2), (1, 4), (2, 4), (4, 6), (2, 6)):
        rng, span, counts = np.random.default_rng(0), Span(start=start, end=end), list[int]()
        prefix, numbers = rng.integers(0, 5, (4, start)), rng.random((4, 6))
        pick = by_uniforms(numbers, choice)
        drawn = generate(spy, teacher, span, prefix, {"label": labels}, scale, pick, counts.append)
        tokens, passes = np.zeros((4, 6), np.int64), list[tuple[int, int]]()
        tokens[:, :start] = prefix
        for first, last in teacher.steps(span):
            passes.append((passes[-1][1] if passes else 0, last))
            g = teacher.guidance_scale(first, scale)
            logits = toy.without_cache(tokens, labels, g, passes)[:, first:last]
            tokens[:, first:last] = choose(logits, numbers[:, first:last], choice)
        np.testing.assert_array_equal(drawn, tokens[:, :end])
        assert counts == [4] * len(passes)


def test_what_the_graph_is_fed(teacher: Any, spy: Spy) -> None:
    """The first pass carries the prefix, guidance rises, and the same buffers are fed every time, as large as
    the span."""
    prefix = np.array([[3], [4]])
    generate(spy, teacher, Span(start=1, end=6), prefix, {"label": np.array([2, 0])}, 2.0, LARGEST)
    assert [feeds["positions"].tolist() for feeds in spy.feeds] == [[0, 1], [2, 3], [4, 5]]
    assert [feeds["filled"].tolist() for feeds in spy.feeds] == [[0], [2], [4]]
    guidance = [[np.float32(2 * k / 3)] * 2 for k in (1, 2, 3)]
    assert [feeds["guidance"].tolist() for feeds in spy.feeds] == guidance
    assert {str(feeds["guidance"].dtype) for feeds in spy.feeds} == {"float32"}
    assert spy.feeds[0]["tokens"].tolist() == [[3, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]]
    assert spy.feeds[0]["key_0"].shape == (2, 2, 1, 6, 2)
    assert len(spy.addresses) == 1
    assert all(np.isfinite(feeds["value_0"]).all() for feeds in spy.feeds)
    nothing, label = np.zeros((1, 0), int), {"label": np.array([0])}
    generate(spy, teacher, Span(start=0, end=2), nothing, label, 2.0, LARGEST)
    assert spy.feeds[-1]["key_0"].shape == (2, 1, 1, 2, 2)


def test_the_cache_of_many_layers_keeps_them_apart(teacher: Any) -> None:
    many = module.HostCache(replace(teacher, layers=3, heads=2, head_width=5), 4, 7)
    assert list(many.feeds) == ["key_0", "value_0", "key_1", "value_1", "key_2", "value_2"]
    rows = {f"new_{name}": np.full((2, 4, 2, 3, 5), n, np.float32) for n, name in enumerate(many.feeds, 1)}
    many.append(rows, 2, 5)
    for number, array in enumerate(many.feeds.values(), 1):
        assert (array.shape, array.dtype) == ((2, 4, 2, 7, 5), np.float32)
        assert (array[:, :, :, 2:5] == number).all() and array.sum() == 2 * 4 * 2 * 3 * 5 * number


# What a request may ask for

AFTER_TEACHER = Schedule(known=(4,), teacher=Span(start=0, end=4))


def test_what_a_request_may_ask_for(teacher: Any) -> None:
    """The bundle has the last word only where the request has none; an option without effect is refused."""
    assert sampling_of(AFTER_TEACHER, teacher, {}) == Sampling(2.0, 4, 0.9, 1.0)
    others = {"top_p": None, "uniforms": np.zeros(3), "teacher_start": 0}
    given = {"guidance_scale": 0, "top_k": np.int64(7), **others}
    assert sampling_of(AFTER_TEACHER, teacher, given) == Sampling(0, 7, 0.9, 1.0)
    assert sampling_of(AFTER_TEACHER, teacher, {"temperature": 3, "top_p": 1.0}) == Sampling(2.0, 4, 1.0, 3)
    nan, infinity = float("nan"), float("inf")
    for name, values, rule in (
        ("guidance_scale", (-0.1, nan, infinity), "a finite number of at least 0"),
        ("top_k", (0, 2.5, True), "an integer of at least 1"),
        ("top_p", (0.0, 1.1, nan), "above 0 and at most 1"),
        ("temperature", (0.0, infinity, nan), "a finite number above 0"),
    ):
        for value in values:
            with pytest.raises(ScheduleError) as caught:
                sampling_of(AFTER_TEACHER, teacher, {name: value})
            assert caught.value.message == f"{name} must be {rule}, but is {value}"
            assert caught.value.hint == "Leave it out to take the bundle's own."
    with pytest.raises(TypeError) as unknown:
        sampling_of(AFTER_TEACHER, teacher, {"sead": None, "nose": 1})
    assert str(unknown.value) == "a pipeline takes no argument called nose, sead"
    for schedule, one in ((Schedule(known=(0,)), teacher), (AFTER_TEACHER, None)):
        assert sampling_of(schedule, one, {"top_k": None}) is None
        with pytest.raises(ScheduleError) as caught:
            sampling_of(schedule, one, {"guidance_scale": 1.0, "uniforms": np.zeros(3)})
        for_steps = "can only be given for steps that use the teacher"
        assert caught.value.message == f"guidance_scale, uniforms {for_steps}"
        assert caught.value.hint == "Choose such steps, or leave it out."


def test_uniform_numbers_that_are_others() -> None:
    module.check_uniforms(np.zeros((2, 3)), 2, 3)
    shape = "must be a float64 array of shape (2, 3), but are"
    rows = [(np.full((2, 3), value), "must be from 0 to below 1") for value in (1.0, -1e-9, np.nan)]
    rows += [
        (np.zeros((2, 3), np.float32), f"{shape} float32 (2, 3)"),
        (np.zeros((2, 4)), f"{shape} float64 (2, 4)"),
    ]
    for uniforms, message in [*rows, ([[0.0] * 3] * 2, f"{shape} <class 'list'>")]:
        with pytest.raises(NoiseError) as caught:
            module.check_uniforms(uniforms, 2, 3)
        assert caught.value.message == f"the uniform numbers {message}"
        remedy = "Correct them" if "below 1" in message else "Give one for each image and position"
        assert caught.value.hint == f"{remedy}, or leave them out."


# Nearest codes and the codebook


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 6))
def test_nearest_codes(seed: int, codes: int, width: int) -> None:
    """By the distance itself; an entry is nearest to itself."""
    rng = np.random.default_rng(seed)
    codebook = rng.standard_normal((codes, width)).astype(np.float32)
    vectors = rng.standard_normal((2, 3, width)).astype(np.float32)
    distances = ((vectors[:, :, None].astype(np.float64) - codebook) ** 2).sum(-1)
    nearest = np.take_along_axis(distances, nearest_codes(vectors, codebook)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nearest, distances.min(-1), rtol=1e-4, atol=1e-5)
    itself = nearest_codes(codebook[None], codebook)[0]
    np.testing.assert_allclose(codebook[itself], codebook, atol=1e-3)  # or one that is as near in float32
    assert nearest_codes(vectors[:, :0], codebook).shape == (2, 0)


def test_nearest_codes_of_more_than_are_compared_at_once() -> None:
    """Every entry is nearest to itself, a bit beside it as well."""
    codebook = np.stack([np.arange(4096), -np.arange(4096)], axis=1).astype(np.float32)
    chosen = np.random.default_rng(0).permutation(4096).reshape(2, 2048)
    assert chosen.size * len(codebook) > module.CHUNK
    np.testing.assert_array_equal(nearest_codes(codebook[chosen] + np.float32(0.2), codebook), chosen)


def test_a_codebook_that_is_another_array(teacher_bundle: Path) -> None:
    path, other = teacher_bundle / "codebook.npy", "codebook.npy is not float32 of shape (5, 4)"
    assert module.read_codebook(teacher_bundle, read_manifest(teacher_bundle)).shape == (5, 4)
    wrong = [(np.zeros((5, 4)), other), (np.zeros((4, 4), np.float32), other)]
    for array, message in [*wrong, (np.array([None]), "codebook.npy is not an npy file: ")]:
        np.save(path, array, allow_pickle=True)
        toy.put_file(teacher_bundle, "codebook.npy", path.read_bytes())
        with pytest.raises(BundleError) as caught:
            module.read_codebook(teacher_bundle, read_manifest(teacher_bundle))
        assert caught.value.message.startswith(message)
        assert caught.value.hint.startswith("The bundle is damaged")


def test_guidance_of_the_families(teacher: Any) -> None:
    """VAR: from 0 in the first scale to cfg in the last. LlamaGen: cfg - 1 everywhere, and never below 0."""
    assert [teacher.guidance_scale(start, 3.0) for start in (0, 1, 2, 4)] == [0, 1, 2, 3]
    assert replace(teacher, starts=(0, 6)).guidance_scale(0, 3.0) == 0
    constant = replace(teacher, guidance="constant")
    assert [constant.guidance_scale(start, 3.0) for start in (0, 4)] == [2, 2]
    assert constant.guidance_scale(0, 0.5) == 0
