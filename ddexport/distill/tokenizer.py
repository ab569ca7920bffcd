"""Stage 1 and 2: the tokenizer, then its decoder alone on the final codes.

A tokenizer of K scales approximates the latent f = encode(image) by partial sums f_1 .. f_K, after each scale
one (VAR, arXiv 2404.02905, section 3.2); one of a single scale is the case K = 1. Losses: error of the
decoded image, with the gradient passed straight through the quantiser; |f_k - sg(f)|^2, which moves the
codes; and a commitment |sg(f_k) - f|^2. Some images are decoded from f_k of a random k < K (nested dropout):
coarse scales then carry what they can, and little is left to the last scale, whose tokens the teacher draws
in parallel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddexport.distill.data import ImageSet
from ddexport.distill.loop import Run, fit
from ddexport.distill.machine import bfloat16
from ddexport.distill.settings import Augmentation, Loop, TokenizerSettings
from ddexport.distill.trainers import Tokenizer, Trainer
from ddexport.families._vq_codec import ResidualBlock, SpatialAttention

DRAWN = 0.4  # of [-1, 1]: what differs more from the corner of the image is not its ground


class _Training(nn.Module):
    """The tokenizer and what must survive a restart beside it: when each code was last chosen."""

    last_used: Tensor

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.register_buffer("last_used", torch.zeros(len(tokenizer.codebook), dtype=torch.int64))


def image_error(decoded: Tensor, images: Tensor, settings: TokenizerSettings) -> Tensor:
    """Mean squared error plus `absolute` times the mean absolute error, both (B, 3, H, W) in [-1, 1]."""
    error = decoded.float() - images
    error = error.square() + settings.absolute * error.abs()
    if settings.foreground:
        drawn = (images - images[:, :, :1, :1]).abs().amax(1, keepdim=True) > DRAWN
        weight = 1 + settings.foreground * drawn
        error = error * (weight / weight.mean())
    return error.mean()


def train_tokenizer(
    tokenizer: Tokenizer,
    trainer: Trainer,
    images: ImageSet,
    settings: TokenizerSettings,
    augment: Augmentation,
    run: Run,
    key: str,
) -> None:
    """Train everything, in place, in the way of the family's `trainer`."""
    quiet_residuals(tokenizer)
    training = _Training(tokenizer)
    scales = len(tokenizer.scales)
    chosen_codes = torch.empty(0, dtype=torch.int64)

    def continuous(batch: Tensor) -> Tensor:
        with bfloat16():
            return image_error(decoded_latent(tokenizer, trainer.latent(tokenizer, batch)), batch, settings)

    def quantised(batch: Tensor, choice: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with bfloat16():
            latent = trainer.latent(tokenizer, batch)
        latent = latent.float()
        sums, tokens = trainer.partial_latents(tokenizer, latent)
        codes = (sums - latent.detach()).square().mean()
        commitment = (sums.detach() - latent).square().mean()
        chosen = sums.detach()[choice, torch.arange(len(batch))]
        with bfloat16():
            decoded = decoded_latent(tokenizer, latent + (chosen - latent).detach())
        return image_error(decoded, batch, settings), codes, commitment, tokens

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal chosen_codes
        batch = images.draw(settings.batch, generator, augment)
        if i < settings.continuous:
            return continuous(batch), {}
        prefix = torch.randint(scales, (settings.batch,), generator=generator)
        whole = torch.rand(settings.batch, generator=generator) >= settings.prefix
        image, codes, commitment, tokens = quantised(batch, torch.where(whole, scales - 1, prefix))
        chosen_codes = tokens.unique()
        return image + codes + settings.commitment * commitment, {"image": image, "codes": codes}

    def after_step(i: int) -> None:
        generator = run.generator("tokenizer-codes", i)
        if i + 1 == settings.continuous:
            seed_codebook(tokenizer, trainer, images.draw(256, generator, augment), generator)
            training.last_used[:] = i
        if i < settings.continuous:
            return
        training.last_used[chosen_codes] = i
        if (i + 1) % settings.reseed == 0 and i < settings.iterations // 2:
            dead = (training.last_used <= i - settings.reseed).nonzero()[:, 0]
            with torch.no_grad():
                batch = images.draw(settings.batch, generator, augment)
                vectors = torch.cat(trainer.residual_vectors(tokenizer, trainer.latent(tokenizer, batch)))
                pick = torch.randint(len(vectors), (len(dead),), generator=generator)
                tokenizer.embedding.weight[dead] = vectors[pick]
            training.last_used[dead] = i

    fit("tokenizer", run, settings, training, loss, key, after_step)
    trainer.settle_codebook(tokenizer)


def train_decoder(
    tokenizer: Tokenizer,
    images: ImageSet,
    loop: Loop,
    settings: TokenizerSettings,
    augment: Augmentation,
    run: Run,
    key: str,
) -> None:
    """Train decoder and post-quantisation convolution, in place, on codes that no longer move."""
    tokenizer.requires_grad_(False)
    tokenizer.post_quant_conv.requires_grad_(True)
    tokenizer.decoder.requires_grad_(True)

    def error(batch: Tensor) -> Tensor:
        with torch.no_grad():
            latent = tokenizer.latent(tokenizer.embed(tokenizer.tokens(tokenizer.encode(batch))))
        with bfloat16():
            decoded = decoded_latent(tokenizer, latent)
        return image_error(decoded, batch, settings)

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return error(images.draw(loop.batch, generator, augment)), {}

    fit("decoder", run, loop, tokenizer, loss, key)
    tokenizer.requires_grad_(True)


@torch.no_grad()
def quiet_residuals(tokenizer: Tokenizer) -> None:
    """Start every residual block and attention as the identity: at rates of 1e-3 and more, it trains only
    then.
    """
    for module in tokenizer.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.weight.zero_()
        elif isinstance(module, SpatialAttention):
            module.proj.weight.zero_()


def decoded_latent(tokenizer: Tokenizer, latent: Tensor) -> Tensor:
    """latent (B, Cv, h, w) -> images (B, 3, H, W), not clamped: a clamp would stop gradients."""
    return tokenizer.decoder(tokenizer.post_quant_conv(latent))


@torch.no_grad()
def seed_codebook(tokenizer: Tokenizer, trainer: Trainer, images: Tensor, generator: torch.Generator) -> None:
    """Start the codes from what each scale gets to quantise: an equal share of the codebook a scale.

    images: (B, 3, H, W) in [-1, 1]. A scale's residual depends on the codes of the scales before, so the
    shares are filled one after the other; shares not filled yet are kept out of reach.
    """
    latent = trainer.latent(tokenizer, images)
    codes = tokenizer.embedding.weight
    shares = torch.arange(len(codes)).chunk(len(tokenizer.scales))
    codes.fill_(1e3)
    for k, share in enumerate(shares):
        vectors = trainer.residual_vectors(tokenizer, latent)[k]
        codes[share] = vectors[torch.randint(len(vectors), (len(share),), generator=generator)]


@torch.no_grad()
def tokens_of_images(tokenizer: Tokenizer, images: Tensor, batch: int = 500) -> Tensor:
    """images (N, 3, H, W) in [-1, 1] -> tokens (N, L) int64."""
    return torch.cat([tokenizer.tokens(tokenizer.encode(part)) for part in images.split(batch)])


@torch.no_grad()
def images_of_sequences(tokenizer: Tokenizer, sequences: Tensor, batch: int = 500) -> Tensor:
    """sequences (N, L, Cv) -> images (N, 3, H, W) in [0, 1]."""
    return torch.cat([tokenizer(part) for part in sequences.split(batch)])
