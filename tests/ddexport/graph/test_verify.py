"""The verifier lets good graphs out and no other: every difference is found, and only ties are excused."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ddexport.bundle import WeightRequest, load_parts
from ddexport.graph.spec import BATCHES, GraphSpec, graph_specs
from ddexport.graph.verify import Agreement, compare, trial, verify_graph
from ddexport.recipe import Recipe
from ddexport.runtime.errors import VerificationError

Arrays = dict[str, np.ndarray]
Fault = Callable[[Arrays, Arrays], None]


@pytest.fixture(scope="module")
def parts(golden_recipe: Recipe) -> dict[str, torch.nn.Module]:
    return load_parts(golden_recipe, WeightRequest({}, random_seed=0))


@pytest.fixture
def verify(golden_recipe: Recipe, parts: dict[str, torch.nn.Module]) -> Callable[..., list[Agreement]]:
    """verify(role, fault): the module against itself, its outputs changed by fault(feeds, outputs)."""

    def run(role: str, fault: Fault = lambda feeds, outputs: None) -> list[Agreement]:
        spec = next(s for s in graph_specs(golden_recipe) if s.role == role)

        def engine(feeds: Arrays) -> Arrays:
            with torch.no_grad():
                out = parts[spec.part](*(torch.from_numpy(v) for v in feeds.values()))
            out = out if isinstance(out, tuple) else (out,)
            arrays = {t.name: v.numpy().copy() for t, v in zip(spec.outputs, out, strict=True)}
            fault(feeds, arrays)
            return arrays

        expected = trial(parts[spec.part], spec, golden_recipe)
        return verify_graph({b: engine(expected.batch(b)[0]) for b in BATCHES}, expected, spec)

    return run


def change(name: str, place: tuple[object, ...], amount: float) -> Fault:
    def fault(feeds: Arrays, outputs: Arrays) -> None:
        outputs[name][place] += amount

    return fault


def test_the_module_agrees_with_itself(verify: Callable[..., list[Agreement]]) -> None:
    """Every output at every batch size is compared."""
    found = verify("student") + verify("decoder")
    assert [(a.output, a.batch) for a in found] == [
        *((name, b) for b in BATCHES for name in ("sequence", "tokens", "logits")),
        *(("image", b) for b in BATCHES),
    ]
    assert all(a.passed and a.error < 1e-5 for a in found)


FAULTS: dict[str, tuple[str, Fault, str]] = {
    "one regressed number": ("student", change("sequence", (0, -1, 0), 0.1), "sequence"),
    "one token": ("student", change("sequence", (0, 0), 0.5), "sequence"),
    "one logit": ("student", change("logits", (0, 3, 7), 0.1), "logits"),
    "one pixel": ("decoder", change("image", (0, 2, 63, 63), 0.01), "image"),
    "a last row": ("decoder", change("image", (-1, 0, 0, 0), 0.01), "image"),
    "not a number": ("student", change("sequence", (0, 9, 1), np.nan), "sequence"),
    "infinity": ("student", change("logits", (0, 0, 0), np.inf), "logits"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_difference_is_found(verify: Callable[..., list[Agreement]], name: str) -> None:
    role, fault, output = FAULTS[name]
    with pytest.raises(
        VerificationError, match=f"{role}: {output} differs from the PyTorch module"
    ) as caught:
        verify(role, fault)
    assert caught.value.exit_code == 3
    assert "nothing was written" in caught.value.hint


@pytest.mark.parametrize("batch", BATCHES)
def test_a_graph_that_is_right_at_some_batch_sizes_alone(
    verify: Callable[..., list[Agreement]], batch: int
) -> None:
    """A trace can freeze the batch it was made with."""

    def fault(feeds: Arrays, outputs: Arrays) -> None:
        if len(feeds["sequence"]) == batch:
            outputs["image"] += 1

    with pytest.raises(VerificationError, match=f"at batch {batch}"):
        verify("decoder", fault)


def test_a_graph_that_ignores_known_is_found(verify: Callable[..., list[Agreement]]) -> None:
    """`known` differs within the batch, so that a graph which reads one row's for all is wrong."""

    def fault(feeds: Arrays, outputs: Arrays) -> None:
        same = np.full_like(feeds["known"], feeds["known"].max())
        is_known = np.arange(30)[None, :] < same[:, None]
        outputs["sequence"] = np.where(is_known[..., None], feeds["latents"], outputs["sequence"])

    with pytest.raises(VerificationError, match="sequence"):
        verify("student", fault)


def test_the_worst_is_reported_with_its_limit(verify: Callable[..., list[Agreement]]) -> None:
    with pytest.raises(VerificationError) as caught:
        verify("decoder", change("image", (0, 0, 0, 0), 0.5))
    error = re.search(r"by (\S+) at batch \d, allowed are 1e-04", caught.value.message)
    assert error is not None
    assert float(error[1]) == pytest.approx(0.5, rel=0.1)


class TestTies:
    """Where the two best logits are as close as rounding, another token is no fault; elsewhere it is."""

    spec = GraphSpec("student", "student", (), (), tolerance=1e-3)

    def arrays(self, gap: float) -> Arrays:
        logits = np.zeros((1, 2, 4), np.float32)
        logits[0, :, 0] = 1.0
        logits[0, 0, 1] = 1.0 - gap
        sequence = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
        return {"sequence": sequence, "logits": logits}

    def flipped(self, wanted: Arrays, position: int) -> Arrays:
        """The second-best token at the position, as a graph would give it that rounds differently."""
        got = {name: value.copy() for name, value in wanted.items()}
        got["logits"][0, position, 1] = got["logits"][0, position, 0] + 1e-6
        got["sequence"][0, position] += 5
        return got

    def failures(self, got: Arrays, wanted: Arrays) -> set[str]:
        return {a.output for a in compare(got, wanted, self.spec, 1) if not a.passed}

    def test_a_tie_is_excused(self) -> None:
        wanted = self.arrays(gap=1e-4)
        assert self.failures(self.flipped(wanted, 0), wanted) == set()

    def test_another_token_without_a_tie_is_not(self) -> None:
        wanted = self.arrays(gap=0.1)
        assert self.failures(self.flipped(wanted, 0), wanted) == {"sequence", "logits"}

    def test_a_tie_excuses_its_own_position_alone(self) -> None:
        wanted = self.arrays(gap=1e-4)
        got = self.flipped(wanted, 0)
        got["sequence"][0, 3] += 5
        assert self.failures(got, wanted) == {"sequence"}

    def test_a_wrong_embedding_of_the_right_token_is_not_excused(self) -> None:
        wanted = self.arrays(gap=1e-4)
        got = {name: value.copy() for name, value in wanted.items()}
        got["sequence"][0, 0] += 5
        assert self.failures(got, wanted) == {"sequence"}

    @pytest.mark.parametrize("value", [0.0, 2.5])
    def test_a_constant_output_proves_nothing(self, value: float) -> None:
        """A module whose output is dead would agree with any graph that is dead too."""
        wanted = {"image": np.full((1, 3, 4, 4), value, np.float32)}
        assert self.failures(wanted, wanted) == {"image"}
