"""Light augmentation of training images: one random rotation, shift and scale an image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_affine(
    images: Tensor, generator: torch.Generator, degrees: float, shift: float, scale: float
) -> Tensor:
    """Each image turned by up to `degrees`, moved by up to `shift` pixels and scaled by 1 +- `scale`.

    images: (N, C, H, W) in [-1, 1], background -1. Returns the same shape; what comes into view is
    background.
    """
    n, side = len(images), images.shape[-1]
    u = torch.rand(4, n, generator=generator) * 2 - 1
    angle, zoom = u[0] * math.radians(degrees), 1 / (1 + scale * u[1])
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    dx, dy = (2 * shift / side) * u[2:]
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grey = images[:, :1] if images.stride(1) == 0 else images  # an expanded grey image is warped once
    grid = F.affine_grid(theta, list(grey.shape), align_corners=False)
    moved = F.grid_sample(grey + 1, grid, padding_mode="zeros", align_corners=False) - 1
    return moved.expand_as(images)
