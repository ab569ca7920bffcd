"""Exact rewrites: the modules of the graphs compute what the modules of the reference compute, and engines
find the operators that make them faster."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from ddexport.export import WeightRequest, load_parts
from ddexport.families import family
from ddexport.families._var_blocks import attend_in_groups
from ddexport.families._vq_codec import ChannelNorm, TransposedUpsample, Upsample
from ddexport.families.var_dd import VarStudent
from ddexport.graph.spec import graph_specs, sample_inputs
from ddexport.graph.verify import faults_of, output_errors
from ddexport.graph.wrappers import graph_part
from ddexport.precision.cast import check_patterns, regions
from ddexport.recipe import Recipe, load_recipe
from ddexport.runtime.bundle import read_manifest

Parts = dict[str, Any]
SMALL_GROUPS = 6  # scales 1 and 2 and the class position end here: small models have groups too


@pytest.fixture(scope="module", params=["golden", "random var", "random llamagen"])
def model(request: pytest.FixtureRequest, golden_recipe: Recipe, golden_files: dict[str, Path]) -> Any:
    """A recipe and its parts."""
    if request.param == "golden":
        return golden_recipe, load_parts(golden_recipe, WeightRequest(golden_files))
    recipe = load_recipe("digits-llamagen") if "llamagen" in request.param else golden_recipe
    return recipe, load_parts(recipe, WeightRequest({}, random_seed=3))


@torch.no_grad()
def outputs(parts: Parts, recipe: Recipe) -> dict[str, Tensor]:
    """Both outputs of the student in a batch of both steps, its logits at another split, and what the decoder
    makes of random vectors before it cuts them to [0, 1]."""
    given = sample_inputs(graph_specs(recipe)[0], recipe, batch=2, seed=1)
    tensors = [torch.from_numpy(value) for value in given.values()]
    student, tokenizer = parts["student"], parts["tokenizer"]
    sequence, _, logits = student(*tensors)
    pixels = tokenizer.decoder(tokenizer.post_quant_conv(tokenizer.latent(tensors[0])))
    split = student.at_split(14)(*tensors)[2]  # a copy that shares the blocks: their mask must fit too
    return {"sequence": sequence, "logits": logits, "split": split, "pixels": pixels}


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrites see groups in models of four scales, as they do at real size."""
    whole = VarStudent.attend_in_groups
    monkeypatch.setattr(VarStudent, "attend_in_groups", lambda self: whole(self, SMALL_GROUPS))


@pytest.mark.parametrize(
    ("role", "norms"), [("student", ""), ("tokenizer", "reduce"), ("tokenizer", "instance")]
)
@pytest.mark.usefixtures("small_groups")
def test_the_rewritten_part_computes_the_same(model: Any, role: str, norms: str) -> None:
    """Sequences, logits and pixels stay, to 1e-5; and what was loaded stays as it is, for it is what graphs
    are compared with."""
    recipe, parts = model
    before = {name: value.clone() for name, value in parts[role].state_dict().items()}
    kinds = [type(module) for module in parts[role].modules()]
    form = graph_part(parts[role], "fp32", group_norm=norms)
    wanted, got = outputs(parts, recipe), outputs({**parts, role: form}, recipe)
    assert any(isinstance(module, ChannelNorm) for module in form.modules()) == (norms == "reduce")
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert kinds == [type(module) for module in parts[role].modules()]
    assert all(torch.equal(value, before[name]) for name, value in parts[role].state_dict().items())


class TestAttention:
    def test_groups(self) -> None:
        """Models of 256x256 have ten scales: seven of them stay together, the others attend by themselves.
        Small models stay as they are."""
        for name, groups, n in (("var-d16", (0, 92, 156, 256, 425, 681), 92), ("digits-var", (), 31)):
            with torch.device("meta"):
                student: Any = family("var_dd").build(load_recipe(name), "student")
            student.attend_in_groups()
            assert {block.attention.groups for block in student.blocks} == {groups}
            assert student.mask.shape == (n, n)

    def test_is_attention_with_the_mask(self) -> None:
        """Wherever the first group ends, in float64: the same to the last digits."""
        for first in (1, 2, 6, 15):
            student: Any = family("var_dd").build(load_recipe("digits-var"), "student")
            q, k, v = torch.randn(3, 2, 3, 31, 8, dtype=torch.float64).unbind()
            wanted = (q @ k.transpose(-2, -1) + student.mask.double()).softmax(-1) @ v
            student.attend_in_groups(first)
            groups = student.blocks[0].attention.groups
            assert groups[1] == first
            got = attend_in_groups(q, k, v, student.mask.double(), groups)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    @pytest.mark.usefixtures("small_groups")
    def test_half_stays_within_the_limits(self, precision: str) -> None:
        """The score of a position with itself is a sum of products that are rounded one by one: trained
        weights, both steps."""
        recipe = load_recipe("digits-var")
        parts = load_parts(recipe, WeightRequest({}))
        spec, limits = graph_specs(recipe)[0], recipe.parity.limits(precision)
        given = sample_inputs(spec, recipe, batch=4, seed=2)

        def run(module: nn.Module) -> dict[str, np.ndarray]:
            with torch.no_grad():
                sequence, _, logits = module(*map(torch.from_numpy, given.values()))
            return {"sequence": sequence.numpy(), "logits": logits.numpy()}

        wanted, got = run(parts["student"]), run(graph_part(parts["student"], precision))
        errors = output_errors(got, wanted, given["known"], limits.token_margin, spec.tolerance)
        assert max(error.rms for error in errors) > 0
        assert not [fault for error in errors for fault in faults_of(error, limits, spec.tolerance)]


class TestDecoder:
    def test_upsampling_is_the_same_to_the_border(self) -> None:
        """In float64, one pixel included, where every tap but four is in the border. Summed weights are
        rounded once: 1 + 2^-24 - 1 is 2^-24, and not 0 as in float32 sums."""
        for side in (1, 2, 5):
            plain = Upsample(6).double().requires_grad_(False)
            x = torch.randn(2, 6, side, side, dtype=torch.float64)
            torch.testing.assert_close(TransposedUpsample(plain)(x), plain(x), rtol=0, atol=1e-14)
        plain = Upsample(1).requires_grad_(False)
        plain.conv.weight.zero_()
        plain.conv.weight[0, 0, 1:, 1:] = torch.tensor([[1.0, 2.0**-24], [-1.0, 0.0]])
        assert float(TransposedUpsample(plain).conv.weight[0, 0, 1, 1]) == 2.0**-24

    def test_a_norm_far_from_zero(self) -> None:
        """Two passes: a mean of squares less the square of the mean has no digits left here."""
        torch.manual_seed(0)
        norm = nn.GroupNorm(32, 64, eps=1e-6).requires_grad_(False)
        norm.weight.normal_()
        norm.bias.normal_()
        x = torch.randn(2, 64, 8, 8) + 3000
        wanted = copy.deepcopy(norm).double()(x.double())
        error = (ChannelNorm(norm)(x) - wanted).abs().max()
        assert error < 2 * max(float((norm(x) - wanted).abs().max()), 1e-4)
        square = x.view(2, 32, -1).square().mean(-1) - x.view(2, 32, -1).mean(-1).square()
        assert (square - 1).abs().max() > 0.5

    def test_paths_stay(self, golden_recipe: Recipe) -> None:
        """What is half, and what --keep-fp32 names, does not depend on the rewrites."""
        tokenizer = load_parts(golden_recipe, WeightRequest({}, random_seed=3))["tokenizer"]
        form = graph_part(tokenizer, "fp32")
        assert [path for path, _ in regions(form)] == [path for path, _ in regions(tokenizer)]
        check_patterns([form], ["decoder.levels.*.resample"])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_engines_find_the_operators(half_bundle: Path, precision: str) -> None:
    """Weights are direct inputs of ConvTranspose, where quantisers and engines look for them, and it computes
    in the precision of the graph; in bf16, which TensorRT-RTX has none in, doubling stays."""
    nodes = list(ir.load(half_bundle / read_manifest(half_bundle).graph("decoder", precision).file).graph)
    upsampling = [node for node in nodes if node.op_type == "ConvTranspose"]
    modes = [node.attributes["mode"].as_string() for node in nodes if node.op_type == "Resize"]
    assert (bool(upsampling), "nearest" in modes) == (precision != "bf16", precision == "bf16")
    types = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
    for node in upsampling:
        assert all(value is not None and value.is_initializer() for value in node.inputs[1:])
        assert node.outputs[0].dtype == types[precision]
    assert not {"InstanceNormalization", "GroupNormalization"} & {node.op_type for node in nodes}
