"""LlamaGen's tokenizer: a VQGAN with one code of unit length for each place of the latent (LlamaGen, arXiv
2406.06525, section 2.1; codes of unit length after "Improved VQGAN", arXiv 2110.04627)."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.families._vq_codec import CodecGeometry, Decoder, Encoder


class RasterTokenizer(nn.Module):
    """Images <-> token sequences of one scale, row by row.

    Args:
        geometry: sizes of encoder and decoder; their latent has `latent_channels`.
        codebook: number of entries V.
        width: length of a code vector, Cv.
        side: side of the token map; the sequence has L = side^2 positions.
    """

    def __init__(self, geometry: CodecGeometry, codebook: int, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.scales = (side,)
        self.starts = list(range(side * side + 1))  # raster order: one token at a time
        self.encoder = Encoder(geometry)
        self.quant_conv = nn.Conv2d(geometry.latent_channels, width, 1)
        self.embedding = nn.Embedding(codebook, width)
        self.post_quant_conv = nn.Conv2d(width, geometry.latent_channels, 1)
        self.decoder = Decoder(geometry)

    @property
    def codebook(self) -> Tensor:
        """[V, Cv], the vectors that tokens stand for: the table's rows, each brought to unit length."""
        return F.normalize(self.embedding.weight, dim=-1)

    def forward(self, sequence: Tensor) -> Tensor:
        """sequence [B, L, Cv] -> images [B, 3, H, W] in [0, 1]."""
        return self.decode(self.latent(sequence))

    def latent(self, sequence: Tensor) -> Tensor:
        """sequence [B, L, Cv] -> [B, Cv, h, w]; nothing is normalised, regressed embeddings stay as long as
        they are."""
        return sequence.transpose(1, 2).unflatten(2, (self.side, self.side))

    def without_codec(self) -> RasterTokenizer:
        """This tokenizer with its codes alone, shared: enough for `embed` and `latent`."""
        bare = copy.copy(self)
        bare._modules = {"embedding": self._modules["embedding"]}
        return bare

    def decode(self, latent: Tensor) -> Tensor:
        """latent [B, Cv, h, w] -> images [B, 3, H, W] in [0, 1]."""
        return (self.pixels(latent).clamp(-1, 1) + 1) / 2

    def pixels(self, latent: Tensor) -> Tensor:
        """latent [B, Cv, h, w] -> what the decoder says before it is cut to [-1, 1]: [B, 3, H, W]."""
        return self.decoder(self.post_quant_conv(latent))

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> the latent to quantise [B, Cv, h, w], of any length."""
        return self.quant_conv(self.encoder(images))

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors [..., Cv] -> the nearest codebook entries [...] int64.

        Among codes of unit length the nearest one has the largest inner product, whether the vector is
        brought to unit length before (as the published quantiser does) or not.
        """
        return (vectors @ self.codebook.T).argmax(-1)

    def tokens(self, latent: Tensor) -> Tensor:
        """latent [B, Cv, h, w] -> tokens [B, L] int64, row by row."""
        return self.nearest(latent.flatten(2).transpose(1, 2))

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, n] int64 -> code vectors [B, n, Cv] of unit length."""
        return F.embedding(tokens, self.codebook)
