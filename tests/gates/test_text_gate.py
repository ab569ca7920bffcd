"""`validate parity` and `doctor --check` on bundles of texts, unbroken and with planted faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ddexport.runtime import conditions, text
from ddexport.runtime.doctor import command as doctor_command
from ddexport.runtime.text import Features, PromptTokenizer
from ddexport.validate import cli, plots
from tests.gates import faults
from tests.gates.conftest import failed_rows
from tests.goldens import TEXT

Patch = pytest.MonkeyPatch
LOGITS, GUIDED = "logits, largest error", "guided logits, largest error"
FEATURES = "features of the prompts, relative error"


@pytest.fixture
def planted(text_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """planted(faults...): a copy of the golden text bundle with these faults."""

    def plant(*planting: Callable[[Path, str], None]) -> Path:
        bundle = tmp_path / "bundle"
        shutil.copytree(text_bundle, bundle, ignore=shutil.ignore_patterns("parity"))
        for fault in planting:
            fault(bundle, "fp32")
        return bundle

    return plant


@pytest.fixture
def parity(monkeypatch: Patch) -> Callable[..., Result]:
    """parity(bundle): the real command, without its pictures; twelve images of eight texts."""

    def run(bundle: Path, encoder: bool = True, pictures: bool = False) -> Result:
        if not pictures:
            monkeypatch.setattr(plots, "of_parity", lambda *_: {})
        files = {"--checkpoint": "student", "--vae": "tokenizer", "--teacher": "teacher"}
        options = [word for option, role in files.items() for word in (option, str(TEXT.files[role]))]
        options += ["--text-encoder", str(TEXT.folder / "t5-encoder")] if encoder else []
        how = ("--backend", "onnxruntime", "--threads", "1", "--images", "12", "--json")
        return CliRunner().invoke(cli.command, ["parity", str(bundle), *options, *how])

    return run


def swapped_prompts(patch: Patch) -> None:
    """The tokens of the last prompt are those of the first one."""
    ids = PromptTokenizer.__call__

    def reversed_ids(self: Any, prompts: Any) -> Any:
        return tuple(rows[::-1] for rows in ids(self, prompts))

    patch.setattr(PromptTokenizer, "__call__", reversed_ids)


def swapped_rows(patch: Patch) -> None:
    """An image is drawn from the text of another one."""
    feeds = conditions.Conditions.feeds
    patch.setattr(
        conditions.Conditions,
        "feeds",
        lambda self, role: {name: rows[::-1] for name, rows in feeds(self, role).items()},
    )


class Unchecked(Features):
    """Features that may be wrong."""

    def __post_init__(self) -> None:
        pass


def masked(change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Graphs get another mask than that of the features."""

    def plant(patch: Patch) -> None:
        prefix = conditions.Texts._prefix

        def wrong(self: Any, features: Any, role: str) -> Any:
            return prefix(self, Unchecked(features.features, change(features.mask)), role)

        patch.setattr(conditions.Texts, "_prefix", wrong)

    return plant


def padded_behind(patch: Patch) -> None:
    """The rows of a text are the first ones, as the encoder gives them."""
    padded = text.left_padded

    def wrong(hidden: Any, mask: Any, tokens: int) -> Any:
        right = padded(hidden, mask, tokens)
        rolled = [
            np.roll(row, int(seen.sum()), 0) for row, seen in zip(right.features, right.mask, strict=True)
        ]
        return Unchecked(np.stack(rolled), right.mask)

    patch.setattr(conditions, "left_padded", wrong)


def uncleaned(patch: Patch) -> None:
    """Prompts are encoded as they are written."""
    patch.setattr(text, "clean_caption", lambda prompt: prompt)


def test_an_unbroken_bundle_passes_and_is_drawn_again(planted: Any, parity: Any, monkeypatch: Patch) -> None:
    """Elsewhere by `doctor --check`, from the prompts; and it fails where they are swapped."""
    bundle = planted()
    result = parity(bundle)
    assert result.exit_code == 0, result.output
    assert {row["scope"] for row in json.loads(result.stdout)["rows"]} >= {"text encoder", "step 1 (known 0)"}
    arguments = [str(bundle), "--check", "--backend", "onnxruntime"]
    done = CliRunner().invoke(doctor_command, arguments)
    assert done.exit_code == 0, done.output
    swapped = [np.load(bundle / "parity" / "golden.npz")[name] for name in ("prompts", "labels")]
    assert len(set(swapped[1])) > 4
    uncleaned(monkeypatch)
    assert CliRunner().invoke(doctor_command, arguments).exit_code == 3


@pytest.mark.parametrize("student", [True, False])
def test_a_bundle_without_encoder_is_compared_from_features(planted: Any, parity: Any, student: bool) -> None:
    """And one that has a teacher alone, as the published model."""
    bundle = planted(faults.without_encoder, *([] if student else [faults.without_student]))
    result = parity(bundle, encoder=False, pictures=not student)
    assert result.exit_code == 0, result.output
    done = CliRunner().invoke(doctor_command, [str(bundle), "--check", "--backend", "onnxruntime"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        (swapped_prompts, FEATURES),
        (padded_behind, FEATURES),
        (uncleaned, FEATURES),
        (swapped_rows, LOGITS),
        (masked(np.ones_like), LOGITS),
        (masked(lambda mask: mask[:, ::-1]), GUIDED),
        (masked(lambda mask: np.roll(mask, 1, 1)), GUIDED),
    ],
    ids=["prompts", "padding", "cleaning", "rows", "all rows", "first rows", "one row fewer"],
)
def test_a_fault_of_the_runtime_fails(
    planted: Any, parity: Any, monkeypatch: Patch, fault: Callable[[Patch], None], row: str
) -> None:
    fault(monkeypatch)
    result = parity(planted())
    assert result.exit_code == 3, result.output
    assert row in failed_rows(result)


@pytest.mark.parametrize(
    ("role", "edit", "row"),
    [
        ("text_prefix", faults.counted_once_more, LOGITS),
        ("text_prefix", faults.without_last_row, LOGITS),
        ("student", faults.without_count, LOGITS),
        ("teacher_prefix", faults.counted_once_more, GUIDED),
        ("teacher_prefix", faults.without_last_row, GUIDED),
        ("teacher_prefix", faults.whole_null_text, GUIDED),
        ("teacher", faults.without_count, GUIDED),
        ("text_encoder", faults.swapped_tokens, FEATURES),
    ],
)
def test_a_fault_of_a_graph_fails(planted: Any, parity: Any, role: str, edit: faults.Edit, row: str) -> None:
    result = parity(planted(faults.in_graph(edit, role)))
    assert result.exit_code == 3, result.output
    assert row in failed_rows(result)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (faults.in_tokenizer, "tokenizer.json is not"),
        (faults.in_manifest(lambda m: m["text"].update(heads=4, head_width=16)), "text.heads"),
    ],
    ids=["tokenizer", "heads"],
)
def test_a_fault_of_the_files_fails(planted: Any, parity: Any, fault: Any, words: str) -> None:
    result = parity(planted(fault))
    assert result.exit_code == 3, result.output
    assert words in result.stderr
