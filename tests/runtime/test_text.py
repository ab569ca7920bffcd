"""Prompts and their features, against what transformers and the published padding make of them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from ddexport.runtime.errors import BackendError, BundleError, TextError
from ddexport.runtime.text import Features, PromptTokenizer, left_padded, read_features, trial_features
from tests.runtime.test_captions import GOLDEN

FOLDER = Path(__file__).parents[1] / "golden" / "llamagen-t2i-small"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789äöü.,!?'\"-&"
WORDS = ("▁a", "▁the", "▁cat", "▁dog", "at", "ing", "▁red", "re", "ed", "three", "ue")


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as T5's are, with a vocabulary that the golden T5 has; it pads and cuts by itself."""
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    scores += [(letter, -5.0) for letter in LETTERS] + [(word, -4.0) for word in WORDS]
    assert len(scores) <= 96
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=64)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


class TestFeatures:
    def test_the_published_padding(self, expected: dict[str, np.ndarray]) -> None:
        for hidden, mask, wanted in (
            ("text_raw", "text_raw_mask", ""),
            ("t5_last_hidden_state", "t5_attention_mask", "t5_"),
        ):
            got = left_padded(expected[hidden], expected[mask], 12)
            np.testing.assert_array_equal(got.features, expected[f"{wanted}features"])
            np.testing.assert_array_equal(got.mask, expected[f"{wanted}features_mask"])
            assert (got.features.dtype, got.mask.dtype, len(got)) == ("float32", "int64", 3)

    def test_a_batch_is_as_long_as_its_longest_text(self, expected: dict[str, np.ndarray]) -> None:
        short = left_padded(expected["text_raw"][:1, :3], expected["text_raw_mask"][:1, :3], 12)
        np.testing.assert_array_equal(short.features, expected["features"][:1])

    def test_other_types_are_converted_and_rows_outside_the_mask_zero(
        self, expected: dict[str, np.ndarray]
    ) -> None:
        features, mask = expected["features"], expected["features_mask"]
        for dtype, kind in (("float16", "bool"), ("float64", "uint8")):
            got = Features(features.astype(dtype), mask.astype(kind))
            np.testing.assert_array_equal(got.features, features.astype(dtype).astype(np.float32))
            np.testing.assert_array_equal(got.mask, mask)
        outside = np.where(mask[:, :, None] == 0, np.nan, features)
        np.testing.assert_array_equal(Features(outside, mask).features, features)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda f, m: (f.astype(np.int32), m), "int32"),
            (lambda f, m: (f, m.astype(np.float32)), "float32"),
            (lambda f, m: (f[0], m), "shape"),
            (lambda f, m: (f, m[:, 1:]), "shape"),
            (lambda f, m: (f[:0], m[:0]), "shape"),
            (lambda f, m: (f, m[:, ::-1]), "text 0"),
            (lambda f, m: (f, m * [[1], [0], [1]]), "text 1"),
            (lambda f, m: (f, np.add(m, [[0], [0], [1]])), "text 2"),
            (lambda f, m: (f * np.float64(1e300), m), "finite"),
            (lambda f, m: (f * np.inf, m), "finite"),
        ],
    )
    def test_what_is_wrong_is_refused(self, change: Any, text: str, expected: dict[str, np.ndarray]) -> None:
        with np.errstate(invalid="ignore"):
            given = change(expected["features"], expected["features_mask"])
        with pytest.raises(TextError, match=text) as caught:
            Features(*given)
        assert caught.value.hint

    def test_trials_have_texts_of_all_lengths(self) -> None:
        trial = trial_features(12, 4)
        assert trial.features.shape == (8, 12, 4)
        assert trial.mask.sum(1).tolist() == sorted(trial.mask.sum(1)) and set(trial.mask.sum(1)) >= {1, 12}


class TestFile:
    def test_features_of_a_file(self, tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
        assert read_features(FOLDER / "expected.npz", 12, 48).features.shape == (3, 12, 48)
        path = tmp_path / "features.npz"
        half, bools = expected["features"].astype(np.float16), expected["features_mask"].astype(bool)
        np.savez(path, features=half, features_mask=bools)
        np.testing.assert_array_equal(read_features(path, 12, 48).features, half)

    @pytest.mark.parametrize(
        ("arrays", "text"),
        [
            ({"features_mask": np.ones((1, 3), np.int64)}, "no array `features`"),
            ({"features": np.ones((1, 3, 4), np.float32)}, "no array `features_mask`"),
            ({"features": np.ones((1, 3, 4), np.int64)}, "floats of 3"),
            ({"features": np.array([[[None]]])}, "floats of 3"),
            ({"features": np.ones((1, 3, 5), np.float32)}, r"\(B, 3, 4\)"),
            ({"features": np.ones((1, 4, 4), np.float32)}, r"\(B, 3, 4\)"),
            ({"features_mask": np.zeros((1, 3), np.int64)}, "features.npz: the mask of text 0"),
            ({"features_mask": np.ones((2, 3), np.int64)}, "features.npz: .*shape"),
        ],
    )
    def test_what_is_wrong_is_refused(self, arrays: dict[str, Any], text: str, tmp_path: Path) -> None:
        path = tmp_path / "features.npz"
        if "no array" not in text:
            fine = {"features": np.ones((1, 3, 4), np.float32), "features_mask": np.ones((1, 3), np.int64)}
            arrays = fine | arrays
        np.savez(path, **arrays)
        with pytest.raises(TextError, match=text):
            read_features(path, 3, 4)

    def test_a_file_that_is_missing_or_damaged(self, tmp_path: Path) -> None:
        path = tmp_path / "features.npz"
        with pytest.raises(TextError, match="the features file"):
            read_features(path, 3, 4)
        path.write_bytes(b"PK\3\4")
        with pytest.raises(TextError, match="cannot be read"):
            read_features(path, 3, 4)


class TestTokenizer:
    @pytest.mark.parametrize("tokens", [120, 12, 1])
    def test_transformers_gives_the_same(self, tokens: int, tokenizer_file: Path) -> None:
        """The golden captions, one of them empty, and a long prompt; in one batch and alone."""
        transformers = pytest.importorskip("transformers")
        reference = transformers.T5TokenizerFast(tokenizer_file=str(tokenizer_file))
        texts = [text for text, _, _ in GOLDEN] + ["a red cat, " * 40]
        cleaned = [twice for _, _, twice in GOLDEN] + [("a red cat, " * 40)[:-2]]
        tokenizer = PromptTokenizer(tokenizer_file, tokens)
        for rows in (slice(None), slice(0, 1), slice(-1, None)):
            ids, mask = tokenizer(texts[rows])
            wanted = reference(cleaned[rows], max_length=tokens, truncation=True, padding=True)
            assert (ids.dtype, mask.dtype) == ("int64", "int64")
            assert ids.tolist() == wanted["input_ids"] and mask.tolist() == wanted["attention_mask"]

    def test_the_words_that_are_cut_are_told(
        self, tokenizer_file: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer = PromptTokenizer(tokenizer_file, 5)
        ids, _ = tokenizer(["A cat,  red"])
        assert ids.shape == (1, 5) and not caplog.records
        with caplog.at_level(logging.WARNING):
            ids, mask = tokenizer(["The cat, RED dog"])
        assert ids[0, -1] == 1 and mask.all()
        (record,) = caplog.records
        assert record.getMessage() == "a prompt has 6 tokens of 5 at most; cut off: dog"

    def test_no_prompt_is_cleaned_for_minutes(
        self, tokenizer_file: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        ids, _ = PromptTokenizer(tokenizer_file, 12)(["a cat " + "1.1.1." * 100_000])
        assert ids.shape == (1, 12) and "600006 characters" in caplog.text

    def test_an_empty_prompt_is_its_end_alone(self, tokenizer_file: Path) -> None:
        ids, mask = PromptTokenizer(tokenizer_file, 12)(["", "a cat"])
        assert ids.tolist() == [[1, 0, 0], [ids[1, 0], ids[1, 1], 1]]
        assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]

    def test_what_is_no_text_or_no_tokenizer_is_refused(
        self, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(TextError, match="not 3"):
            PromptTokenizer(tokenizer_file, 12)(["a cat", 3])  # type: ignore[list-item]
        (tmp_path / "damaged.json").write_text("{}")
        Tokenizer(models.Unigram([("a", 0.0)], unk_id=0, byte_fallback=False)).save(
            str(tmp_path / "other.json")
        )
        for name in ("damaged.json", "other.json", "absent.json"):
            with pytest.raises(BundleError, match=name):
                PromptTokenizer(tmp_path / name, 12)
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(BackendError) as caught:
            PromptTokenizer(tokenizer_file, 12)
        assert 'pip install "ddexport[text]"' in caught.value.hint
