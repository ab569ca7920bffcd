"""What both sides of a comparison draw from: the classes of a bundle, or eight or so texts.

Of texts the bundle gets prompts, or features where it has no text encoder. The reference gets features, those
that its own encoder makes of the prompts. Where there is no encoder both get the same: the features of the
recipe's examples if their encoder ships, because the limits were measured on these, else Gaussian ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.bundle import ENCODER, Manifest, Text, resolve
from ddexport.runtime.labels import read_labels
from ddexport.runtime.text import END, PADDING, TRIAL_PROMPTS, Features, trial_features

if TYPE_CHECKING:
    from ddexport.text_encoder import TextEncoder

IntArray: TypeAlias = npt.NDArray[np.int64]
# `TRIAL_PROMPTS` as the published code cleans them, so that a fault of the runtime's cleaning shows.
CLEANED = (
    "",
    "fox",
    "a red 3",
    "an owl a cup",
    "a lighthouse at dusk, oil painting",
    "café au lait - 3 cups 1080p",
    "an empty street in the rain at night, neon signs",
    TRIAL_PROMPTS[-1],
)


class Classes:
    """Labels (N,) int64 are numbers of classes, of which there are `count`."""

    kind = "label"
    prompts: tuple[str, ...] = ()

    def __init__(self, count: int) -> None:
        self.count = count

    def of_bundle(self, labels: IntArray) -> Any:
        """What a pipeline is given."""
        return labels.tolist()

    def of_reference(self, labels: IntArray) -> tuple[npt.NDArray[Any], ...]:
        """What a module is given, a row an image: of a class its number."""
        return (labels,)

    def stored(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of golden.npz that labels number."""
        return {}


class Texts:
    """Labels number `count` texts: prompts, or features where the bundle has no text encoder."""

    kind = "text"

    def __init__(
        self,
        text: Text,
        features: Features | None = None,
        encoder: bool = True,
        prompts: tuple[str, ...] = TRIAL_PROMPTS,
    ) -> None:
        """features: what the reference's encoder makes of the prompts; Gaussian ones where there are none.
        encoder: whether the bundle's, if it has one, is used."""
        self.prompts = prompts if text.tokenizer and encoder else ()
        self.features = trial_features(text.tokens, text.width) if features is None else features
        self.count = len(self.prompts) or len(self.features)

    def of_bundle(self, labels: IntArray) -> Any:
        """What a pipeline is given."""
        if self.prompts:
            return [self.prompts[label] for label in labels]
        return Features(*self.of_reference(labels))

    def of_reference(self, labels: IntArray) -> tuple[npt.NDArray[Any], ...]:
        """What a module is given, a row an image: features (N, T, W) float32 and mask (N, T) int64."""
        return self.features.features[labels], self.features.mask[labels]

    def stored(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of golden.npz that labels number."""
        if self.prompts:
            return {"prompts": np.array(self.prompts)}
        return {"features": self.features.features, "features_mask": self.features.mask}


def conditions_of(
    manifest: Manifest, features: Features | None = None, encoder: bool = True
) -> Classes | Texts:
    """Those of a bundle. features, encoder: as those of `Texts`. Raises DDError where an encoder that ships
    cannot be read."""
    if manifest.text is None:
        return Classes(manifest.classes)
    if features is None and encoder and manifest.text.tokenizer is None:
        features = _of_examples(manifest, manifest.text)
    return Texts(manifest.text, features, encoder, prompts_of(manifest)[0])


def _of_examples(manifest: Manifest, text: Text) -> Features | None:
    """What the text encoder that ships makes of the recipe's examples; None without either."""
    from ddexport.recipe import Source, embedded_weights, recipe_of
    from ddexport.text_encoder import text_encoder

    source, examples = recipe_of(manifest).files.get(ENCODER, Source()), _examples(manifest)
    if not (source.embedded and examples):
        return None
    return encoded(text_encoder(embedded_weights(source)), text, examples)


def prompts_of(manifest: Manifest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is drawn of a bundle with a text encoder, and the same as the published code cleans it: the
    examples of its recipe, which are clean, or the trial prompts."""
    examples = _examples(manifest)
    return (examples, examples) if examples else (TRIAL_PROMPTS, CLEANED)


def _examples(manifest: Manifest) -> tuple[str, ...]:
    return tuple((manifest.recipe.get("condition") or {}).get("examples") or ())


def spread(count: int, images: int, seed: int) -> IntArray:
    """Labels (N,) int64 spread over all, of which there are `count`."""
    return (np.arange(images, dtype=np.int64) * count // images + seed % count) % count


def names_of(root: Path, manifest: Manifest) -> tuple[str, ...]:
    """What each label stands for, for people."""
    if manifest.text is None:
        return tuple(read_labels(resolve(root, manifest.labels.file), manifest.classes).names)
    conditions = conditions_of(manifest)
    return conditions.prompts or tuple(f"text {number}" for number in range(conditions.count))


def encoded(encoder: TextEncoder, text: Text, prompts: Sequence[str]) -> Features:
    """The prompts as the published script makes features of them: padded to all tokens by the tokenizer of
    transformers, which also cuts; then rolled, so that the rows of a text are the last ones.

    Raises CheckpointError for an encoder of another width, or that has no tokenizer.
    """
    import torch
    from transformers import PreTrainedTokenizerFast

    file = encoder.tokenizer_file(text.width)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token=PADDING, eos_token=END)
    how = {"padding": "max_length", "truncation": True, "max_length": text.tokens, "return_tensors": "pt"}
    words = tokenizer(list(prompts), **how).to(next(encoder.parameters()).device)
    mask = words["attention_mask"]
    with torch.inference_mode():
        hidden = encoder(words["input_ids"], mask)
    rolled = [row.roll(-int(seen.sum()), 0) for row, seen in zip(hidden, mask, strict=True)]
    return Features(torch.stack(rolled).cpu().numpy(), mask.flip(1).cpu().numpy())
