"""Prompts to the numbers that a text encoder reads, and its outputs to the features that a model reads.

A text of n tokens has n rows of features, what the encoder says of its tokens, of which the last is `</s>`.
The models were trained on T rows of which the last n are these, and the others zero.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.captions import clean_caption, needed
from ddexport.runtime.errors import BundleError, TextError
from ddexport.runtime.files import read_arrays
from ddexport.runtime.records import DAMAGED

FEATURE_ARRAYS = {"features": ("floats", 3), "features_mask": ("integers or bools", 2)}
WHAT_FEATURES_ARE = (
    "It must be an npz with `features` (B, T, W), of which the last rows are those of the text, and"
    " `features_mask` (B, T), 1 there and 0 before."
)
END, PADDING = "</s>", "<pad>"
SHOWN = 500  # characters of what was cut off
LONGEST = 4000  # characters that are cleaned: some patterns take quadratic time, a second for these
# To try bundles on: of different length, the first is empty and the last too long.
TRIAL_PROMPTS = (
    "",
    "fox",
    "A red 3",
    "an owl &amp; a <b>cup</b>",
    "a lighthouse at dusk, oil painting",
    "café au lait — 3 cups (1080p)",
    "an empty street in the rain at night, neon signs, https://example.com/street",
    ", ".join(["a harbour with many small boats and gulls above the water"] * 20),
)
TRIAL_TEXTS = len(TRIAL_PROMPTS)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Features:
    """The features of P texts: features float32 (P, T, W), mask int64 (P, T), 1 where a row is the text's.

    They may be given as float16 or float64, and as other integers or bools. Rows outside the mask become
    zero, as the published code makes them. Raises TextError unless all is of these shapes and types and
    finite, and in every mask zeros, if any, are followed by ones.
    """

    features: NDArray[np.float32]
    mask: NDArray[np.int64]

    def __post_init__(self) -> None:
        features, mask = np.asarray(self.features), np.asarray(self.mask)
        if features.dtype not in ("float16", "float32", "float64") or mask.dtype.kind not in "biu":
            raise TextError(f"features are {features.dtype}, their mask {mask.dtype}", WHAT_FEATURES_ARE)
        if features.ndim != 3 or features.shape[:2] != mask.shape or not features.size:
            shapes = f"{features.shape}, their mask {mask.shape}"
            raise TextError(f"features have the shape {shapes}", WHAT_FEATURES_ARE)
        valid = mask.astype(bool)
        wrong = ((valid != mask) | (valid != np.sort(valid)) | ~valid[:, -1:]).any(1)
        if wrong.any():
            row = int(wrong.argmax())
            raise TextError(f"the mask of text {row} is not zeros followed by ones", WHAT_FEATURES_ARE)
        with np.errstate(over="ignore"):
            features = np.where(valid[:, :, None], features, 0).astype(np.float32)
        if not np.isfinite(features).all():
            raise TextError("features are not finite in float32", "Was the text encoder run in float16?")
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "mask", valid.astype(np.int64))

    def __len__(self) -> int:
        return len(self.mask)

    def rows(self, index: Any) -> Features:
        """Those of the texts that `index` selects."""
        return Features(self.features[index], self.mask[index])


def read_features(path: Path, tokens: int, width: int) -> Features:
    """Reads `features` (B, tokens, width) and `features_mask` (B, tokens) of an npz. Raises TextError."""
    arrays = read_arrays(path, FEATURE_ARRAYS, tuple(FEATURE_ARRAYS), TextError, WHAT_FEATURES_ARE)
    features, mask = (arrays[name] for name in FEATURE_ARRAYS)
    if features.shape[1:] != (tokens, width):
        raise TextError(
            f"{path}: `features` must be (B, {tokens}, {width}), but is {features.shape}",
            "Take the text encoder that the model was trained with.",
        )
    try:
        return Features(features, mask)
    except TextError as error:
        raise TextError(f"{path}: {error.message}", error.hint) from error


def left_padded(hidden: NDArray[Any], mask: NDArray[np.integer[Any]], tokens: int) -> Features:
    """What a text encoder gives, (P, N, W) with the n rows of a text first, as features of `tokens` rows.

    mask: (P, N), what `PromptTokenizer` gives. The other rows of an encoder are not zero; they are left out.
    Raises TextError if a row of a text is not finite.
    """
    valid = np.arange(tokens) >= tokens - mask.sum(1, keepdims=True)
    features = np.zeros((*valid.shape, hidden.shape[2]), np.float32)
    features[valid] = hidden[mask.astype(bool)]
    return Features(features, valid.astype(np.int64))


def trial_features(tokens: int, width: int, seed: int = 0) -> Features:
    """Gaussian features of `TRIAL_TEXTS` texts with 1 to `tokens` rows, to try graphs on."""
    counts = np.linspace(1, tokens, TRIAL_TEXTS).round()[:, None]
    features = np.random.default_rng(seed).standard_normal((TRIAL_TEXTS, tokens, width), np.float32)
    return Features(features, (np.arange(tokens) >= tokens - counts).astype(np.int64))


def example_prompt(recipe: Mapping[str, Any]) -> str:
    """A sentence to show how a model of texts is used: one that it knows, if its recipe says some."""
    examples = (recipe.get("condition") or {}).get("examples") or ["a red fox in the snow"]
    return str(examples[0])


@contextmanager
def trials() -> Iterator[None]:
    """`TRIAL_PROMPTS` are drawn, of which one is too long on purpose: nothing is said about that."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_prompts(prompts: Sequence[Any]) -> None:
    """Raises TextError unless there are some, and all are texts."""
    if not prompts:
        raise TextError("no prompt is given", "Give a sentence.")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TextError(f"a prompt is a text, not {prompt!r:.60}", "Give a sentence.")


class PromptTokenizer:
    """The tokenizer of a bundle: prompts, cleaned as the model's captions were, to ids of tokens."""

    def __init__(self, path: Path, tokens: int) -> None:
        """path: a tokenizer.json. tokens: the most of a prompt, `</s>` among them.

        Raises BundleError for a file that is no tokenizer of T5, BackendError if tokenizers is not installed.
        """
        package = needed("tokenizers")
        try:
            self._tokenizer = package.Tokenizer.from_file(str(path))
        except Exception as error:  # its errors have no class of their own
            raise BundleError(f"{path.name} is not a tokenizer: {error}", DAMAGED) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._end, self._padding = map(self._tokenizer.token_to_id, (END, PADDING))
        if self._end is None or self._padding is None:
            raise BundleError(f"{path.name} is not a tokenizer of T5: no {END} or no {PADDING}", DAMAGED)
        self.tokens, self.size = tokens, int(self._tokenizer.get_vocab_size())

    def __call__(self, prompts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """ids int64 (P, N) and mask int64 (P, N), N the length of the longest: padding and 0 behind a prompt.

        What is too long is cut, with a warning. An empty prompt is `</s>` alone. Raises TextError for what is
        not a text.
        """
        rows = [self._ids(prompt) for prompt in prompts]
        longest = max(map(len, rows), default=0)
        ids = np.array([row + [self._padding] * (longest - len(row)) for row in rows], np.int64)
        mask = np.arange(longest) < np.array([[len(row)] for row in rows])
        return ids, mask.astype(np.int64)

    def _ids(self, prompt: str) -> list[int]:
        check_prompts([prompt])
        if len(prompt) > LONGEST:
            logger.warning("a prompt has %d characters; all behind %d are cut off", len(prompt), LONGEST)
        text = clean_caption(clean_caption(prompt[:LONGEST]))
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        room = self.tokens - 1
        if len(encoding.ids) > room:
            cut = text[encoding.offsets[room][0] :].strip()
            count = len(encoding.ids) + 1
            cut = cut if len(cut) <= SHOWN else f"{cut[:SHOWN]}..."
            logger.warning("a prompt has %d tokens of %d at most; cut off: %s", count, self.tokens, cut)
        return [*encoding.ids[:room], self._end]


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, a prompt each, empty ones too. Raises TextError."""
    try:
        text = path.read_text(encoding="utf-8")
        prompts = text.removesuffix("\n").split("\n") if text else []
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as UTF-8 text: {error}", "Give one prompt a line.") from error
    if not prompts:
        raise TextError(f"{path} holds no prompt", "Give one prompt a line.")
    return prompts
