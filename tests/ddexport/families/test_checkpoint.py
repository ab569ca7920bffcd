"""Checkpoints are untrusted: each way in which a file can be wrong is refused, and none can run code."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddexport.families._checkpoint import CheckpointError, copy_taken, load_part, random_part, save_part
from ddexport.families._llamagen_blocks import rotary_table
from ddexport.families._weight_file import fingerprint, read_weights
from ddexport.recipe import embedded_weights, load_recipe
from tests.goldens import BOTH, LLAMAGEN, VAR, Golden, close

State = dict[str, Tensor]
Load = Callable[..., Any]
HEAD = {VAR.name: "head.weight", LLAMAGEN.name: "output.weight"}


def state_of(family: Golden) -> State:
    """The student's published tensors."""
    raw = torch.load(family.files["student"], weights_only=True)
    return dict(raw["trainer"]["ema_parameters"] if family is VAR else raw["ema"])


@pytest.fixture
def state() -> State:
    return state_of(VAR)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(data): writes `data` with torch.save and loads it as the golden VAR's student."""

    def save_and_load(
        data: Any, weights: str | None = None, family: Golden = VAR, role: str = "student", **options: Any
    ) -> torch.nn.Module:
        torch.save(data, tmp_path / "checkpoint.pth", **options)
        return load_part(family.recipe(), role, tmp_path / "checkpoint.pth", weights)

    return save_and_load


def refused(call: Callable[[], object], *texts: str) -> CheckpointError:
    """The error of a call that has to be refused, with these texts in its message or hint."""
    with pytest.raises(CheckpointError) as caught:
        call()
    for text in texts:
        assert text in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.hint
    return caught.value


class TestWhereTheWeightsAre:
    """A file is searched for the recipe's model: it may be published, or written by some trainer."""

    WRAPS = [
        lambda s: s,
        lambda s: {"module." + k: v for k, v in s.items()},
        lambda s: {"_orig_mod.module." + k: v for k, v in s.items()},
        lambda s: {"n_averaged": torch.tensor(3), **{"module." + k: v for k, v in s.items()}},
        lambda s: {"_fsdp_wrapped_module.model." + k: v for k, v in s.items()},
        lambda s: {"state_dict": {**{"net." + k: v for k, v in s.items()}, "loss.scale": torch.ones(1)}},
        lambda s: {"epoch": 3, "trainer": {"var_opt": {"state": {0: {"step": torch.ones(1)}}}, "net": s}},
        lambda s: {k: v.double() for k, v in s.items()},
        lambda s: {k.replace("s.1.", "s.1._checkpoint_wrapped_module."): v for k, v in s.items()},
        # LlamaGen's training code keeps its parsed command line.
        lambda s: {"ema": s, "args": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(a=[1, "x"]))},
        lambda s: {"module": {k: v + 1 for k, v in s.items()}, "ema": s},  # the default comes first
    ]

    @pytest.mark.parametrize("wrap", WRAPS)
    def test_the_recipes_model_is_found(self, load: Load, wrap: Callable[[State], Any]) -> None:
        """In files of both families."""
        for family in (VAR, LLAMAGEN):
            state = state_of(family)
            close(load(wrap(state), family=family).logits_head.weight, state[HEAD[family.name]].float(), 0)

    def test_torchs_old_format_and_no_choice_where_there_is_one_copy(self, load: Load, state: State) -> None:
        for weights in ("ema", "model"):
            module = load({"module": state}, weights, _use_new_zipfile_serialization=False)
            assert torch.equal(module.logits_head.bias, state["head.bias"].float())

    @pytest.mark.parametrize(("role", "place"), [("teacher", "model"), ("tokenizer", "trainer.vae_local")])
    def test_a_trainers_file_is_teacher_and_tokenizer(self, tmp_path: Path, role: str, place: str) -> None:
        """As VAR's training code writes it; a name given for the student's file does not matter here."""
        teacher, vae = (torch.load(VAR.files[r], weights_only=True) for r in ("teacher", "tokenizer"))
        path, recipe = tmp_path / "ar-ckpt-last.pth", VAR.recipe()
        torch.save({"trainer": {"config": {}, "var_wo_ddp": teacher, "vae_local": vae}}, path)
        wanted = VAR.part(role).state_dict()
        for weights in (None, "ema_parameters"):
            found = load_part(recipe, role, path, weights).state_dict()
            assert all(torch.equal(wanted[key], value) for key, value in found.items())
            assert copy_taken(recipe, role, path, weights) == place

    def test_one_of_several_is_named(self, load: Load, state: State) -> None:
        data = {"a": {"c": {key: value + 1 for key, value in state.items()}}, "raw": {"b": state}}
        refused(lambda: load(data), "a.c, raw.b", "--weights")
        refused(lambda: load(data, "a.b"), "a.c, raw.b")
        for name in ("raw.b", "b", "other,b"):
            assert torch.equal(load(data, name).logits_head.bias, state["head.bias"].float())

    def test_the_wrong_copy_is_not_taken_silently(self, load: Load, state: State) -> None:
        """Images of the raw weights would only be worse. The copy asked for may be missing or damaged."""
        refused(lambda: load({"trainer": {"ema_parameters": state}}, "model"), "trainer.ema_parameters")
        refused(lambda: load({"model": state, "steps": 1}, "ema"), "--weights model")
        load({"model": state, "steps": 1})
        damaged = {key: value for key, value in state.items() if "blocks.1." not in key}
        data = {"trainer": {"ema_parameters": damaged, "var_wo_ddp": state}}
        refused(lambda: load(data), "ema_parameters", "1 blocks")
        load(data, "model")

    @pytest.mark.parametrize("index", [True, False])
    def test_shards(self, state: State, tmp_path: Path, index: bool) -> None:
        """By index or directory; a shard that is missing, that holds something else, or alone is refused."""
        path, names, recipe = tmp_path, [f"model-{i}-of-2.safetensors" for i in (1, 2)], VAR.recipe()
        places = {key: names[i % 2] for i, key in enumerate(state)}
        for name in names:
            save_file({k: state[k] for k in places if places[k] == name}, tmp_path / name)
        if index:
            path = tmp_path / "model.safetensors.index.json"
            path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        module = load_part(recipe, "student", path)
        assert torch.equal(module.logits_head.bias, state["head.bias"].float())
        files = sorted(tmp_path.iterdir())
        lines = "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)
        sha256 = hashlib.sha256(lines.encode()).hexdigest()  # of the output of sha256sum
        assert fingerprint(path) == fingerprint(tmp_path) == (sha256, sum(f.stat().st_size for f in files))
        refused(lambda: load_part(recipe, "student", tmp_path / names[0]), "directory")
        save_file({"head.bias": state["head.bias"]}, tmp_path / names[1])
        refused(lambda: load_part(recipe, "student", path), names[1] if index else "missing")
        (tmp_path / names[1]).unlink()
        refused(lambda: load_part(recipe, "student", path), names[1] if index else "missing")

    @pytest.mark.parametrize(("save", "name"), [(torch.save, "a.safetensors"), (save_file, "a.pth")])
    def test_a_name_says_nothing_of_the_format(
        self, state: State, tmp_path: Path, save: Callable[..., None], name: str
    ) -> None:
        save(state, tmp_path / name)
        module = load_part(VAR.recipe(), "student", tmp_path / name)
        assert torch.equal(module.logits_head.bias, state["head.bias"].float())
        assert not module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
        assert not any(value.is_meta for value in module.state_dict().values())


class TestContent:
    """Files that are read well, but hold something else."""

    def test_missing_extra_and_misshapen_keys(self, load: Load, state: State) -> None:
        state["heat.bias"] = state.pop("head.bias")
        state["word_embed.weight"] = state["word_embed.weight"][:, :5]
        state["module.lvl_1L"] = state["lvl_1L"]  # bare and wrapped names are two models
        texts = (
            "missing head.bias",
            "unknown heat.bias",
            "module.lvl_1L",
            "word_embed.weight 128x5 for 128x8",
        )
        refused(lambda: load(state), *texts)
        many = {k: v for k, v in state.items() if "ffn." not in k}
        assert len(refused(lambda: load(many), "missing ", " and 5 more").message) < 600

    @pytest.mark.parametrize(
        ("family", "asked", "given"),
        [
            (VAR, "student", "teacher"),
            (VAR, "student", "tokenizer"),
            (VAR, "tokenizer", "student"),
            (LLAMAGEN, "student", "teacher"),
        ],
    )
    def test_another_model_is_recognised(self, family: Golden, asked: str, given: str) -> None:
        path = family.files[given]
        refused(lambda: load_part(family.recipe(), asked, path), f"the {given} of {family.name}")
        other = load_recipe("digits-llamagen")
        file = embedded_weights(other.files["tokenizer"])
        refused(lambda: load_part(family.recipe(), asked, file), f"the tokenizer of {other.name}")

    def test_what_can_be_computed_may_be_absent(self, load: Load, state: State) -> None:
        buffers = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
        assert all(any(k.endswith(b) for k in state) for b in buffers)
        whole = load(state).state_dict()
        lean = load({k: v for k, v in state.items() if not k.endswith(buffers)}).state_dict()
        assert all(torch.equal(lean[k], whole[k]) for k in whole)
        tokenizer = torch.load(LLAMAGEN.files["tokenizer"], weights_only=True)["model"]
        del tokenizer["quantize.codebook_used"]  # a statistic
        for more in ({}, {"quantize.codebook_used": torch.arange(5)}):
            load({"model": {**tokenizer, **more}}, family=LLAMAGEN, role="tokenizer")

    @pytest.mark.parametrize(
        ("key", "edit"),
        [
            ("blocks.1.attn.zero_k_bias", lambda t: t + 1),
            ("lvl_1L", lambda t: t + 1),
            ("lvl_1L", lambda t: t[:, :-1]),
            ("attn_bias_for_masking", torch.zeros_like),
        ],
    )
    def test_what_can_be_computed_must_be_right(
        self, load: Load, state: State, key: str, edit: Callable[[Tensor], Tensor]
    ) -> None:
        """A key bias that is not zero, or another mask, means other code with other outputs."""
        refused(lambda: load({**state, key: edit(state[key])}), key)

    def test_a_rotary_table_must_be_ours(self, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        """Older teachers keep it; half precision is near enough, another base or size is not."""
        state = torch.load(LLAMAGEN.files["teacher"], weights_only=True)["model"]
        table = torch.from_numpy(rotary_table(4, 32))
        load({"model": {**state, "freqs_cis": table.bfloat16()}}, family=LLAMAGEN, role="teacher")
        monkeypatch.setattr("ddexport.families._llamagen_blocks.ROTARY_BASE", 9000.0)  # moves it by 0.0103
        wrongs = [torch.from_numpy(rotary_table(side, 32)) for side in (4, 3)]
        monkeypatch.undo()
        for wrong in (*wrongs, table.roll(1, 0), table.flatten()):
            data = {"model": {**state, "freqs_cis": wrong}}
            refused(lambda data=data: load(data, family=LLAMAGEN, role="teacher"), "freqs_cis")

    @pytest.mark.parametrize(
        "edit",
        [
            lambda t: t.to("meta"),
            lambda t: t.to_sparse(),
            lambda t: t.to(torch.int8),
            lambda t: torch.zeros(len(t), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
            lambda t: t * float("nan"),
            lambda t: t.double() * 0 + 1e300,
        ],
        ids=["without data", "sparse", "int8", "float4", "nan", "past float32"],
    )
    def test_weights_that_are_no_finite_floating_numbers(
        self, load: Load, state: State, edit: Callable[[Tensor], Tensor]
    ) -> None:
        """Integers would load as they are, and make a bundle of rubbish."""
        refused(lambda: load({**state, "head.bias": edit(state["head.bias"].float())}), "head.bias (")

    @pytest.mark.parametrize(
        "data",
        [
            {"trainer": {"ema_parameters": {}}},
            {"trainer": 5},
            {"epoch": 3, "head.bias": 1.0},
            {0: torch.zeros(1)},
            [1, 2],
            torch.zeros(3),
        ],
        ids=str,
    )
    def test_no_weights_where_they_should_be(self, load: Load, data: Any) -> None:
        refused(lambda: load(data))


@BOTH
def test_what_is_written(family: Golden, tmp_path: Path) -> None:
    """float16 numbers come back as they were, under their published names; larger ones are refused."""
    recipe, path = family.recipe(), tmp_path / "part.safetensors"
    module = random_part(recipe, "student", seed=1).half().float()
    save_part(module, recipe, "student", path)
    again = load_part(recipe, "student", path).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in module.state_dict().items())
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        assert HEAD[family.name] in keys and keys <= set(state_of(family))
        assert file.metadata() == {"ddexport": f"student of {family.name}"}
        assert {file.get_slice(key).get_dtype() for key in keys} == {"F16"}
    before = path.read_bytes()
    module.logits_head.weight.view(-1)[3] = 1e6
    refused(lambda: save_part(module, recipe, "student", path), HEAD[family.name])
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


class Payload:
    """Unpickles to a call that makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
class TestFile:
    """Files that cannot be read."""

    def refused(self, path: Path, *texts: str) -> None:
        refused(lambda: load_part(VAR.recipe(), "student", path), str(path), *texts)

    @pytest.mark.parametrize("how", ["torch", "torch legacy", "pickle", "inside"])
    def test_a_pickle_that_would_run_code_does_not(self, state: State, tmp_path: Path, how: str) -> None:
        trap, path = tmp_path / "trap", tmp_path / "evil.pth"
        if how == "pickle":  # of a protocol that torch.save does not use
            path.write_bytes(pickle.dumps({"trainer": Payload(trap)}))
        elif how == "inside":
            torch.save({"trainer": {"ema_parameters": state, "extra": Payload(trap)}}, path)
        else:
            torch.save(Payload(trap), path, _use_new_zipfile_serialization=how == "torch")
        self.refused(path, "safetensors" if how == "pickle" else ".mkdir)")
        assert not trap.exists()
        # the trap is armed: a loader that trusts the file falls into it
        if how == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert trap.is_dir()

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (b"hello, this is not a checkpoint\n" * 9, ""),
            (b"<!DOCTYPE html><html>404</html>", "web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "LFS"),
            (b"\x80\x02}q\x00.", ""),
            (struct.pack("<Q", 1 << 60) + b"{}", ""),
            (b"PK\3\4" + bytes(99), ""),
            (b'{"error": "Repository not found"}', ""),
        ],
    )
    def test_something_else(self, tmp_path: Path, content: bytes, kind: str) -> None:
        """A text, a web page, a Git LFS pointer, an empty pickle, a header that lies, no zip, an answer."""
        for suffix in (".pth", ".safetensors"):
            path = tmp_path / f"other{suffix}"
            path.write_bytes(content)
            self.refused(path, kind)

    def test_absent_or_compressed(self, tmp_path: Path) -> None:
        """A few kilobytes may claim to be gigabytes: they are not unpacked."""
        self.refused(tmp_path / "absent.pth")
        path = tmp_path / "bomb.pth"
        torch.save({"head.bias": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
        with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w") as packed:
            for entry in plain.infolist():
                packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
        self.refused(path, "bomb.pth is compressed")

    @pytest.mark.parametrize("suffix", [".pth", ".legacy.pth", ".safetensors"])
    def test_damage_anywhere_is_a_clear_error(self, tmp_path: Path, suffix: str) -> None:
        """A file that was cut off is refused. With any bit wrong it is read or refused, never a traceback."""
        whole, path = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
        state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}
        if suffix == ".safetensors":
            save_file(state, whole)
        else:
            torch.save({"trainer": state}, whole, _use_new_zipfile_serialization=suffix == ".pth")
        data = whole.read_bytes()
        for size in (0, 10, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:size])
            self.refused(path)
        generator = torch.Generator().manual_seed(0)
        refusals = 0
        for place in torch.randint(len(data), (400,), generator=generator).tolist():
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
            path.write_bytes(damaged)
            try:
                read_weights(path)
            except CheckpointError:
                refusals += 1
        assert refusals > 20


class TestRandomWeights:
    PINNED = [0.0414071, -0.0684293, -0.0400894, -0.0540441, 0.0986942, 0.0730219]

    def test_a_seed_means_the_same_weights(self) -> None:
        """Pinned values: a bundle of random weights can be made again on another machine."""
        parts = {role: random_part(VAR.recipe(), role, 7).state_dict() for role in ("student", "tokenizer")}
        found = [parts["student"]["logits_head.weight"][0, :3], parts["tokenizer"]["decoder.conv_out.bias"]]
        close(torch.cat(found), torch.tensor(self.PINNED), 1e-6)
        several = [
            random_part(VAR.recipe(), role, seed).state_dict()["token_embedding.weight"]
            for role, seed in (("student", 0), ("student", 1), ("student", -1), ("teacher", 0))
        ]
        assert len({tuple(p.flatten().tolist()) for p in several}) == len(several)
