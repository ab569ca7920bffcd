"""The verifier lets good graphs out and no other: every difference is found, only ties are excused, and what
is measured of reduced graphs is what hand-made numbers say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ddexport.export import WeightRequest, load_parts
from ddexport.graph.spec import BATCHES, GraphSpec, graph_specs
from ddexport.graph.verify import OutputError, compare, faults_of, output_errors, trial
from ddexport.recipe import Limits, Recipe
from ddexport.runtime.errors import VerificationError

Arrays = dict[str, np.ndarray]
Fault = Callable[[Arrays, Arrays], None]
Verify = Callable[..., list[OutputError]]
LIMITS = Limits(token_margin=0.1, embedding_error=0.01, image_psnr=40.0, image_max=3)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def modules(golden_recipe: Recipe) -> dict[str, tuple[torch.nn.Module, GraphSpec, Any]]:
    """Of student and decoder: the module, what its graph is like, and the trial, by role."""
    parts = load_parts(golden_recipe, WeightRequest({}, random_seed=0))
    return {
        spec.role: (parts[spec.part], spec, trial(parts[spec.part], spec, golden_recipe))
        for spec in graph_specs(golden_recipe)
    }


@pytest.fixture
def verify(modules: dict[str, tuple[torch.nn.Module, GraphSpec, Any]]) -> Verify:
    """verify(role, fault, ...): the module against itself, its outputs changed by fault(feeds, outputs)."""

    def run(role: str, fault: Fault = lambda feeds, outputs: None, **options: object) -> list[OutputError]:
        module, spec, (inputs, wanted) = modules[role]

        def graph(feeds: Arrays) -> Arrays:
            with torch.no_grad():
                out = module(*(torch.from_numpy(v) for v in feeds.values()))
            out = out if isinstance(out, tuple) else (out,)
            arrays = {t.name: v.numpy().copy() for t, v in zip(spec.outputs, out, strict=True)}
            fault(feeds, arrays)
            return arrays

        return compare(graph, inputs, wanted, spec, f"{role}.onnx", **options)  # type: ignore[arg-type]

    return run


def change(name: str, place: tuple[object, ...], amount: float) -> Fault:
    def fault(feeds: Arrays, outputs: Arrays) -> None:
        outputs[name][place] += amount

    return fault


def ignore_known(feeds: Arrays, outputs: Arrays) -> None:
    """As a graph that reads one row's `known` for the whole batch."""
    known = np.arange(30)[None, :] < feeds["known"].max()
    outputs["sequence"] = np.where(known[..., None], feeds["latents"], outputs["sequence"])


def test_the_module_agrees_with_itself(verify: Verify) -> None:
    """Every output at every batch size is compared."""
    found = verify("student") + verify("decoder")
    names = [(name, batch) for batch in BATCHES for name in ("sequence", "logits")]
    assert [(e.output, e.batch) for e in found] == [*names, *(("image", b) for b in BATCHES)]
    assert all(e.relative < 1e-5 and not e.copied and not e.differing for e in found)


@pytest.mark.parametrize(
    ("role", "fault", "where"),
    [
        ("student", change("sequence", (0, -1, 0), 0.1), "sequence"),
        ("student", change("sequence", (0, 0), 0.5), "sequence.*copied"),
        ("student", change("logits", (0, 3, 7), 0.1), "logits"),
        ("student", change("tokens", (0, 1), 1), "tokens"),
        ("student", ignore_known, "sequence"),
        ("student", change("sequence", (0, 9, 1), np.nan), "sequence.*row 0"),
        ("student", change("logits", (-1, 0, 0), np.inf), "logits"),
        ("decoder", change("image", (0, 2, 63, 63), 0.01), "image"),
        ("decoder", change("image", (-1, 0, 0, 0), 0.01), "image"),
        ("decoder", lambda _, outputs: outputs["image"][-1].fill(0), "image is constant"),
    ],
)
def test_a_difference_is_found(verify: Verify, role: str, fault: Fault, where: str) -> None:
    with pytest.raises(VerificationError, match=rf"^{role}\.onnx.*{where}"):
        verify(role, fault)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_graph_that_is_right_at_some_batch_sizes_alone(verify: Verify, batch: int) -> None:
    """A trace can freeze the batch it was made with."""
    with pytest.raises(VerificationError, match=rf"at batch {batch}, limit 0.0001"):
        verify("decoder", lambda feeds, outputs: outputs["image"].__iadd__(len(feeds["sequence"]) == batch))


def test_a_dead_module_proves_nothing(golden_recipe: Recipe) -> None:
    """It would agree with any graph that is dead too."""

    dead: Any = lambda sequence: torch.full((len(sequence), 3, 64, 64), 2.5)  # noqa: E731
    with pytest.raises(VerificationError):
        trial(dead, graph_specs(golden_recipe)[1], golden_recipe)


@pytest.mark.parametrize(("precision", "option"), [("bf16", "--keep-fp32"), ("int8", "--calibration")])
def test_reduced_graphs_have_the_recipes_limits(verify: Verify, precision: str, option: str) -> None:
    options = {"precision": precision, "limits": LIMITS}
    verify("decoder", change("image", (0, 0, 0, 0), 0.01), **options)
    with pytest.raises(VerificationError, match=r"8-bit difference 2[56] at batch 1") as caught:
        verify("decoder", change("image", (0, 0, 0, 0), 0.1), **options)
    assert option in caught.value.hint


def student(batch: int = 2, gap: float = 0.05) -> Arrays:
    """Four positions of width 2, the first two from a codebook of 3; position 1 is `gap` from a tie."""
    logits = np.tile(np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 2.0 - gap]], np.float32), (batch, 1, 1))
    return {"sequence": np.ones((batch, 4, 2), np.float32), "logits": logits}


def errors(
    *changes: tuple[str, tuple[int, ...], float],
    gap: float = 0.05,
    margin: float | None = LIMITS.token_margin,
) -> dict[str, OutputError]:
    """Of the student above in a batch of a first and a second step, after adding numbers to what it gave."""
    got = student(gap=gap)
    for name, place, amount in changes:
        got[name][place] += amount
    found = output_errors(got, student(gap=gap), np.array([0, 2]), margin, TOLERANCE)
    return {e.output: e for e in found}


class TestMeasures:
    def test_the_worst_row_counts(self) -> None:
        """One regressed number of one image: 0.2 of four numbers of size 1 -> 0.1, the good row apart. Equal
        outputs have no error."""
        for same in errors().values():
            assert (same.batch, same.rms, same.largest, same.relative) == (2, 0.0, 0.0, 0.0)
            assert faults_of(same, LIMITS, TOLERANCE) == []
        error = errors(("sequence", (0, 3, 1), 0.2))["sequence"]
        assert (error.rms, error.largest) == (pytest.approx(0.1), pytest.approx(0.2))
        assert faults_of(error, LIMITS, TOLERANCE)

    def test_what_is_copied_is_exact_in_every_precision(self) -> None:
        """Codebook entries of the same token, and known positions; it is no error of an embedding."""
        for place in ((0, 1, 1), (1, 0, 0)):
            error = errors(("sequence", place, 0.01))["sequence"]
            assert error.rms == 0 and error.copied == pytest.approx(0.01, rel=1e-3)
            assert "copied" in faults_of(error, LIMITS, TOLERANCE)[0]

    def test_a_token_that_differs(self) -> None:
        """Position 1 is close: float32 was undecided, and its entry is another. Position 0 is not."""
        close = errors(("logits", (0, 1, 2), 0.06), ("sequence", (0, 1, 0), 5.0))
        assert (close["logits"].compared, close["logits"].differing, close["logits"].excused) == (2, 1, 1)
        assert not [f for error in close.values() for f in faults_of(error, LIMITS, TOLERANCE)]
        clear = errors(("logits", (0, 0, 1), 2.5))["logits"]
        assert (clear.differing, clear.excused) == (1, 0)
        assert any("tokens" in fault for fault in faults_of(clear, LIMITS, TOLERANCE))
        assert errors(("logits", (1, 0, 1), 2.5))["logits"].differing == 0, "that token is kept"
        wrong = faults_of(errors(("logits", (0, 1, 2), 0.2))["logits"], LIMITS, TOLERANCE)
        assert any("of a logit 0.2" in fault for fault in wrong), "a tie does not excuse the logits"

    @pytest.mark.parametrize(("gap", "excused"), [(1e-4, True), (0.01, False)])
    def test_float32_excuses_ties_alone(self, gap: float, excused: bool) -> None:
        """Where the two best logits are as close as rounding; a tie excuses its own position and no other."""
        flip = (("logits", (0, 1, 2), gap + 1e-6), ("sequence", (0, 1, 0), 5.0))
        found = errors(*flip, gap=gap, margin=None)
        assert (not [f for e in found.values() for f in faults_of(e, None, TOLERANCE)]) == excused
        beside = errors(*flip, ("sequence", (0, 3, 0), 5.0), gap=gap, margin=None)["sequence"]
        assert faults_of(beside, None, TOLERANCE)

    def test_psnr_and_bits_are_of_the_worst_image(self) -> None:
        """0.01 everywhere is 40 dB. Equal images have a number too: JSON has no infinity."""
        wanted = {"image": np.full((2, 3, 4, 4), 0.5, np.float32)}
        for amount, psnr, bits in ((0.01, 40.0, {2, 3}), (0.0, 200.0, {0})):
            got = wanted["image"].copy()
            got[1] += amount
            (error,) = output_errors({"image": got}, wanted, None, 0.0, TOLERANCE)
            assert error.psnr == pytest.approx(psnr, abs=1e-3) and error.bits8 in bits

    def test_limits_are_named_and_what_is_no_number_is_past_them(self) -> None:
        bad = faults_of(OutputError("image", 3, 0.1, 0.1, 0.1, psnr=30.0, bits8=9), LIMITS, TOLERANCE)
        assert [fault.rpartition(" ")[2] for fault in bad] == ["40", "3"]
        nan = float("nan")
        for limits in (LIMITS, None):
            assert len(faults_of(OutputError("sequence", 1, nan, nan, 0.0), limits, TOLERANCE)) == 1
