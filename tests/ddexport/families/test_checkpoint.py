"""Checkpoints are untrusted: each way a file can be wrong has its message, and none can run code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddexport.families import family
from ddexport.families._checkpoint import CheckpointError, copy_taken, load_part, random_part, save_part
from ddexport.families._weight_file import fingerprint, read_weights
from ddexport.recipe import Recipe, load_recipe

State = dict[str, Tensor]
GUESS_OR_FILE = "check the model's name and the file"


@pytest.fixture(scope="module")
def golden_state(golden_dir: Path) -> State:
    """The student's published tensors. Copy before you change them."""
    return torch.load(golden_dir / "student.pth", weights_only=True)["trainer"]["ema_parameters"]


@pytest.fixture
def load(golden_recipe: Recipe, tmp_path: Path) -> Callable[..., torch.nn.Module]:
    """load(data): writes `data` with torch.save and loads it as the golden recipe's student."""

    def save_and_load(data: Any, weights: str | None = None, **options: Any) -> torch.nn.Module:
        path = tmp_path / "checkpoint.pth"
        torch.save(data, path, **options)
        return load_part(golden_recipe, "student", path, weights)

    return save_and_load


def published(module: torch.nn.Module, recipe: Recipe, role: str) -> State:
    layout = family(recipe.family).layout(recipe, role)
    return {layout.published(key)[0]: value for key, value in module.state_dict().items()}


def cheap_file(recipe: Recipe, role: str, path: Path) -> Path:
    """A checkpoint of the recipe's keys and shapes, however large, in a few bytes: all zeros are one zero."""
    with torch.device("meta"):
        module = family(recipe.family).build(recipe, role)
    state = {k: torch.zeros(1).expand(v.shape) for k, v in published(module, recipe, role).items()}
    torch.save({"trainer": {"ema_parameters": state}} if role == "student" else state, path)
    return path


class TestWhatIsAccepted:
    def test_the_published_layout_and_both_copies(self, golden_recipe: Recipe, golden_dir: Path) -> None:
        """`--weights` decides; the golden file holds two copies that differ."""
        ema = load_part(golden_recipe, "student", golden_dir / "student.pth")
        model = load_part(golden_recipe, "student", golden_dir / "student.pth", "model")
        raw = torch.load(golden_dir / "student.pth", weights_only=True)["trainer"]
        for module, name in ((ema, "ema_parameters"), (model, "var_wo_ddp")):
            for key, value in published(module, golden_recipe, "student").items():
                torch.testing.assert_close(value.flatten(), raw[name][key].float().flatten(), rtol=0, atol=0)
        assert not torch.equal(ema.logits_head.bias, model.logits_head.bias)

    def test_modules_are_ready_for_inference(self, golden_recipe: Recipe, golden_dir: Path) -> None:
        module = load_part(golden_recipe, "tokenizer", golden_dir / "vae.pth")
        assert not module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
        assert not any(value.is_meta for value in module.state_dict().values())

    @pytest.mark.parametrize("zip_format", [True, False])
    def test_a_flat_file_in_both_formats_of_torch(
        self, load: Callable[..., Any], golden_state: State, zip_format: bool
    ) -> None:
        module = load(golden_state, _use_new_zipfile_serialization=zip_format)
        assert torch.equal(module.logits_head.bias, golden_state["head.bias"].float())

    def test_recomputable_buffers_may_be_absent(self, load: Callable[..., Any], golden_state: State) -> None:
        buffers = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
        assert all(any(k.endswith(b) for k in golden_state) for b in buffers)
        whole = load(golden_state).state_dict()
        lean = load({k: v for k, v in golden_state.items() if not k.endswith(buffers)}).state_dict()
        assert all(torch.equal(lean[k], whole[k]) for k in whole)

    def test_a_file_of_the_published_size(self, tmp_path: Path) -> None:
        """Keys and shapes of d16 as published, without the time and memory of its numbers."""
        recipe = load_recipe("var-d16")
        module = load_part(recipe, "student", cheap_file(recipe, "student", tmp_path / "var-d16.pth"))
        assert sum(p.numel() for p in module.parameters()) == 328_165_664

    @pytest.mark.parametrize("role", ["student", "tokenizer", "teacher"])
    def test_safetensors_keep_every_bit(self, golden_recipe: Recipe, tmp_path: Path, role: str) -> None:
        """float16 numbers written by `save_part` come back as they were, under their published names."""
        from safetensors import safe_open

        module = random_part(golden_recipe, role, seed=1).half().float()
        save_part(module, golden_recipe, role, tmp_path / "part.safetensors")
        again = load_part(golden_recipe, role, tmp_path / "part.safetensors")
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in module.state_dict().items())
        with safe_open(tmp_path / "part.safetensors", "pt") as file:
            assert set(file.keys()) == set(published(module, golden_recipe, role))
            assert file.metadata() == {"model": "var-dd-small", "role": role}
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
        assert [p.name for p in tmp_path.iterdir()] == ["part.safetensors"]


class TestContent:
    """Files that are read well, but hold something else."""

    def refused(self, call: Callable[[], object], *texts: str) -> CheckpointError:
        with pytest.raises(CheckpointError) as caught:
            call()
        for text in texts:
            assert text in f"{caught.value.message} {caught.value.hint}"
        return caught.value

    def test_missing_extra_and_misshapen_keys_are_named(
        self, load: Callable[..., Any], golden_state: State
    ) -> None:
        state = dict(golden_state)
        state["heat.bias"] = state.pop("head.bias")
        state["word_embed.weight"] = state["word_embed.weight"][:, :5]
        error = self.refused(
            lambda: load(state),
            "does not hold the student of var-dd-small",
            "missing head.bias",
            "unknown heat.bias",
            "misshapen word_embed.weight 128x5 for 128x8",
        )
        assert error.hint == GUESS_OR_FILE

    def test_many_keys_are_counted(self, load: Callable[..., Any], golden_state: State) -> None:
        """The message stays readable."""
        state = {k: v for k, v in golden_state.items() if "ffn." not in k}
        error = self.refused(lambda: load(state), "missing blocks.0.ffn.", " and 4 more")
        assert len(error.message) < 600

    @pytest.mark.parametrize(
        ("key", "edit"),
        [
            ("blocks.1.attn.zero_k_bias", lambda t: t + 1),
            ("blocks.0.attn.zero_k_bias", lambda t: t * float("nan")),
            ("lvl_1L", lambda t: t + 1),
            ("lvl_1L", lambda t: t[:, :-1]),
            ("attn_bias_for_masking", torch.zeros_like),
        ],
    )
    def test_buffers_that_are_present_must_be_right(
        self, load: Callable[..., Any], golden_state: State, key: str, edit: Callable[[Tensor], Tensor]
    ) -> None:
        """A key bias that is not zero, or another mask, means other code with other outputs."""
        state = {**golden_state, key: edit(golden_state[key])}
        self.refused(
            lambda: load(state), f"{key} is not the value that this family computes", "different code"
        )

    @pytest.mark.parametrize(
        "edit",
        [
            lambda t: t.to("meta"),
            lambda t: t.to_sparse(),
            lambda t: t.to(torch.complex64),
            lambda t: t.to(torch.int8),
            lambda t: t > 0,
            lambda t: torch.zeros(len(t), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        ],
        ids=["without data", "sparse", "complex", "int8", "bool", "float4"],
    )
    def test_weights_that_are_no_floating_numbers(
        self, load: Callable[..., Any], golden_state: State, edit: Callable[[Tensor], Tensor]
    ) -> None:
        """Integers would load as they are, and make a bundle of rubbish."""
        state = {**golden_state, "head.bias": edit(golden_state["head.bias"].float())}
        self.refused(lambda: load(state), "head.bias (", "is not a dense array of floating numbers")

    @pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300])
    def test_weights_that_are_not_finite_in_float32(
        self, load: Callable[..., Any], golden_state: State, value: float
    ) -> None:
        state = {**golden_state, "head.bias": golden_state["head.bias"].double() * 0 + value}
        self.refused(lambda: load(state), "head.bias (float64) is not finite in float32")

    def test_the_teacher_for_the_student(self, golden_recipe: Recipe, golden_dir: Path) -> None:
        self.refused(
            lambda: load_part(golden_recipe, "student", golden_dir / "teacher.pth"),
            "missing final_layer_conti.scale_shift_table",
            "this looks like the teacher of var-dd-small",
        )

    def test_the_tokenizer_for_the_student_and_back(self, golden_recipe: Recipe, golden_dir: Path) -> None:
        self.refused(
            lambda: load_part(golden_recipe, "student", golden_dir / "vae.pth"),
            "this looks like the tokenizer of var-dd-small",
        )
        self.refused(
            lambda: load_part(golden_recipe, "tokenizer", golden_dir / "student.pth"),
            ": the nearest, trainer.ema_parameters, differs: missing",
            "this looks like the student of var-dd-small",
        )

    @pytest.mark.parametrize(
        ("asked", "role", "given", "given_role"),
        [
            ("var-d16", "student", "var-d20", "student"),
            ("var-d24", "student", "var-d16", "student"),
            ("var-d16", "student", "var-d16", "teacher"),
            ("digits-var", "tokenizer", "var-d16", "tokenizer"),
        ],
    )
    def test_another_model_is_recognised(
        self, tmp_path: Path, asked: str, role: str, given: str, given_role: str
    ) -> None:
        path = cheap_file(load_recipe(given), given_role, tmp_path / "given.pth")
        error = self.refused(lambda: load_part(load_recipe(asked), role, path))
        assert ("blocks, the recipe has" in error.message) == (given_role == "student")
        assert error.hint == f"this looks like the {given_role} of {given}"

    @pytest.mark.parametrize(
        "data",
        [
            {"trainer": {"other": {}}},
            {"trainer": 5},
            {"trainer": {"ema_parameters": {}}},
            {"trainer": {"ema_parameters": {"head.bias": 1.0}}},
            {"epoch": 3, "args": "x"},
            {"head.bias": 1.0},
            {0: torch.zeros(1)},
            {},
            [1, 2],
            torch.zeros(3),
        ],
        ids=str,
    )
    def test_no_weights_where_they_should_be(self, load: Callable[..., Any], data: Any) -> None:
        """The message says what was looked for and what is there."""
        error = self.refused(lambda: load(data))
        assert re.search(r"holds no weights, but|missing pos_start", error.message)
        assert error.hint

    def test_the_other_copy_is_not_taken_silently(
        self, load: Callable[..., Any], golden_state: State
    ) -> None:
        data = {"trainer": {"ema_parameters": golden_state}}
        self.refused(lambda: load(data, weights="model"), "has no model", "--weights trainer.ema_parameters")

    def test_a_number_too_large_for_half_precision(self, golden_recipe: Recipe, tmp_path: Path) -> None:
        module = random_part(golden_recipe, "student", seed=0)
        module.logits_head.bias[3] = 1e6
        self.refused(
            lambda: save_part(module, golden_recipe, "student", tmp_path / "s.safetensors"),
            "student: head.bias overflows torch.float16",
        )
        assert list(tmp_path.iterdir()) == []


WRAPPED = [
    lambda s: {"module." + k: v for k, v in s.items()},
    lambda s: {"_orig_mod.module." + k: v for k, v in s.items()},
    lambda s: {"n_averaged": torch.tensor(3), **{"module." + k: v for k, v in s.items()}},
    lambda s: {k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v for k, v in s.items()},
    lambda s: {"_fsdp_wrapped_module.model." + k: v for k, v in s.items()},
    lambda s: {"state_dict": {**{"net." + k: v for k, v in s.items()}, "loss.scale": torch.ones(1)}},
    lambda s: {"epoch": 3, "trainer": {"var_opt": {"state": {0: {"step": torch.ones(1)}}}, "net": s}},
    lambda s: {k: v.double() for k, v in s.items()},
]


class TestTrainingRuns:
    """Files as trainers write them."""

    @pytest.mark.parametrize("wrap", WRAPPED)
    def test_the_recipes_model_is_searched(
        self, load: Callable[..., Any], golden_state: State, wrap: Callable[[State], Any]
    ) -> None:
        module = load(wrap(golden_state))
        assert torch.equal(module.logits_head.bias, golden_state["head.bias"].float())

    @pytest.mark.parametrize("weights", [None, "ema_parameters"])
    @pytest.mark.parametrize(("role", "file"), [("teacher", "teacher.pth"), ("tokenizer", "vae.pth")])
    def test_a_trainers_file_is_teacher_and_tokenizer(
        self,
        golden_recipe: Recipe,
        golden_dir: Path,
        tmp_path: Path,
        role: str,
        file: str,
        weights: str | None,
    ) -> None:
        """As VAR's training code writes it; a name given for the student's file does not matter here."""
        teacher, vae = (torch.load(golden_dir / f, weights_only=True) for f in ("teacher.pth", "vae.pth"))
        path = tmp_path / "ar-ckpt-last.pth"
        torch.save({"trainer": {"config": {}, "var_wo_ddp": teacher, "vae_local": vae}}, path)
        state = load_part(golden_recipe, role, path, weights).state_dict()
        wanted = load_part(golden_recipe, role, golden_dir / file).state_dict()
        assert all(torch.equal(wanted[key], value) for key, value in state.items())
        place = {"teacher": "model", "tokenizer": "trainer.vae_local"}[role]
        assert copy_taken(golden_recipe, role, path, weights) == place

    def test_one_of_several_is_named(self, load: Callable[..., Any], golden_state: State) -> None:
        other = {key: value + 1 for key, value in golden_state.items()}
        data = {"a": {"c": other}, "raw": {"b": golden_state}}
        with pytest.raises(CheckpointError, match=r"holds the student as a\.c, raw\.b") as caught:
            load(data)
        assert caught.value.hint == "choose with --weights NAME"
        with pytest.raises(CheckpointError, match=r"has no a\.b; it holds the student as a\.c, raw\.b"):
            load(data, "a.b")
        for name in ("raw.b", "b", "other,b"):
            assert torch.equal(load(data, name).logits_head.bias, golden_state["head.bias"].float())

    def test_a_damaged_default_is_not_replaced(self, load: Callable[..., Any], golden_state: State) -> None:
        """Images of the raw weights would only be worse."""
        ema = {key: value for key, value in golden_state.items() if "blocks.1." not in key}
        data = {"trainer": {"ema_parameters": ema, "var_wo_ddp": golden_state}}
        with pytest.raises(CheckpointError, match="ema_parameters, differs: 1 blocks, the recipe has 2"):
            load(data)
        load(data, "model")

    def test_bare_and_wrapped_names_are_two_models(
        self, load: Callable[..., Any], golden_state: State
    ) -> None:
        with pytest.raises(CheckpointError, match=r"unknown module\.lvl_1L"):
            load({**golden_state, "module.lvl_1L": golden_state["lvl_1L"]})

    @pytest.mark.parametrize("index", [True, False])
    def test_shards(self, golden_recipe: Recipe, golden_state: State, tmp_path: Path, index: bool) -> None:
        """By index or directory; a shard that is missing, that holds something else, or alone is refused."""
        path, names = tmp_path, [f"model-{i}-of-2.safetensors" for i in (1, 2)]
        places = {key: names[i % 2] for i, key in enumerate(golden_state)}
        for name in names:
            save_file({k: golden_state[k] for k in places if places[k] == name}, tmp_path / name)
        if index:
            path = tmp_path / "model.safetensors.index.json"
            path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        module = load_part(golden_recipe, "student", path)
        assert torch.equal(module.logits_head.bias, golden_state["head.bias"].float())
        files = sorted(tmp_path.iterdir())
        lines = "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)
        sha256 = hashlib.sha256(lines.encode()).hexdigest()  # of the output of sha256sum
        assert fingerprint(path) == fingerprint(tmp_path) == (sha256, sum(f.stat().st_size for f in files))
        with pytest.raises(CheckpointError) as caught:
            load_part(golden_recipe, "student", tmp_path / names[0])
        assert "give their directory" in caught.value.hint
        save_file({"head.bias": golden_state["head.bias"]}, tmp_path / names[1])
        with pytest.raises(CheckpointError, match="holds other tensors than" if index else "missing"):
            load_part(golden_recipe, "student", path)
        (tmp_path / names[1]).unlink()
        with pytest.raises(CheckpointError, match="which is not there" if index else "missing"):
            load_part(golden_recipe, "student", path)

    @pytest.mark.parametrize(("save", "name"), [(torch.save, "a.safetensors"), (save_file, "a.pth")])
    def test_a_name_says_nothing_of_the_format(
        self, golden_recipe: Recipe, golden_state: State, tmp_path: Path, save: Any, name: str
    ) -> None:
        save(golden_state, tmp_path / name)
        assert load_part(golden_recipe, "student", tmp_path / name).logits_head.bias.isfinite().all()


class Payload:
    """Unpickles to a call that makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
class TestFile:
    """Files that cannot be read."""

    @pytest.mark.parametrize("how", ["torch", "torch legacy", "pickle", "inside"])
    def test_a_pickle_that_would_run_code_does_not(
        self, golden_recipe: Recipe, golden_state: State, tmp_path: Path, how: str
    ) -> None:
        trap, path = tmp_path / "trap", tmp_path / "evil.pth"
        if how == "pickle":
            path.write_bytes(pickle.dumps({"trainer": Payload(trap)}))
        elif how == "inside":
            torch.save({"trainer": {"ema_parameters": golden_state, "extra": Payload(trap)}}, path)
        else:
            torch.save(Payload(trap), path, _use_new_zipfile_serialization=how == "torch")
        with pytest.raises(CheckpointError) as caught:
            load_part(golden_recipe, "student", path)
        assert not trap.exists()
        if how == "pickle":  # of a protocol that torch.save does not use
            assert "not a checkpoint" in caught.value.message
        else:
            assert re.search(r"\(\w+\.mkdir\): loading them could run code", caught.value.message)
        assert "safetensors" in caught.value.hint
        # the trap is armed: a loader that trusts the file falls into it
        if how == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert trap.is_dir()

    @pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.99, -1])
    @pytest.mark.parametrize("name", ["student.pth", "part.safetensors"])
    def test_truncated(
        self, golden_recipe: Recipe, golden_dir: Path, tmp_path: Path, name: str, keep: float
    ) -> None:
        whole = golden_dir / name
        if not whole.exists():
            whole = tmp_path / name
            save_part(random_part(golden_recipe, "student", 0), golden_recipe, "student", whole)
        data = whole.read_bytes()
        cut = data[: keep if isinstance(keep, int) else int(len(data) * keep)]
        path = tmp_path / f"cut-{name}"
        path.write_bytes(cut)
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint") as caught:
            load_part(golden_recipe, "student", path)
        assert caught.value.hint

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize(
        "content",
        [
            b"hello, this is not a checkpoint\n" * 9,
            b"<!DOCTYPE html><html>404</html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            b"\x80\x02}q\x00.",
            b"\x89PNG\r\n\x1a\n" + bytes(99),
            struct.pack("<Q", 1 << 60) + b"{}",
            b"PK\3\4" + bytes(99),
            b'{"error": "Repository not found"}',
        ],
    )
    def test_something_else(self, golden_recipe: Recipe, tmp_path: Path, suffix: str, content: bytes) -> None:
        """A text, a web page, a Git LFS pointer, an empty pickle, a picture, a header that lies, no zip, an
        answer in JSON."""
        path = tmp_path / f"other{suffix}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_part(golden_recipe, "student", path)
        assert str(path) in caught.value.message
        assert caught.value.hint
        kinds = {b"<!": "is a web page", b"ve": "is a Git LFS pointer"}
        assert kinds.get(content[:2], "checkpoint") in caught.value.message

    def test_a_file_that_is_not_there(self, golden_recipe: Recipe, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"there is no file .*absent\.pth"):
            load_part(golden_recipe, "student", tmp_path / "absent.pth")

    def test_a_compressed_file_is_not_unpacked(self, golden_recipe: Recipe, tmp_path: Path) -> None:
        """A few kilobytes may claim to be gigabytes."""
        path = tmp_path / "bomb.pth"
        torch.save({"head.bias": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
        with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w") as packed:
            for entry in plain.infolist():
                packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
        with pytest.raises(CheckpointError, match="is compressed; checkpoints are not"):
            load_part(golden_recipe, "student", path)

    @pytest.mark.parametrize("suffix", [".pth", ".legacy.pth", ".safetensors"])
    def test_damage_anywhere_is_a_clear_error(self, tmp_path: Path, suffix: str) -> None:
        """Whatever bit is wrong, the file is read or refused: it never ends in a traceback."""
        whole, path = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
        state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}
        if suffix == ".safetensors":
            save_file(state, whole)
        else:
            torch.save({"trainer": state}, whole, _use_new_zipfile_serialization=suffix == ".pth")
        data = whole.read_bytes()
        generator = torch.Generator().manual_seed(0)
        refused = 0
        for place in torch.randint(len(data), (400,), generator=generator).tolist():
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
            path.write_bytes(damaged)
            try:
                read_weights(path)
            except CheckpointError:
                refused += 1
        assert refused > 20


class TestRandomWeights:
    def test_a_seed_means_the_same_weights(self, golden_recipe: Recipe) -> None:
        """Pinned values: a bundle of random weights can be made again on another machine."""
        student = random_part(golden_recipe, "student", seed=7).state_dict()
        again = random_part(golden_recipe, "student", seed=7).state_dict()
        assert all(torch.equal(student[key], again[key]) for key in student)
        decoder = random_part(golden_recipe, "tokenizer", seed=7).state_dict()
        found = [student["logits_head.weight"][0, :3], decoder["decoder.conv_out.bias"]]
        torch.testing.assert_close(torch.cat(found), torch.tensor(PINNED), rtol=0, atol=1e-6)

    def test_seeds_and_parts_differ(self, golden_recipe: Recipe) -> None:
        parts = [
            random_part(golden_recipe, role, seed).state_dict()["token_embedding.weight"]
            for role, seed in (("student", 0), ("student", 1), ("student", -1), ("teacher", 0))
        ]
        assert len({tuple(p.flatten().tolist()) for p in parts}) == len(parts)

    @pytest.mark.parametrize("role", ["student", "tokenizer", "teacher"])
    def test_numbers_are_sane(self, golden_recipe: Recipe, role: str) -> None:
        module = random_part(golden_recipe, role, seed=0)
        for key, value in module.state_dict().items():
            assert value.isfinite().all() and value.std() > 0, key
            assert value.abs().max() < 10, key


PINNED = [0.0414071, -0.0684293, -0.0400894, -0.0540441, 0.0986942, 0.0730219]
