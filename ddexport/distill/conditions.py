"""What teacher and student draw from: a class, or a sentence that a text encoder reads.

Shapes: N images, T text rows, W width of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.distill.data import DataSet
from ddexport.runtime.text import END, PADDING, Features
from ddexport.text_encoder import TextEncoder

UNKNOWN = "<unk>"

Rows: TypeAlias = Mapping[str, Tensor]


class Condition(Protocol):
    """What the images of a training are drawn from; so many `images` of a batch in a row share it."""

    images: int

    def labels(self, count: int, generator: torch.Generator) -> Tensor:
        """Random labels (count,) int64."""

    def rows(self, labels: Tensor, generator: torch.Generator, held_out: bool = False) -> dict[str, Tensor]:
        """What is stored with a pair, a row a label: enough for `inputs`. held_out: as that of `Part`."""
        return {"labels": labels}

    def inputs(self, rows: Rows) -> tuple[Tensor, ...]:
        """What teacher and student read of such rows."""

    def without(self, inputs: tuple[Tensor, ...], dropped: Tensor, teacher: Any) -> tuple[Tensor, ...]:
        """These inputs, with guidance's null condition where `dropped` (N,) is true."""

    def trained(self) -> tuple[nn.Module, ...]:
        """What is trained with a teacher, besides."""
        return ()

    def losses(self, inputs: tuple[Tensor, ...], labels: Tensor) -> dict[str, Tensor]:
        """What that is trained for, besides the loss of the teacher."""
        return {}


class Classes(Condition):
    """A label is a class, and nothing else is read."""

    images = 1

    def __init__(self, count: int) -> None:
        self.count = count

    def labels(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.count, (count,), generator=generator)

    def inputs(self, rows: Rows) -> tuple[Tensor, ...]:
        return (rows["labels"],)

    def without(self, inputs: tuple[Tensor, ...], dropped: Tensor, teacher: Any) -> tuple[Tensor, ...]:
        return (inputs[0].masked_fill(dropped, self.count),)


class Texts(Condition):
    """A label numbers a text whose features are known."""

    def __init__(self, features: Iterable[Features], images: int) -> None:
        """features: of all texts. Their own rows are kept, without padding, and on the host: published
        models read 120 rows of 2,048 numbers, a megabyte a text, of which most texts fill a sixth."""
        parts = [(part.features[part.mask.astype(bool)], part.mask) for part in features]
        own, masks = zip(*parts, strict=True)
        self.own, self.mask = torch.from_numpy(np.concatenate(own)), torch.from_numpy(np.concatenate(masks))
        self.ends, self.images = self.mask.sum(1).cumsum(0), images

    def labels(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.mask), (count,), generator=generator)

    def inputs(self, rows: Rows) -> tuple[Tensor, ...]:
        labels = rows["labels"]
        mask, ends = self.mask[labels], self.ends[labels]
        features = self.own.new_zeros(*mask.shape, self.own.shape[1])
        spans = zip((ends - mask.sum(1)).tolist(), ends.tolist(), strict=True)
        features[mask.bool()] = torch.cat([self.own[start:end] for start, end in spans])
        return features, mask

    def without(self, inputs: tuple[Tensor, ...], dropped: Tensor, teacher: Any) -> tuple[Tensor, ...]:
        features, mask = inputs
        null = teacher.condition_embedding.null * mask[:, :, None]
        return torch.where(dropped[:, None, None], null, features), mask


class Captions(Texts):
    """A label is described by a sentence, another one each time."""

    def __init__(self, data: DataSet, tokenizer: Any, encoder: TextEncoder, tokens: int, images: int) -> None:
        """data: has captions. tokenizer: of `word_tokenizer`. tokens: T, `</s>` among them."""
        self.data, self.tokenizer, self.encoder = data, tokenizer, encoder
        self.tokens, self.images = tokens, images
        sizes = (data.attributes.amax(0) + 1).tolist()  # of what sentences speak of
        self.readers = nn.ModuleList(nn.Linear(encoder.width, size) for size in sizes)

    def labels(self, count: int, generator: torch.Generator) -> Tensor:
        return self.data.train.random_labels(count, generator)

    def rows(self, labels: Tensor, generator: torch.Generator, held_out: bool = False) -> dict[str, Tensor]:
        ids = self.ids(self.data.captions(labels, generator, held_out))
        return {"labels": labels, "ids": ids.to(torch.int16)}

    def trained(self) -> tuple[nn.Module, ...]:
        return self.encoder, self.readers

    def losses(self, inputs: tuple[Tensor, ...], labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy of linear readers of the attributes, from the last row of a text and its mean row.

        What a sentence says of ink and ground shows in a fourth of the images: by their tokens alone an
        encoder does not learn which word is which.
        """
        features, mask = inputs
        mean = features.sum(1) / mask.sum(1, keepdim=True)
        columns = self.data.attributes[labels].T
        read = [
            F.cross_entropy(reader(x), column)
            for x in (features[:, -1], mean)
            for reader, column in zip(self.readers, columns, strict=True)
        ]
        return {"misread": torch.stack(read).sum()}

    def ids(self, sentences: Sequence[str]) -> Tensor:
        """Numbers of the words of sentences, left-padded: (N, T) int64."""
        padding = self.tokenizer.token_to_id(PADDING)
        rows = [line.ids for line in self.tokenizer.encode_batch(list(sentences))]
        return torch.tensor([[padding] * (self.tokens - len(row)) + row for row in rows])

    def inputs(self, rows: Rows) -> tuple[Tensor, ...]:
        """Features (N, T, W) and mask (N, T). T5 knows of positions nothing but their distance, so that
        left-padded words have the features that right-padded ones have."""
        ids = rows["ids"].long()
        mask = (ids != self.tokenizer.token_to_id(PADDING)).long()
        return self.encoder(ids, mask) * mask[:, :, None], mask


def word_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer of the package tokenizers whose tokens are these words and the marks of T5. It ends a text
    with `</s>`, as that of T5."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = (PADDING, END, UNKNOWN, *words)
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        f"$A {END}", special_tokens=[(END, names.index(END))]
    )
    tokenizer.add_special_tokens([PADDING, END, UNKNOWN])
    return tokenizer
