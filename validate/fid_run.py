"""One measurement of `validate fid`, from the open bundle to the report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from msgspec import to_builtins

from ddexport.recipe import recipe_of
from ddexport.runtime import console
from ddexport.runtime.bundle import FILE_NAME, ROLES, Manifest, sha256_of
from ddexport.runtime.files import make_directory, write_image
from ddexport.runtime.images import to_pil
from ddexport.runtime.pipeline import Pipeline
from ddexport.validate.contents import check_contents, check_recipe, open_manifest
from ddexport.validate.devices import torch_device
from ddexport.validate.drawing import ByteImages, Draw, by_pipeline, by_reference
from ddexport.validate.fid import Options
from ddexport.validate.fid_features import (
    BUNDLE,
    REFERENCE,
    FeatureFiles,
    Sink,
    columns_of,
    digest_of,
    draw_features,
    readings_of,
)
from ddexport.validate.fid_figures import measure
from ddexport.validate.fid_plan import (
    NONE,
    Plan,
    plan_of,
    require_enough,
    why_no_verdict,
)
from ddexport.validate.reference import build_reference, describe_weights
from ddexport.validate.references import Reference, load
from ddexport.validate.report import SCHEMA, Measurement, Report, versions
from ddexport.validate.runners import opened


def run(options: Options, state: Path | None) -> Report:
    """See `ddexport.validate.fid.run_fid`."""
    start = time.perf_counter()
    torch_device(options.device)  # said before the work
    with console.stage(f"loading {options.bundle}", keep=False):
        manifest = open_manifest(options.bundle)
        digest = sha256_of(options.bundle / FILE_NAME)
        check_recipe(manifest)
    how = (options.backend, options.precision, options.emulate, options.threads)
    with opened(options.bundle, manifest, *how) as pipe, ExitStack() as closing:
        plan = plan_of(manifest, pipe.precision, options)
        compared = _reference_set(manifest, plan, options.allow_few)
        sides = {BUNDLE: by_pipeline(pipe, plan.schedules)}
        if options.reference_model:
            sides[REFERENCE] = _reference_model(manifest, plan, options)
        settings = _settings(options, manifest, pipe, plan)
        identity = _identity(settings, options, manifest, pipe, plan)
        place = options.state or (state / digest_of(identity) if state else None)
        directory = place or Path(closing.enter_context(tempfile.TemporaryDirectory()))
        columns = columns_of(list(sides), list(plan.schedules), plan.extractor)
        files = FeatureFiles(directory, identity, plan.order.images, columns)
        settings["resumed_at"] = int(files.filled.sum())
        _draw(plan, sides, files, options.save_images, kept=place is not None)
        with console.stage("computing the figures", keep=False):
            rows = _rows(plan, list(sides), files, compared)
        files.discard()
    if state:
        with suppress(OSError):  # holds the states of other runs, or was never made
            state.rmdir()
    return Report(
        schema=SCHEMA,
        kind="fid",
        name=manifest.name,
        title=_title(settings, manifest, pipe, plan, compared),
        manifest=digest,
        precision=pipe.precision,
        backend=pipe.backend.name,
        images=plan.order.images,
        seed=plan.order.seed,
        settings=settings,
        versions=versions(),
        seconds=round(time.perf_counter() - start, 2),
        rows=tuple(rows),
        no_verdict=why_no_verdict(options, plan),
        provisional=plan.limits.provisional,
    )


def _reference_set(manifest: Manifest, plan: Plan, allow_few: bool) -> Reference | None:
    """The images that the figures are measured against."""
    if plan.compared == NONE:
        return None
    with console.stage(f"reading the reference set {plan.compared}", keep=False):
        compared = load(plan.compared, plan.extractor, recipe_of(manifest))
    if compared.fit.count is not None:
        require_enough(compared.fit.count, plan.extractor, allow_few)
    return compared


def _reference_model(manifest: Manifest, plan: Plan, options: Options) -> Draw:
    with console.stage("building the PyTorch reference", keep=False):
        files = {"student": options.checkpoint, "tokenizer": options.vae}
        reference = build_reference(manifest, files, options.weights, options.threads, device=options.device)
        check_contents(options.bundle, manifest, reference)
    return by_reference(reference, plan.schedules)


def _settings(options: Options, manifest: Manifest, pipe: Pipeline, plan: Plan) -> dict[str, Any]:
    """What else is needed to run it again."""
    return {
        "weights": describe_weights(manifest),
        "graphs": {
            info.file: info.sha256 for role in ROLES for info in manifest.graph(role, pipe.precision).files
        },
        "labels": plan.order.label_rule,
        "batch": plan.batch,
        "steps": list(plan.schedules),
        "threads": options.threads,
        "device": options.device,
        "features": plan.extractor.name,
        "features_identity": plan.extractor.identity,
        "reference": plan.compared,
        "reference_model": options.reference_model,
        "bootstrap": plan.resamples,
        "limits": asdict(plan.limits),
    }


def _identity(
    settings: Mapping[str, Any], options: Options, manifest: Manifest, pipe: Pipeline, plan: Plan
) -> dict[str, Any]:
    """Everything that the rows on disk depend on, to the last bit."""
    of_figures = ("reference", "bootstrap", "limits")
    paired = options.reference_model
    return {key: value for key, value in settings.items() if key not in of_figures} | {
        "images": plan.order.images,
        "seed": plan.order.seed,
        "precision": pipe.precision,
        "backend": pipe.backend.name,
        "recipe": dict(manifest.recipe) if paired else None,
        "sources": to_builtins(manifest.weights) if paired else None,
        "copy of the weights": options.weights,
        "versions": versions(),
    }


def _draw(
    plan: Plan, sides: Mapping[str, Draw], files: FeatureFiles, images: Path | None, kept: bool
) -> None:
    """Fills the rows that are not. images: where every image is written too. kept: so is a stopped run."""
    sink = _image_writer(plan, sides, images) if images else None
    missing = int((~files.filled).sum())
    with console.progress(missing, "measuring") as bar:
        try:
            draw_features(plan.order, plan.batch, sides, plan.extractor, files, bar.advance, sink)
        except KeyboardInterrupt:
            if kept:
                click.echo(
                    f"\nstopped after {files.filled.sum():,} of {plan.order.images:,} images:"
                    " the same command goes on from there",
                    err=True,
                )
            raise


def _image_writer(plan: Plan, sides: Iterable[str], directory: Path) -> Sink:
    """Writes each image as it is drawn, in a folder a side and schedule. Raises OutputError."""
    places = {
        (side, steps): directory / f"{side}-{_scope(steps).replace(' ', '-')}"
        for side in sides
        for steps in plan.schedules
    }
    for place in places.values():
        make_directory(place)

    def sink(side: str, steps: int, indices: range, images: ByteImages) -> None:
        labels = plan.order.labels(indices)
        for index, label, image in zip(indices, labels, to_pil(images), strict=True):
            write_image(places[side, steps] / f"{index:05d}-class{label:04d}.png", image)

    return sink


def _rows(plan: Plan, sides: list[str], files: FeatureFiles, compared: Reference | None) -> list[Measurement]:
    rows = []
    for steps in plan.schedules:
        readings = [readings_of(files, side, steps) for side in sides]
        apart = files.arrays.get(f"difference-{steps}")
        # Published figures are measured against published statistics.
        published = plan.published.get(steps) if compared and compared.features is None else None
        rows += measure(_scope(steps), readings, apart, compared, plan.limits, plan.resamples, published)
    return rows


def _scope(steps: int) -> str:
    """The name of a schedule, for people."""
    return f"{steps} step{'s' if steps > 1 else ''}"


def _title(
    settings: Mapping[str, Any], manifest: Manifest, pipe: Pipeline, plan: Plan, compared: Reference | None
) -> str:
    against = " against PyTorch" if settings["reference_model"] else ""
    text = (
        f"{manifest.name}: {pipe.backend.name} in {pipe.precision}{against}, {plan.order.images:,} images,"
        f" seed {plan.order.seed}, labels {plan.order.label_rule} ({settings['weights']})\n"
        f"features: {plan.extractor.name}, {plan.extractor.width} wide"
    )
    if compared is not None:
        count = compared.fit.count
        text += f"; reference set: {compared.name}{f' ({count:,} images)' if count is not None else ''}"
    return text + (f"; in brackets: 95 % of {plan.resamples} resamples" if plan.resamples > 1 else "")
