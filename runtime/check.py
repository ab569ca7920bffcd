"""`ddexport doctor --check`: draws again, where the bundle lies, what PyTorch drew when its parity was
proven.

`validate parity` leaves `parity/golden.npz` in the bundle; neither PyTorch nor a checkpoint is needed here.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.bundle import FILE_NAME, sha256_of
from ddexport.runtime.errors import BundleError, VerificationError
from ddexport.runtime.pipeline import Pipeline
from ddexport.runtime.text import Features, trials

FILE = "parity/golden.npz"
MAKE = "Make it on the machine where the bundle was exported: ddexport validate parity BUNDLE"


@dataclass(frozen=True)
class Golden:
    """What PyTorch drew: seeds uint64 (8,), labels int64 (8,), and for each number of steps tokens int64 (8,
    T), sequences float32 (8, L, Cv) and images uint8 (8, H, W, C). Of a text model the labels number
    `prompts`, or texts of which features (P, T, W) and features_mask (P, T) are stored."""

    steps: tuple[str, ...]
    seeds: NDArray[np.uint64]
    labels: NDArray[np.int64]
    arrays: dict[str, NDArray[Any]]

    def of(self, name: str, steps: str) -> NDArray[Any]:
        """tokens, sequences or images in so many steps."""
        return self.arrays[f"{name}_{steps}"]

    def condition(self, label: int) -> Any:
        """What an image is drawn from: its label, prompt or `Features`."""
        if "prompts" in self.arrays:
            return str(self.arrays["prompts"][label])
        if "features" in self.arrays:
            return Features(*(self.arrays[name][[label]] for name in ("features", "features_mask")))
        return int(label)


@dataclass(frozen=True)
class Check:
    """How far the images of one number of steps are from PyTorch's. psnr and largest: of the 8-bit images
    whose tokens agree; left_out: how many do not. faults: what is past its limit."""

    steps: str
    images: int
    tokens_differing: float
    left_out: int
    psnr: float
    largest: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        title = self.steps if self.steps == "teacher" else f"{self.steps} step{'s' * (self.steps != '1')}"
        figures = f"{self.images - self.left_out} of {self.images} images with equal tokens"
        verdict = "FAIL: " + "; ".join(self.faults) if self.faults else "ok"
        return f"  {title:10}{figures}, PSNR {self.psnr:.1f} dB, 8-bit difference {self.largest}  {verdict}"


def read_golden(root: Path) -> Golden:
    """The file of a bundle. Raises BundleError if there is none or it is damaged, VerificationError if it is
    of another manifest."""
    path = root / FILE
    if not path.is_file():
        raise BundleError(f"the bundle {root} has no {FILE}", MAKE)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        golden = Golden(
            tuple(map(str, arrays["steps"])), arrays["seeds"], arrays["labels"].astype(np.int64), arrays
        )
        sizes = {len(golden.of(name, s)) for name in ("tokens", "images") for s in golden.steps}
        manifest = str(arrays["manifest"])
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} is damaged: {error}", MAKE) from error
    if sizes != {len(golden.seeds)} or len(golden.labels) != len(golden.seeds) or not golden.steps:
        raise BundleError(f"{path} is damaged: its arrays do not fit each other", MAKE)
    if manifest != sha256_of(root / FILE_NAME):
        raise VerificationError(f"{FILE} was made from another bundle.json than this one", MAKE)
    return golden


def check(pipe: Pipeline, golden: Golden) -> list[Check]:
    """Draws each image by its label and seed, in every schedule. Raises DDError where that cannot be done."""
    limits = pipe.manifest.parity.get(pipe.precision)
    names = ("tokens_differing", "images_left_out", "pixel_psnr", "image_max")
    if not isinstance(limits, dict) or not all(isinstance(limits.get(name), (int, float)) for name in names):
        raise VerificationError(
            f"the bundle states no parity limits for {pipe.precision}", "Export it again."
        )
    with trials():
        return [_check(pipe, golden, steps, limits) for steps in golden.steps]


def _check(pipe: Pipeline, golden: Golden, steps: str, limits: dict[str, float]) -> Check:
    number = int(steps) if steps.isdecimal() else steps
    results = [
        pipe(golden.condition(label), number, seed=int(seed), output="numpy")
        for label, seed in zip(golden.labels, golden.seeds, strict=True)
    ]
    wanted, pictures = golden.of("tokens", steps), golden.of("images", steps)
    tokens = np.concatenate([result.steps[-1].tokens for result in results])
    images = np.concatenate([np.asarray(result.images) for result in results])
    if tokens.shape != wanted.shape or images.shape != pictures.shape:
        raise VerificationError(f"in {steps} steps the shapes are not those of {FILE}", MAKE)
    same = (tokens == wanted).all(axis=1)
    share, left_out = float((tokens != wanted).mean()), int((~same).sum())
    errors = (images[same].astype(np.float64) - pictures[same]) / 255
    worst = float(np.square(errors).mean(axis=(1, 2, 3)).max(initial=0.0))
    psnr = -10 * np.log10(worst) if worst else np.inf
    largest = int(np.abs(errors * 255).max(initial=0).round())
    # Of eight images one may always be left out: that is rounding's share, not a fault's. A teacher's tokens
    # are draws, one behind the other, and have a limit of their own where the bundle states one.
    allowed = limits["images_left_out"]
    if pipe.schedule(number).teacher:
        allowed = limits.get("drawn_left_out", allowed)
    most = max(1, int(allowed * len(same)))
    rules = (
        (left_out <= most, f"tokens differ in {left_out} images, limit {most}"),
        (left_out < len(same), "no image could be compared"),
        (psnr >= limits["pixel_psnr"], f"PSNR {psnr:.1f} dB, limit {limits['pixel_psnr']:g}"),
        (largest <= limits["image_max"], f"8-bit difference {largest}, limit {limits['image_max']:g}"),
    )
    faults = tuple(text for kept, text in rules if not kept)
    return Check(steps, len(same), share, left_out, float(psnr), largest, faults)
