"""The Inception network of 2015-12-05, which FID is defined by, as pytorch-fid and torch-fidelity run it.

Why not theirs: both import torchvision, which does not import beside the CPU build of torch. Nor is it
torchvision's: average pooling does not count the padding, the last block pools by maximum (Mixed_7c;
Mixed_7b by average), and there are 1008 classes. Modules carry the published names, so that the published
file is its state dict. Sources: Szegedy et al., arXiv 1512.00567; mseitzer/pytorch-fid 0.3.0;
toshas/torch-fidelity 0.4.0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, CLASSES, SIDE = 2048, 1008, 299

Pool = Literal["average", "maximum", "halving"]


class Conv(NamedTuple):
    """A convolution by its published name; stride 1 pads to the same size, stride 2 does not pad."""

    name: str
    out: int
    height: int
    width: int
    stride: int = 1


# A branch is a chain; a tuple of two at its end is a fork whose arms are concatenated.
Branch: TypeAlias = list[tuple[Conv, ...]]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, width: int, out: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, width, H, W) -> (N, out, H', W')."""
        return functional.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block of parallel branches, the last of which is a pooling of the input."""

    def __init__(self, width: int, branches: list[Branch], pool: Pool, pool_out: int = 0) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        for branch in branches:
            arm_width = width
            for arms in branch:
                for conv in arms:
                    self.add_module(conv.name, _conv_norm(arm_width, conv))
                arm_width = arms[-1].out
        if pool != "halving":
            self.branch_pool = _conv_norm(width, Conv("branch_pool", pool_out, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, width, H, W) -> (N, sum of the branches' widths, H', W')."""
        outputs = []
        for branch in self.branches:
            y = x
            for arms in branch:
                y = torch.cat([self.get_submodule(conv.name)(y) for conv in arms], 1)
            outputs.append(y)
        return torch.cat([*outputs, self._pooled(x)], 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "halving":
            return functional.max_pool2d(x, 3, 2)
        if self.pool == "maximum":
            return self.branch_pool(functional.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


class FidInception(nn.Module):
    """Images of 299 x 299 in [-1, 1] -> pool3 features and the 1008 logits without their bias."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), 2, (0, 0))
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3), 1, (0, 0))
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), 1, (1, 1))
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1), 1, (0, 0))
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3), 1, (0, 0))
        for name, width, pool_out in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", _block_35(width, pool_out))
        self.Mixed_6a = _to_17(288)
        for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", _block_17(inner))
        self.Mixed_7a = _to_8(768)
        self.Mixed_7b = _block_8(1280, "average")
        self.Mixed_7c = _block_8(2048, "maximum")
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (N, 3, 299, 299) -> (N, 2048), (N, 1008)."""
        x = images
        for name, module in self.named_children():
            if name != "fc":
                x = module(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = functional.max_pool2d(x, 3, 2)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def prepare(images: Tensor) -> Tensor:
    """As pytorch-fid does: images (N, 3, H, W) of 0..255 -> (N, 3, 299, 299), v / 127.5 - 1.

    Pixels are squares whose centres lie at half integers: output i reads the input at (i + 0.5) s - 0.5. No
    smoothing when an image is made smaller.
    """
    resized = functional.interpolate(images / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * resized - 1


def _conv_norm(width: int, conv: Conv) -> ConvNorm:
    padding = (conv.height // 2, conv.width // 2) if conv.stride == 1 else (0, 0)
    return ConvNorm(width, conv.out, (conv.height, conv.width), conv.stride, padding)


def _chain(prefix: str, *sizes: tuple[int, ...]) -> Branch:
    """Convolutions `prefix`_1, `prefix`_2, ... of (out, height, width) or (out, height, width, stride)."""
    return [(Conv(f"{prefix}_{i}", *size),) for i, size in enumerate(sizes, 1)]


def _fork(prefix: str) -> tuple[Conv, Conv]:
    return Conv(f"{prefix}a", 384, 1, 3), Conv(f"{prefix}b", 384, 3, 1)


def _block_35(width: int, pool_out: int) -> Mixed:
    branches: list[Branch] = [
        [(Conv("branch1x1", 64, 1, 1),)],
        _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
        _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
    ]
    return Mixed(width, branches, "average", pool_out)


def _to_17(width: int) -> Mixed:
    branches: list[Branch] = [
        [(Conv("branch3x3", 384, 3, 3, 2),)],
        _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3, 2)),
    ]
    return Mixed(width, branches, "halving")


def _block_17(inner: int) -> Mixed:
    branches: list[Branch] = [
        [(Conv("branch1x1", 192, 1, 1),)],
        _chain("branch7x7", (inner, 1, 1), (inner, 1, 7), (192, 7, 1)),
        _chain("branch7x7dbl", (inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)),
    ]
    return Mixed(768, branches, "average", 192)


def _to_8(width: int) -> Mixed:
    branches: list[Branch] = [
        _chain("branch3x3", (192, 1, 1), (320, 3, 3, 2)),
        _chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)),
    ]
    return Mixed(width, branches, "halving")


def _block_8(width: int, pool: Pool) -> Mixed:
    branches: list[Branch] = [
        [(Conv("branch1x1", 320, 1, 1),)],
        [(Conv("branch3x3_1", 384, 1, 1),), _fork("branch3x3_2")],
        [*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), _fork("branch3x3dbl_3")],
    ]
    return Mixed(width, branches, pool, 192)
