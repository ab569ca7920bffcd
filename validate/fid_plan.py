"""What `validate fid` is asked to measure: the options, completed from what the bundle says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddexport.runtime.bundle import Manifest
from ddexport.runtime.errors import DDError, VerificationError
from ddexport.runtime.pipeline import default_batch_size
from ddexport.validate.drawing import Order, student_schedules
from ddexport.validate.features._base import Extractor, is_random
from ddexport.validate.fid_figures import Gate
from ddexport.validate.statistics import TooFewSamples

NONE = "none"  # as a reference set: the two sides are compared with each other alone


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see `--help`."""

    bundle: Path
    images: int | None = None
    per_class: int | None = None
    steps: tuple[int, ...] = ()
    seed: int = 0
    features: str | None = None
    features_weights: str | None = None
    reference: str | None = None
    reference_model: bool = True
    batch: int | None = None
    precision: str | None = None
    backend: str = "auto"
    emulate: bool | None = None
    threads: int | None = None
    device: str = "cpu"
    checkpoint: Path | None = None
    vae: Path | None = None
    weights: str | None = None
    allow_few: bool = False
    bootstrap: int | None = None
    save_images: Path | None = None
    state: Path | None = None


class FidSettingError(DDError):
    """A measurement that the bundle or the options do not determine."""


@dataclass(frozen=True)
class Plan:
    """The options with everything that the bundle leaves open filled in."""

    features: str
    compared: str
    order: Order
    schedules: Mapping[int, tuple[int, ...]]
    batch: int
    gate: Gate


def plan_of(manifest: Manifest, precision: str, options: Options) -> Plan:
    entry: dict[str, Any] = manifest.parity.get("fid") or {}
    features = options.features or entry.get("features")
    if not features:
        raise FidSettingError(
            f"bundle {manifest.name} does not say in which features its images are measured",
            "name them with --features, or state parity.fid in the recipe and export again",
        )
    images = options.images or int(entry.get("images", 0))
    if options.per_class is not None:
        images = options.per_class * manifest.classes
    if not images:
        raise FidSettingError(
            f"bundle {manifest.name} does not say how many images are measured", "say it with --images"
        )
    alone = student_schedules(manifest.schedules, manifest.sequence.split)
    steps = options.steps or tuple(sorted(alone))
    for count in steps:
        if manifest.schedule(count) and count not in alone:
            raise FidSettingError(
                f"the schedule of {count} steps involves the teacher: its draws have no pairs",
                f"--steps takes {', '.join(map(str, sorted(alone)))}; `validate curve` measures them all",
            )
    return Plan(
        features,
        _compared_with(manifest, entry, options),
        order_of(manifest, images, options.seed, options.per_class),
        {count: alone[count] for count in steps},
        options.batch or default_batch_size(manifest),
        _gate(manifest, entry, precision, features, options),
    )


def order_of(manifest: Manifest, images: int, seed: int, per_class: int | None = None) -> Order:
    """So many images of a bundle's sizes and classes."""
    sequence = manifest.sequence
    return Order(images, seed, manifest.classes, sequence.length, sequence.width, per_class)


def _compared_with(manifest: Manifest, entry: Mapping[str, Any], options: Options) -> str:
    """What `--reference` or else the recipe names. Raises FidSettingError if neither does."""
    named = options.reference or str(entry.get("reference") or "")
    if named:
        return named
    raise FidSettingError(
        f"bundle {manifest.name} has no data set of its own to measure its images against",
        "give --reference a statistics file (for ImageNet 256: ImageNet-256_FID_Statistic/statistic.pth of"
        " microsoft/distilled_decoding on the Hugging Face Hub), a folder of images or another bundle;"
        " with `none` the two sides are compared with each other alone",
    )


def _gate(
    manifest: Manifest, entry: Mapping[str, Any], precision: str, features: str, options: Options
) -> Gate:
    """The limits of a precision. Raises VerificationError where a comparison has none: that is no pass."""
    if not options.reference_model:
        return Gate()
    limits = (entry.get("limits") or {}).get(precision)
    if not limits or not isinstance(limits.get("difference"), (int, float)):
        raise VerificationError(
            f"bundle {manifest.name} states no limits of image quality for {precision}",
            f"state them in the recipe under parity.fid.limits.{precision} and export again,"
            " or measure the bundle alone with --no-reference-model",
        )
    own = features == entry.get("features") and not is_random(options.features_weights)
    # The unit of a Frechet distance is that of its features: a limit says nothing about others.
    return Gate(
        float(limits["difference"]) if own else None,
        limits.get("distance"),
        limits.get("changed"),
        bool(limits.get("provisional")),
    )


def require_enough(images: int, extractor: Extractor, allow_few: bool) -> None:
    """Known before the work, so said before it. Raises TooFewSamples."""
    least = 2 if allow_few else extractor.width + 1
    if images < least:
        raise TooFewSamples(
            f"{images} images do not determine a Frechet distance in the {extractor.width} features"
            f" of {extractor.name}",
            f"draw {least} at least"
            + (
                ""
                if allow_few
                else "; --allow-few measures all the same, for trials: the figures say nothing"
            ),
        )
