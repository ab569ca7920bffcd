"""The cast: regions in half, islands in float32, borders in float32, for every part of both families."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ddexport.families._checkpoint import connect, random_part
from ddexport.precision.cast import DTYPES, PrecisionError, check_patterns, in_precision, regions
from ddexport.precision.policy import lies_in
from ddexport.recipe import Recipe
from tests.goldens import LLAMAGEN, VAR

Parts = dict[str, nn.Module]


@pytest.fixture(scope="module", params=[VAR, LLAMAGEN], ids=lambda family: family.name)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param.recipe()


@pytest.fixture(scope="module")
def parts(recipe: Recipe) -> Parts:
    found = {role: random_part(recipe, role, 0) for role in recipe.roles}
    connect(found["student"], found["tokenizer"])
    found["student"].tabulate()  # type: ignore[operator]
    return found


def feeds(recipe: Recipe, role: str) -> tuple[Tensor, ...]:
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
def run(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = module(*inputs)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("role", ["student", "tokenizer", "teacher"])
def test_types(recipe: Recipe, parts: Parts, role: str, precision: str) -> None:
    """Weights are half inside the regions alone. The exponent of VAR's scale is an island; norms, and the
    encoder, which no graph has, are float32. Float32 tensors are shared: a cast copy costs the memory of its
    half weights. The source stays.

    Streams, norms, heads, inputs and outputs: every module outside the regions is given and gives float32
    alone; and the result is near that of float32."""
    source, inputs = parts[role], feeds(recipe, role)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    half = in_precision(source, precision)
    inside = [path for path, _ in regions(half)]
    assert inside
    for name, tensor in half.state_dict().items():
        wanted = lies_in(name, inside) and not name.endswith("log_scale")
        assert tensor.dtype == (DTYPES[precision] if wanted else torch.float32), name
        assert not (wanted and (name.startswith("encoder.") or "norm" in name)), name
        mine = source.state_dict()[name]
        assert torch.equal(mine, before[name])
        assert (tensor.data_ptr() == mine.data_ptr()) == (not wanted), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in source.modules())

    seen: set[torch.dtype] = set()

    def note(_: nn.Module, arguments: tuple[object, ...], out: object) -> None:
        tensors = (*arguments, *(out if isinstance(out, tuple) else (out,)))
        seen.update(t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point())

    for name, module in half.named_modules():
        if not lies_in(name, inside):
            module.register_forward_hook(note)
    outputs = run(half, inputs)
    # The mask is the one tensor that is handed down to the regions in their own type.
    assert seen - {torch.float32} <= ({DTYPES[precision]} if role != "tokenizer" else set())
    for got, full in zip(outputs, run(source, inputs), strict=True):
        assert got.dtype == full.dtype
        if full.is_floating_point():
            error = (got - full).square().mean().sqrt() / full.square().mean().sqrt()
            assert 0 < error < 20 * {"fp16": 2**-11, "bf16": 2**-8}[precision]


class TestKeep:
    def test_what_a_pattern_names_is_float32_and_nothing_else(self, recipe: Recipe, parts: Parts) -> None:
        """Whole blocks, and matrices inside a region, which compute between half neighbours."""
        types = in_precision(parts["student"], "bf16").state_dict()
        for pattern, named in (
            ("blocks.1.*", "blocks.1."),
            ("blocks.1", "blocks.1."),
            ("blocks.*.attention.qkv", ".attention.qkv."),
            ("blocks.*.attention.proj", ".attention.proj."),
            ("blocks.*.mlp.*", ".mlp."),
        ):
            kept = in_precision(parts["student"], "bf16", (pattern,))
            found = {name for name, t in kept.state_dict().items() if t.dtype != types[name].dtype}
            assert found == {n for n, t in types.items() if named in n and t.dtype == torch.bfloat16} != set()
            assert run(kept, feeds(recipe, "student"))[2].isfinite().all()

    def test_patterns(self, parts: Parts) -> None:
        """One without a match is refused, with a guess, and one for what is float32 anyway."""
        check_patterns(parts.values(), ["blocks.?.mlp", "decoder.levels.*", "post_quant_conv", "blocks.0"])
        for pattern, guess in (("block.1.*", "blocks.1"), ("logits_head", "")):
            with pytest.raises(PrecisionError, match=pattern) as caught:
                check_patterns(parts.values(), ["blocks.0.*", pattern])
            assert guess in caught.value.hint


def test_a_weight_that_overflows(recipe: Recipe, parts: Parts) -> None:
    """It is named, with the ways out: they work."""
    student, inputs = copy.deepcopy(parts["student"]), feeds(recipe, "student")
    with torch.no_grad():
        student.blocks[1].attention.qkv.weight[3, 4] = -7e4  # type: ignore[index, union-attr]
    with pytest.raises(PrecisionError, match=r"student: blocks\.1\.attention\.qkv\.weight .*70000") as caught:
        in_precision(student, "fp16", part="student")
    assert "--keep-fp32 'blocks.1.attention.qkv'" in caught.value.hint
    assert "--precision bf16" in caught.value.hint
    in_precision(student, "fp16", ("blocks.1.attention.qkv",))
    assert run(in_precision(student, "bf16"), inputs)[2].isfinite().all()
    wanted = run(student, inputs)[2]
    kept = run(in_precision(student, "fp16", ("blocks.1.attention",)), inputs)[2]
    assert (kept - wanted).abs().max() < 0.05 * wanted.abs().max()
