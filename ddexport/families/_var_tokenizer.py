"""VAR's tokenizer: a VQVAE whose latent is a sum of codes at growing resolutions (VAR, arXiv 2404.02905,
section 3.2)."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.families._vq_codec import CodecGeometry, Decoder, Encoder

SHARED_PHIS = 4


def phi_of_scale(scales: int) -> list[int]:
    """Which of the shared convolutions each scale uses: the one whose tick is nearest to k / (K - 1).

    Float64 on purpose: for ten scales two of them are exact ties, decided by the rounding of `linspace`.
    """
    ticks = np.linspace(1 / 3 / SHARED_PHIS, 1 - 1 / 3 / SHARED_PHIS, SHARED_PHIS)
    return [int(np.argmin(np.abs(ticks - k / (scales - 1)))) for k in range(scales)]


class Phi(nn.Module):
    """Smooths an upsampled code map: the mean of the map and its convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, Cv, h, w]
        return 0.5 * x + 0.5 * self.conv(x)


class MultiScaleTokenizer(nn.Module):
    """Images <-> token sequences of K scales; the sequence is scale after scale, each row by row.

    Args:
        geometry: sizes of encoder and decoder; `latent_channels` is the code width Cv.
        codebook: number of entries V.
        scales: side lengths s_1 .. s_K; the last is the side of the latent.
    """

    def __init__(self, geometry: CodecGeometry, codebook: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        width = geometry.latent_channels
        self.scales = scales
        self.starts = [0, *np.cumsum([s * s for s in scales]).tolist()]
        self.phi_index = phi_of_scale(len(scales))
        self.encoder = Encoder(geometry)
        self.quant_conv = nn.Conv2d(width, width, 3, padding=1)
        self.embedding = nn.Embedding(codebook, width)
        self.phis = nn.ModuleList(Phi(width) for _ in range(SHARED_PHIS))
        self.post_quant_conv = nn.Conv2d(width, width, 3, padding=1)
        self.decoder = Decoder(geometry)

    @property
    def codebook(self) -> Tensor:
        """[V, Cv], the vectors that tokens stand for."""
        return self.embedding.weight

    def forward(self, sequence: Tensor) -> Tensor:
        """sequence [B, L, Cv] -> images [B, 3, H, W] in [0, 1]."""
        return self.decode(self.latent(sequence))

    def latent(self, sequence: Tensor) -> Tensor:
        """sequence [B, L, Cv] -> f_hat [B, Cv, h, w]: the sum of all scales' contributions."""
        first, *rest = (
            self.contribution(sequence[:, a:b], k) for k, (a, b) in enumerate(pairwise(self.starts))
        )
        for contribution in rest:
            first = first + contribution
        return first

    def contribution(self, tokens: Tensor, scale: int) -> Tensor:
        """What the code vectors [B, s*s, Cv] of one scale add to f_hat: [B, Cv, h, w]."""
        side, latent = self.scales[scale], self.scales[-1]
        x = tokens.transpose(1, 2).reshape(-1, tokens.shape[2], side, side)
        if side != latent:
            x = F.interpolate(x, size=(latent, latent), mode="bicubic", align_corners=False)
        return self.phis[self.phi_index[scale]](x)

    def decode(self, f_hat: Tensor) -> Tensor:
        """f_hat [B, Cv, h, w] -> images [B, 3, H, W] in [0, 1]."""
        return (self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1) + 1) / 2

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> the latent to quantise [B, Cv, h, w]."""
        return self.quant_conv(self.encoder(images))

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors [..., Cv] -> the nearest codebook entries [...] int64, by squared distance."""
        codes = self.codebook
        distance = codes.square().sum(-1) - 2 * vectors @ codes.T  # the vector's own square moves no minimum
        return distance.argmin(-1)

    def tokens(self, latent: Tensor) -> Tensor:
        """latent [B, Cv, h, w] -> tokens [B, L] int64, by residual quantisation from the coarsest scale
        on."""
        tokens, rest = [], latent
        for k, side in enumerate(self.scales):
            view = F.interpolate(rest, size=(side, side), mode="area") if side != self.scales[-1] else rest
            indices = self.nearest(view.flatten(2).transpose(1, 2))
            rest = rest - self.contribution(self.embed(indices), k)
            tokens.append(indices)
        return torch.cat(tokens, dim=1)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, n] int64 -> code vectors [B, n, Cv]."""
        return self.embedding(tokens)

    def next_features(self, f_hat: Tensor, scale: int) -> Tensor:
        """The teacher's input for `scale`: f_hat of the scales before, area-downsampled to its side: [B,
        s*s, Cv]."""
        side = self.scales[scale]
        view = F.interpolate(f_hat, size=(side, side), mode="area") if side != self.scales[-1] else f_hat
        return view.flatten(2).transpose(1, 2)

    def without_codec(self) -> MultiScaleTokenizer:
        """This tokenizer with its codes and phis alone, shared: enough for `embed`, `latent` and what the
        teacher reads."""
        bare = copy.copy(self)
        bare._modules = {name: self._modules[name] for name in ("embedding", "phis")}
        return bare

    def teacher_features(self, sequence: Tensor) -> Tensor:
        """The teacher's inputs for all scales at once (teacher forcing): [B, L, Cv]; scale 0 has none, zeros
        there."""
        features = [torch.zeros_like(sequence[:, :1])]
        f_hat = torch.zeros(())
        for k, (a, b) in enumerate(pairwise(self.starts[:-1])):
            f_hat = f_hat + self.contribution(sequence[:, a:b], k)
            features.append(self.next_features(f_hat, k + 1))
        return torch.cat(features, dim=1)
