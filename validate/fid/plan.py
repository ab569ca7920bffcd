"""What `validate fid` is asked to measure: the options, completed from what the bundle says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddexport.runtime.bundle import FULL, Manifest
from ddexport.runtime.errors import DDError, VerificationError
from ddexport.runtime.pipeline import default_batch_size
from ddexport.validate.conditions import conditions_of
from ddexport.validate.features._base import Extractor, load_extractor
from ddexport.validate.fid.command import Options
from ddexport.validate.fid.draws import Order, Schedules, student_schedules
from ddexport.validate.fid.figures import WIDE, Limits

NONE = "none"  # as a reference set: the two sides are compared with each other alone
RESAMPLES, LEAST_RESAMPLES = 200, 40  # the least of a 95 % interval: one beyond either end
PROTOCOL_IMAGES, PROTOCOL_FEATURES = 50_000, "inception"  # what published figures are measured with


class FidSettingError(DDError):
    """A measurement that the bundle or the options do not determine."""


@dataclass(frozen=True)
class Plan:
    """The options with everything that the bundle leaves open filled in."""

    extractor: Extractor
    compared: str
    order: Order
    schedules: Schedules
    batch: int
    resamples: int
    limits: Limits
    published: Mapping[int, float]  # FID by steps, where the run keeps to the published protocol


def plan_of(manifest: Manifest, precision: str, options: Options) -> Plan:
    """Raises FidSettingError for what neither says and for too few images, FeatureError for features that
    cannot be had, VerificationError where a comparison has no limits.
    """
    entry, classes = manifest.parity.get("fid") or {}, conditions_of(manifest).count
    features = options.features or entry.get("features")
    compared = options.reference or entry.get("reference")
    images = options.images or int(entry.get("images", 0))
    if options.per_class is not None:
        images = options.per_class * classes
    if not features:
        raise FidSettingError(
            f"bundle {manifest.name} names no features for FID",
            "name them with --features, or state parity.fid in the recipe and export again",
        )
    if not images:
        text = f"bundle {manifest.name} names no number of images for FID"
        raise FidSettingError(text, "give --images")
    if not compared:
        raise FidSettingError(
            f"bundle {manifest.name} names no reference set for FID",
            "give --reference a folder of images or a statistics file (for ImageNet 256:"
            " hf://microsoft/distilled_decoding/ImageNet-256_FID_Statistic/statistic.pth); with `none` the"
            " bundle is only compared with PyTorch",
        )
    manifest.decoder(options.decoder)  # said before the work
    schedules = _schedules(manifest, options.steps)
    extractor = load_extractor(features, options.features_weights, options.device)
    require_enough(images, extractor, options.allow_few)
    own = features == entry.get("features") and not extractor.random_weights
    resamples, size = RESAMPLES if extractor.width <= WIDE else LEAST_RESAMPLES, manifest.sequence
    return Plan(
        extractor,
        compared,
        Order(images, options.seed, classes, size.length, size.width, options.per_class),
        schedules,
        options.batch or default_batch_size(manifest),
        resamples if options.bootstrap is None else options.bootstrap,
        _limits(manifest, entry, precision, own, options.decoder) if options.reference_model else Limits(),
        _published(manifest, images, extractor, schedules) if options.per_class is None else {},
    )


def _schedules(manifest: Manifest, steps: tuple[int, ...]) -> Schedules:
    alone = student_schedules(manifest.schedules, manifest.sequence.split)
    for count in steps:
        if manifest.schedule(count) and count not in alone:
            raise FidSettingError(
                f"the schedule of {count} steps uses the teacher, which `validate fid` cannot measure",
                f"--steps takes {', '.join(map(str, sorted(alone)))}; `validate distilled` measures them all",
            )
    if not alone:
        raise FidSettingError(
            f"bundle {manifest.name} has no student, whose images `validate fid` measures",
            "export it with --checkpoint",
        )
    return {count: alone[count] for count in sorted(steps or alone)}


def _limits(manifest: Manifest, entry: Mapping[str, Any], precision: str, own: bool, decoder: str) -> Limits:
    """Those of a precision, or of a further decoder in all; a comparison that has none is no pass. own: the
    features are the recipe's."""
    if decoder != FULL:
        shares = entry.get("decoders")
        if not shares:
            raise VerificationError(
                f"bundle {manifest.name} states no limits of image quality for its further decoders",
                "state them in the recipe under parity.fid.decoders and export again",
            )
        return Limits(increase=shares.get("increase") if own else None, read=shares.get("read"))
    stated = (entry.get("limits") or {}).get(precision)
    if not stated or not isinstance(stated.get("difference"), (int, float)):
        raise VerificationError(
            f"bundle {manifest.name} states no limits of image quality for {precision}",
            f"state them in the recipe under parity.fid.limits.{precision} and export again,"
            " or measure the bundle alone with --no-reference-model",
        )
    # The unit of a Frechet distance is that of its features: a limit says nothing about others.
    difference = float(stated["difference"]) if own else None
    return Limits(difference, stated.get("distance"), stated.get("changed"), bool(stated.get("provisional")))


def _published(
    manifest: Manifest, images: int, extractor: Extractor, schedules: Schedules
) -> dict[int, float]:
    same = extractor.name == PROTOCOL_FEATURES and not extractor.random_weights and images == PROTOCOL_IMAGES
    values = (manifest.published.get("fid") or {}) if same else {}
    found = {steps: values.get(str(steps)) for steps in schedules}
    return {steps: value for steps, value in found.items() if isinstance(value, (int, float))}


def require_enough(images: int | None, extractor: Extractor, allow_few: bool) -> None:
    """Raises FidSettingError where so many images give no covariance of full rank: N <= D."""
    least = 2 if allow_few else extractor.width + 1
    if images is not None and images < least:
        more = "; --allow-few measures fewer, but the figures mean nothing"
        raise FidSettingError(
            f"{images} images are too few for a Frechet distance in the {extractor.width} features"
            f" of {extractor.name}",
            f"draw {least} at least{'' if allow_few else more}",
        )


def why_no_verdict(options: Options, plan: Plan) -> str:
    """Why the rows, within their limits or past them, say nothing; "" where they do."""
    if not options.reference_model:
        return "measured without PyTorch"
    compared, random = plan.compared != NONE, plan.extractor.random_weights
    reasons = {
        "there is no FID without a reference set (--reference none)": not compared,
        "with --allow-few the figures mean nothing": options.allow_few,
        "with random feature weights the figures mean nothing": random,
        f"the limits are not for the features {plan.extractor.name}": compared
        and (plan.limits.difference, plan.limits.increase) == (None, None)
        and not random,
        f"no interval of the FID difference (--bootstrap {LEAST_RESAMPLES} at least)": plan.resamples
        < LEAST_RESAMPLES,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)
