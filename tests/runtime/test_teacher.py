"""Tokens from a teacher: what can be drawn, what is drawn, and a loop with a cache that changes nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from ddexport.runtime.bundle import FileInfo, Schedule, Span, read_manifest
from ddexport.runtime.errors import BackendError, BundleError, NoiseError, ScheduleError
from ddexport.runtime.noise import uniform_numbers
from ddexport.runtime.teacher import (
    CHUNK,
    Choice,
    Sampling,
    by_stream,
    check_uniforms,
    choice_of,
    choose,
    draw,
    nearest_codes,
    read_codebook,
    weights,
)

GREEDY = Choice(cfg=2.0, top_k=1, top_p=1.0, temperature=1.0)
LARGEST = by_stream(np.zeros((9, 6)), GREEDY)


def literal_weights(logits: np.ndarray, choice: Choice) -> np.ndarray:
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
def cases(draw: DrawFn) -> tuple[np.ndarray, np.ndarray, Choice]:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 12)))
    logits = (3 * rng.standard_normal(shape)).astype(np.float32)
    if draw(st.booleans()):
        logits = np.rint(logits)  # with ties
    choice = Choice(
        cfg=1.0,
        top_k=draw(st.integers(2, 15)),
        # Not a mass that a set of ties could have to the last bit.
        top_p=draw(st.sampled_from([1.0, 0.951, 0.803, 0.4999, 0.0101])),
        temperature=draw(st.sampled_from([1.0, 0.5, 1.7])),
    )
    return logits, rng.random(shape[:2]), choice


@given(cases())
def test_the_filter_is_the_published_one(case: Any) -> None:
    """Against a literal reading, ties included; the largest weight is 1."""
    logits, _, choice = case
    rows = logits.reshape(-1, logits.shape[-1])
    found = weights(rows, choice)
    for row, mass in zip(rows, found, strict=True):
        np.testing.assert_allclose(mass, literal_weights(row, choice), rtol=1e-12)
        assert mass.max() == 1.0


@given(cases())
def test_the_token_is_where_the_cumulated_mass_passes_the_number(case: Any) -> None:
    logits, numbers, choice = case
    tokens = choose(logits, numbers, choice)
    assert (tokens.shape, tokens.dtype) == (numbers.shape, np.int64)
    for place in np.ndindex(*numbers.shape):
        mass = weights(logits[place][None], choice)[0]
        assert tokens[place] == literal_token(mass, numbers[place])
        assert mass[tokens[place]] > 0


@given(cases(), st.integers(0, 100))
def test_no_position_sees_another(case: Any, seed: int) -> None:
    """Permuted rows give permuted tokens, and one row alone gives its token."""
    logits, numbers, choice = case
    order = np.random.default_rng(seed).permutation(len(logits))
    whole = choose(logits, numbers, choice)
    np.testing.assert_array_equal(choose(logits[order], numbers[order], choice), whole[order])
    np.testing.assert_array_equal(choose(logits[:1, :1], numbers[:1, :1], choice), whole[:1, :1])


@given(cases())
def test_one_candidate_is_the_largest_logit(case: Any) -> None:
    """Top-k 1 takes it whatever the number; so does a top-p below its probability."""
    logits, numbers, _ = case
    np.testing.assert_array_equal(choose(logits, numbers, GREEDY), logits.argmax(-1))
    sure = logits + 50 * (np.arange(logits.shape[-1]) == 1)
    alone = Choice(cfg=1.0, top_k=100, top_p=0.5, temperature=1.0)
    assert (choose(sure.astype(np.float32), numbers, alone) == 1).all()


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(100, 1.0, 1.0), (100, 0.9, 1.0), (12, 1.0, 1.5), (12, 0.8, 0.7)]
)
def test_tokens_follow_the_filtered_distribution(top_k: int, top_p: float, temperature: float) -> None:
    """A chi-square over 40,000 draws by the stream lies within five standard deviations; what is filtered out
    never comes."""
    choice = Choice(cfg=1.0, top_k=top_k, top_p=top_p, temperature=temperature)
    logits = (1.5 * np.random.default_rng(1).standard_normal(40)).astype(np.float32)
    numbers = uniform_numbers(9, range(400), 100)
    tokens = choose(np.broadcast_to(logits, (400, 100, 40)), numbers, choice)
    mass = weights(logits[None], choice)[0]
    expected = mass / mass.sum() * tokens.size
    counts = np.bincount(tokens.ravel(), minlength=40)
    assert (counts[mass == 0] == 0).all()
    kept = mass > 0
    chi = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.49, 1), (0.5, 1), (0.501, 2), (0.75, 2), (0.76, 4), (0.9, 4), (0.999, 4)]
)
def test_top_p_keeps_the_token_that_crosses_it_and_no_more(top_p: float, kept: int) -> None:
    """Of the probabilities 1/2, 1/4, 1/8 and 1/8, in an order in which position says nothing."""
    choice = Choice(cfg=1.0, top_k=9, top_p=top_p, temperature=float(1 / np.log(2)))
    mass = weights(np.array([[-2, 0, -2, -1]], np.float32), choice)[0]
    wanted = np.array([0.25, 1, 0.25, 0.5])
    np.testing.assert_array_equal(mass, np.where(wanted >= np.sort(wanted)[-kept], wanted, 0))


def test_top_k_keeps_the_largest_of_many_and_top_p_of_one_everything() -> None:
    """More than a sort does in one go; and a token too small to change the sum of all."""
    logits = np.random.default_rng(0).permutation(1000).astype(np.float32)
    mass = weights(logits[None], Choice(cfg=1.0, top_k=100, top_p=1.0, temperature=50.0))[0]
    np.testing.assert_array_equal(mass > 0, logits >= 900)
    mass = weights(np.array([[-50, 0]], np.float32), Choice(cfg=1.0, top_k=2, top_p=1.0, temperature=1.0))[0]
    np.testing.assert_allclose(mass, [np.exp(-50.0), 1])


def test_a_number_of_zero_draws_the_first_token_that_is_left() -> None:
    """And one just below 1 the last: those filtered out in front and behind never come."""
    logits = np.array([[[0, 5, 4, 0], [5, 0, 0, 4]]], np.float32)
    choice = Choice(cfg=1.0, top_k=2, top_p=1.0, temperature=1.0)
    assert choose(logits, np.zeros((1, 2)), choice).tolist() == [[1, 0]]
    assert choose(logits, np.full((1, 2), np.nextafter(1, 0)), choice).tolist() == [[2, 3]]


def test_more_logits_than_are_chosen_from_at_once() -> None:
    """VAR's last scale from three images on. Sixteen equal logits a position, at a place of its own: the
    number says which, floor(16 u)."""
    batch, positions, codes = 3, 256, 4096
    assert batch * positions * codes > CHUNK
    first = (37 * np.arange(batch * positions) % 255 * 16).reshape(batch, positions)
    logits = np.full((batch, positions, codes), -1e9, np.float32)
    np.put_along_axis(logits, first[..., None] + np.arange(16), 0, axis=-1)
    numbers = uniform_numbers(1, range(batch), positions)
    choice = Choice(cfg=1.0, top_k=codes, top_p=1.0, temperature=1.0)
    np.testing.assert_array_equal(choose(logits, numbers, choice), first + np.floor(16 * numbers))


@pytest.mark.parametrize(("where", "bad"), [(2, np.nan), (2, np.inf), (slice(None), -np.inf)])
def test_logits_that_are_not_finite_are_refused(where: Any, bad: float) -> None:
    """In one row of two; a row may have some, but not all, of minus infinity."""
    logits = np.zeros((1, 2, 4), np.float32)
    logits[0, 1, where] = bad
    with pytest.raises(BackendError) as caught:
        choose(logits, np.zeros((1, 2)), GREEDY)
    assert caught.value.message == "the teacher's logits are not finite"
    assert caught.value.hint == "Try another precision of the bundle."


class Spy:
    """The toy graph in ONNX Runtime; remembers what it was fed."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_outputs()]
        self.feeds: list[dict[str, Any]] = []
        self.addresses: list[int] = []

    def __call__(self, feeds: Any) -> dict[str, np.ndarray]:
        self.feeds.append({name: array.copy() for name, array in feeds.items()})
        self.addresses.append(feeds["key_0"].ctypes.data)
        assert all(array.flags.c_contiguous for array in feeds.values())
        return dict(zip(self.names, self.session.run(self.names, dict(feeds)), strict=True))


@pytest.fixture(scope="module")
def teacher(shared_teacher_bundle: Path) -> Any:
    return read_manifest(shared_teacher_bundle).teacher


def literal_draw(
    toy: Any, teacher: Any, span: Span, prefix: np.ndarray, labels: np.ndarray, u: np.ndarray, choice: Choice
) -> np.ndarray:
    """The loop without a cache: everything is computed again in every AR step."""
    tokens = np.zeros((len(labels), 6), np.int64)
    tokens[:, : span.start] = prefix
    passes: list[tuple[int, int]] = []
    for start, end in teacher.steps(span):
        passes.append((passes[-1][1] if passes else 0, end))
        g = teacher.strength(start, choice.cfg)
        logits = toy.without_cache(tokens, labels, g, passes)[:, start:end]
        tokens[:, start:end] = choose(logits, u[:, start:end], choice)
    return tokens[:, : span.end]


@pytest.mark.parametrize("span", [Span(0, 6), Span(0, 2), Span(1, 4), Span(2, 4), Span(4, 6), Span(2, 6)])
@pytest.mark.parametrize("choice", [GREEDY, Choice(cfg=1.5, top_k=4, top_p=0.9, temperature=1.2)])
def test_the_cache_changes_nothing(
    span: Span, choice: Choice, toy_teacher: Any, teacher: Any, shared_teacher_bundle: Path
) -> None:
    """The graph with its cache draws what a computation without one draws, from any start to any end."""
    rng = np.random.default_rng(0)
    labels, prefix = np.array([0, 1, 2, 1]), rng.integers(0, 5, (4, span.start))
    numbers = rng.random((4, 6))
    spy, counts = Spy(shared_teacher_bundle / "teacher.onnx"), []
    tokens = draw(spy, teacher, span, prefix, labels, choice.cfg, by_stream(numbers, choice), counts.append)
    np.testing.assert_array_equal(
        tokens, literal_draw(toy_teacher, teacher, span, prefix, labels, numbers, choice)
    )
    np.testing.assert_array_equal(tokens[:, : span.start], prefix)
    assert counts == [4] * len(teacher.steps(span))


def test_what_the_graph_is_fed(teacher: Any, shared_teacher_bundle: Path) -> None:
    """The first pass carries the prefix, guidance rises, and the same buffers are fed every time."""
    spy = Spy(shared_teacher_bundle / "teacher.onnx")
    prefix = np.array([[3], [4]])
    draw(spy, teacher, Span(1, 6), prefix, np.array([2, 0]), 2.0, LARGEST)
    assert [feeds["positions"].tolist() for feeds in spy.feeds] == [[0, 1], [2, 3], [4, 5]]
    assert [feeds["filled"].tolist() for feeds in spy.feeds] == [[0], [2], [4]]
    assert [feeds["guidance"].tolist() for feeds in spy.feeds] == [
        [np.float32(2 * k / 3)] * 2 for k in (1, 2, 3)
    ]
    assert spy.feeds[0]["tokens"].tolist() == [[3, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]]
    assert spy.feeds[0]["key_0"].shape == (2, 2, 1, 6, 2)
    assert len(set(spy.addresses)) == 1
    assert all(np.isfinite(feeds["value_0"]).all() for feeds in spy.feeds)


def test_the_cache_is_as_large_as_the_span(teacher: Any, shared_teacher_bundle: Path) -> None:
    spy = Spy(shared_teacher_bundle / "teacher.onnx")
    draw(spy, teacher, Span(0, 2), np.zeros((1, 0), int), np.array([0]), 2.0, LARGEST)
    assert spy.feeds[0]["key_0"].shape == (2, 1, 1, 2, 2)


def test_an_image_does_not_depend_on_its_batch(teacher: Any, shared_teacher_bundle: Path) -> None:
    """Drawn by the stream: image 5 is the same alone and among others."""
    spy = Spy(shared_teacher_bundle / "teacher.onnx")
    choice = Choice(cfg=2.0, top_k=5, top_p=1.0, temperature=3.0)
    labels, none = np.arange(9) % 3, np.zeros((9, 0), int)
    whole = draw(
        spy, teacher, Span(0, 6), none, labels, 2.0, by_stream(uniform_numbers(1, range(9), 6), choice)
    )
    one = draw(
        spy, teacher, Span(0, 6), none[5:6], labels[5:6], 2.0, by_stream(uniform_numbers(1, [5], 6), choice)
    )
    np.testing.assert_array_equal(one, whole[5:6])
    assert len(np.unique(whole, axis=0)) > 3  # the draws differ, so that the equality above says something


# What a request may ask for


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": -0.1}, "cfg must be a finite number of at least 0"),
        ({"cfg": float("nan")}, "cfg must be"),
        ({"cfg": float("inf")}, "cfg must be"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, but is 0"),
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"temperature": float("inf")}, "temperature must be"),
    ],
)
def test_a_value_out_of_range_says_so(change: dict[str, Any], message: str, teacher: Any) -> None:
    with pytest.raises(ScheduleError, match=message):
        choice_of(Schedule((4,), None, Span(0, 4)), teacher, Sampling(**change))


def test_the_bundle_has_the_last_word_only_where_the_request_has_none(teacher: Any) -> None:
    schedule = Schedule((4,), None, Span(0, 4))
    assert choice_of(schedule, teacher, Sampling()) == Choice(2.0, 4, 0.9, 1.0)
    assert choice_of(schedule, teacher, Sampling(cfg=0, top_k=7)) == Choice(0, 7, 0.9, 1.0)


def test_an_option_without_effect_is_refused(teacher: Any) -> None:
    for steps, one in ((Schedule((0,)), teacher), (Schedule((0,)), None)):
        assert choice_of(steps, one, Sampling()) is None
        with pytest.raises(
            ScheduleError, match="cfg, top_k can only be given for steps that involve"
        ) as caught:
            choice_of(steps, one, Sampling(cfg=1.0, top_k=2))
        assert caught.value.hint == "Choose such steps, or leave it out."


@pytest.mark.parametrize(
    ("uniforms", "message"),
    [
        (np.zeros((2, 3), np.float32), "must be a float64 array of shape (2, 3), but are float32 (2, 3)"),
        (np.zeros((2, 4)), "must be a float64 array of shape (2, 3), but are float64 (2, 4)"),
        ([[0.0] * 3] * 2, "must be a float64 array of shape (2, 3), but are <class 'list'>"),
        (np.full((2, 3), 1.0), "must be from 0 to below 1"),
        (np.full((2, 3), -1e-9), "must be from 0 to below 1"),
        (np.full((2, 3), np.nan), "must be from 0 to below 1"),
    ],
)
def test_uniform_numbers_that_are_others(uniforms: Any, message: str) -> None:
    check_uniforms(np.zeros((2, 3)), 2, 3)
    with pytest.raises(NoiseError) as caught:
        check_uniforms(uniforms, 2, 3)
    assert caught.value.message == f"the uniform numbers {message}"


# Nearest codes and the codebook


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 6))
def test_nearest_codes(seed: int, codes: int, width: int) -> None:
    """By the distance itself; an entry is nearest to itself."""
    rng = np.random.default_rng(seed)
    codebook = rng.standard_normal((codes, width)).astype(np.float32)
    vectors = rng.standard_normal((2, 3, width)).astype(np.float32)
    distances = ((vectors[:, :, None].astype(np.float64) - codebook) ** 2).sum(-1)
    chosen = np.take_along_axis(distances, nearest_codes(vectors, codebook)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(-1), rtol=1e-4, atol=1e-5)
    assert nearest_codes(codebook[None], codebook).tolist() == [list(range(codes))]
    assert nearest_codes(vectors[:, :0], codebook).shape == (2, 0)


def test_nearest_codes_of_more_than_are_compared_at_once() -> None:
    """Every entry is nearest to itself, a bit beside it as well."""
    codebook = np.stack([np.arange(4096), -np.arange(4096)], axis=1).astype(np.float32)
    chosen = np.random.default_rng(0).permutation(4096).reshape(2, 2048)
    assert chosen.size * len(codebook) > CHUNK
    np.testing.assert_array_equal(nearest_codes(codebook[chosen] + np.float32(0.2), codebook), chosen)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 4)), "is not float32 of shape"),
        (np.zeros((4, 4), np.float32), "is not float32 of shape"),
        (np.array([None]), "is not an npy file"),
    ],
)
def test_a_codebook_that_is_another_array(array: np.ndarray, message: str, teacher_bundle: Path) -> None:
    np.save(teacher_bundle / "codebook.npy", array, allow_pickle=True)
    with pytest.raises(BundleError, match=message) as caught:
        read_codebook(teacher_bundle, read_manifest_unchecked(teacher_bundle))
    assert caught.value.hint.startswith("The bundle is damaged")


def read_manifest_unchecked(root: Path) -> Any:
    """The manifest with the size that the codebook has now."""
    path = root / "bundle.json"
    content = json.loads(path.read_text())
    content["teacher"]["codebook"]["bytes"] = (root / "codebook.npy").stat().st_size
    path.write_text(json.dumps(content))
    return read_manifest(root, verify=False)


def test_strengths_of_the_families(teacher: Any) -> None:
    """VAR: from 0 in the first scale to cfg in the last. LlamaGen: cfg - 1 everywhere, and never below 0."""
    assert [teacher.strength(start, 3.0) for start in (0, 1, 2, 4)] == [0, 1, 2, 3]
    constant = dataclasses.replace(teacher, guidance="constant", codebook=FileInfo("a", "b", 1))
    assert [constant.strength(start, 3.0) for start in (0, 4)] == [2, 2]
    assert constant.strength(0, 0.5) == 0
