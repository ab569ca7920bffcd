"""The cast: regions in half, islands in float32, borders in float32, for every part of both families."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from ddexport.families import family
from ddexport.families._checkpoint import connect, random_part
from ddexport.precision.cast import DTYPES, PrecisionError, check_patterns, in_precision, regions
from ddexport.precision.policy import lies_in
from ddexport.recipe import Recipe, load_recipe

GOLDEN = Path(__file__).parents[2] / "golden"
HALVES = ("fp16", "bf16")


@pytest.fixture(scope="module", params=["var-dd-small", "llamagen-dd-small"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load_recipe(str(GOLDEN / request.param / "recipe.yaml"))


@pytest.fixture(scope="module")
def parts(recipe: Recipe) -> dict[str, nn.Module]:
    found = {role: random_part(recipe, role, 0) for role in family(recipe.family).roles}
    connect(found["student"], found["tokenizer"])
    found["student"].tabulate()  # type: ignore[operator]
    return found


def feeds(recipe: Recipe, role: str) -> tuple[torch.Tensor, ...]:
    size, label = recipe.sequence, torch.tensor([1, 7])
    sequence = torch.randn(2, size.length, size.width, generator=torch.Generator().manual_seed(0))
    if role == "student":
        return sequence, label, torch.tensor([0, 5])
    if role == "tokenizer":
        return (sequence,)
    if recipe.family == "var_dd":
        return sequence, label
    return torch.arange(2 * size.length).view(2, -1) % size.codebook, label


@torch.no_grad()
def run(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    out = module(*inputs)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("role", ["student", "tokenizer", "teacher"])
class TestTypes:
    def test_weights_are_half_inside_the_regions_alone(
        self, recipe: Recipe, parts: dict[str, nn.Module], role: str, precision: str
    ) -> None:
        """The exponent of VAR's scale is an island; the encoder, which no graph has, is left alone."""
        half = in_precision(parts[role], precision)
        inside = [path for path, _ in regions(half)]
        assert inside
        for name, tensor in half.state_dict().items():
            wanted = lies_in(name, inside) and not name.endswith("log_scale")
            assert tensor.dtype == (DTYPES[precision] if wanted else torch.float32), name
            assert not (wanted and name.startswith("encoder."))

    def test_float32_tensors_are_shared_and_the_source_is_as_it_was(
        self, recipe: Recipe, parts: dict[str, nn.Module], role: str, precision: str
    ) -> None:
        """A cast copy costs the memory of its half weights, no more."""
        source = parts[role]
        before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        half = in_precision(source, precision)
        for name, tensor in half.state_dict().items():
            mine = source.state_dict()[name]
            assert torch.equal(mine, before[name])
            assert (tensor.data_ptr() == mine.data_ptr()) == (tensor.dtype == torch.float32), name
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in source.modules())

    def test_inputs_and_outputs_are_float32_and_near(
        self, recipe: Recipe, parts: dict[str, nn.Module], role: str, precision: str
    ) -> None:
        inputs = feeds(recipe, role)
        unit = 2**-11 if precision == "fp16" else 2**-8
        outputs = zip(
            run(in_precision(parts[role], precision), inputs), run(parts[role], inputs), strict=True
        )
        for got, wanted in outputs:
            if wanted.dtype == torch.int64:  # the student's tokens
                assert got.dtype == torch.int64
                continue
            assert got.dtype == torch.float32
            error = (got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            assert 0 < error < 20 * unit

    def test_what_crosses_a_border_is_float32(
        self, recipe: Recipe, parts: dict[str, nn.Module], role: str, precision: str
    ) -> None:
        """Streams, norms, heads: every module outside the regions is given and gives float32 alone."""
        half = in_precision(parts[role], precision)
        inside = [path for path, _ in regions(half)]
        seen: set[torch.dtype] = set()
        for name, module in half.named_modules():
            if not lies_in(name, inside):
                module.register_forward_hook(
                    lambda m, a, out: seen.update(
                        t.dtype for t in (*a, out) if isinstance(t, torch.Tensor) and t.is_floating_point()
                    )
                )
        run(half, tuple(feeds(recipe, role)))
        # The mask is the one tensor that is handed down to the regions in their own type.
        assert seen - {torch.float32} <= ({DTYPES[precision]} if role != "tokenizer" else set())
        for name, module in half.named_modules():
            if name.endswith(("norm1", "norm2", "attention_norm", "mlp_norm")) or name == "norm_out":
                assert all(p.dtype == torch.float32 for p in module.parameters())


def test_fp32_is_the_module_itself(parts: dict[str, nn.Module]) -> None:
    assert in_precision(parts["student"], "fp32", ("blocks.*",)) is parts["student"]


class TestKeep:
    def kept(self, module: nn.Module, *patterns: str) -> set[str]:
        state = in_precision(module, "fp16", patterns).state_dict()
        everything = in_precision(module, "fp16").state_dict()
        return {n for n, t in state.items() if t.dtype != everything[n].dtype}

    def test_a_block(self, parts: dict[str, nn.Module]) -> None:
        """`blocks.1.*`, and `blocks.1` too, keep all of it, and nothing else."""
        student = parts["student"]
        found = self.kept(student, "blocks.1.*")
        assert found == self.kept(student, "blocks.1")
        assert found == {
            n for n in student.state_dict() if n.startswith("blocks.1.")
            and "norm" not in n and "log_scale" not in n
        }  # fmt: skip

    @pytest.mark.parametrize("leaf", ["attention.qkv", "attention.proj", "mlp.*"])
    def test_a_matrix_inside_a_region(self, recipe: Recipe, parts: dict[str, nn.Module], leaf: str) -> None:
        """It computes in float32 between half neighbours, and the student gets nearer to float32."""
        student, inputs = parts["student"], feeds(recipe, "student")
        found = self.kept(student, f"blocks.*.{leaf}")
        assert found
        assert all(f".{leaf.removesuffix('.*')}" in name for name in found)
        logits = run(in_precision(student, "bf16", (f"blocks.*.{leaf}",)), inputs)[2]
        assert logits.isfinite().all()

    def test_everything(self, recipe: Recipe, parts: dict[str, nn.Module]) -> None:
        inputs = feeds(recipe, "student")
        for role in ("student", "tokenizer"):
            module = in_precision(parts[role], "bf16", ("blocks.*", "decoder.*", "post_quant_conv", "mask"))
            inputs = feeds(recipe, role)
            for got, wanted in zip(run(module, inputs), run(parts[role], inputs), strict=True):
                assert torch.equal(got, wanted)

    def test_a_pattern_without_a_match(self, parts: dict[str, nn.Module]) -> None:
        with pytest.raises(PrecisionError, match=r"--keep-fp32 block\.1\.\* matches no module") as caught:
            check_patterns(parts.values(), ["blocks.0.*", "block.1.*"])
        assert "did you mean blocks.1" in caught.value.hint

    def test_a_pattern_for_what_is_float32_anyway(self, parts: dict[str, nn.Module]) -> None:
        with pytest.raises(PrecisionError, match="logits_head matches no module that would be half"):
            check_patterns(parts.values(), ["logits_head"])

    def test_patterns_that_match(self, parts: dict[str, nn.Module]) -> None:
        check_patterns(parts.values(), ["blocks.?.mlp", "decoder.levels.*", "post_quant_conv", "blocks.0"])


class TestOverflow:
    @pytest.fixture
    def student(self, parts: dict[str, nn.Module]) -> nn.Module:
        student = copy.deepcopy(parts["student"])
        with torch.no_grad():
            student.blocks[1].attention.qkv.weight[3, 4] = -7e4
        return student

    def test_it_names_the_tensor_and_the_ways_out(self, student: nn.Module) -> None:
        with pytest.raises(PrecisionError) as caught:
            in_precision(student, "fp16", part="student")
        assert caught.value.message == (
            "student: blocks.1.attention.qkv.weight holds 70000, past the largest number of fp16, 65504"
        )
        assert "--keep-fp32 'blocks.1.attention.qkv'" in caught.value.hint
        assert "--precision bf16" in caught.value.hint

    def test_the_ways_out_work(self, recipe: Recipe, student: nn.Module) -> None:
        inputs = feeds(recipe, "student")
        wanted = run(student, inputs)[2]
        kept = run(in_precision(student, "fp16", ("blocks.1.attention",)), inputs)[2]
        assert (kept - wanted).abs().max() < 0.05 * wanted.abs().max()
        in_precision(student, "fp16", ("blocks.1.attention.qkv",))
        assert run(in_precision(student, "bf16"), inputs)[2].isfinite().all()
