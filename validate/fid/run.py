"""One measurement of `validate fid`, from the open bundle to the report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ddexport.devices import torch_device
from ddexport.recipe import recipe_of
from ddexport.runtime import console
from ddexport.runtime.bundle import FULL, Manifest
from ddexport.runtime.files import make_directory, write_image
from ddexport.runtime.images import to_pil
from ddexport.runtime.shards.image_set import Reader
from ddexport.validate.contents import check_contents, open_manifest
from ddexport.validate.fid.command import Options
from ddexport.validate.fid.draws import ByteImages, Draw, Order, by_pipeline, by_reference
from ddexport.validate.fid.figures import measure
from ddexport.validate.fid.files import (
    BUNDLE,
    REFERENCE,
    FeatureFiles,
    columns_of,
    digest_of,
    draw_features,
    readings_of,
)
from ddexport.validate.fid.plan import NONE, Plan, plan_of, require_enough, why_no_verdict
from ddexport.validate.fid.references import Reference, load
from ddexport.validate.fid.shards import by_shards, labels_of, options_of
from ddexport.validate.reference import build_reference, describe_weights
from ddexport.validate.report import SCHEMA, Measurement, Report, versions
from ddexport.validate.runners import opened


def run(options: Options, state: Path | None) -> Report:
    """See `ddexport.validate.fid.run_fid`."""
    start = time.perf_counter()
    torch_device(options.device)  # said before the work
    with console.stage(f"loading {options.bundle}", keep=False):
        manifest, digest = open_manifest(options.bundle)
    with ExitStack() as closing:
        if options.images_from:
            reader = Reader(options.images_from)
            options = options_of(reader, options, digest)
            backend, precision = reader.set.backend, reader.set.precision
            plan = plan_of(manifest, precision, options)
            plan = replace(plan, order=replace(plan.order, given=labels_of(reader, manifest)))
            sides = {BUNDLE: by_shards(reader, options.steps[0])}
        else:
            how = (options.backend, options.precision, options.emulate, options.threads)
            pipe = closing.enter_context(opened(options.bundle, manifest, *how))
            backend, precision = pipe.backend.name, pipe.precision
            plan = plan_of(manifest, precision, options)
            sides = {BUNDLE: by_pipeline(pipe, plan.schedules, options.decoder)}
        compared = _reference_set(manifest, plan, options.allow_few)
        if options.reference_model:
            sides[REFERENCE] = _reference_model(manifest, plan, options)
        settings = _settings(manifest, plan, options, backend)
        identity = {**settings, "manifest": digest, "backend": backend, "precision": precision}
        place = options.state or (state / digest_of(identity) if state else None)
        directory = place or Path(closing.enter_context(tempfile.TemporaryDirectory()))
        columns = columns_of(list(sides), list(plan.schedules), plan.extractor)
        files = FeatureFiles(directory, identity, plan.order.images, columns)
        resumed_at = int(files.filled.sum())
        if options.save_images:
            sides = {side: _saving(draw, side, options.save_images) for side, draw in sides.items()}
        _draw(plan, sides, files, kept=place is not None)
        with console.stage("computing the figures", keep=False):
            rows = _rows(plan, list(sides), files, compared)
        files.discard()
    if state:
        with suppress(OSError):  # holds the states of other runs, or was never made
            state.rmdir()
    decoder = "" if options.decoder == FULL else f", decoder {options.decoder}"
    against = " against PyTorch" if options.reference_model else ""
    return Report(
        schema=SCHEMA,
        kind="fid",
        name=manifest.name,
        decoder=options.decoder,
        title=f"{manifest.name}: {backend} in {precision}{decoder}{against},"
        f" {_title(manifest, plan, compared)}",
        manifest=digest,
        precision=precision,
        backend=backend,
        images=plan.order.images,
        seed=plan.order.seed,
        settings={
            **settings,
            "resumed_at": resumed_at,
            "reference": plan.compared,
            "bootstrap": plan.resamples,
            "limits": asdict(plan.limits),
        },
        versions=versions(backend),
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
    require_enough(compared.fit.count, plan.extractor, allow_few)
    return compared


def _reference_model(manifest: Manifest, plan: Plan, options: Options) -> Draw:
    with console.stage("building the PyTorch reference", keep=False):
        files = {"student": options.checkpoint, "tokenizer": options.vae}
        files |= {"decoder_small": options.small_decoder, "text_encoder": options.text_encoder}
        reference = build_reference(manifest, files, options.weights, options.threads, device=options.device)
        check_contents(options.bundle, manifest, reference)
    return by_reference(reference, plan.schedules)


def _settings(manifest: Manifest, plan: Plan, options: Options, backend: str) -> dict[str, Any]:
    """What, beside the bundle and the engine, the rows on disk depend on to the last bit."""
    return {
        "weights": describe_weights(manifest),
        "copy of the weights": options.weights,
        "reference_model": options.reference_model,
        "decoder": options.decoder,
        "images": plan.order.images,
        "seed": plan.order.seed,
        "labels": plan.order.label_rule,
        "images from": str(options.images_from or ""),
        "batch": plan.batch,
        "steps": list(plan.schedules),
        "threads": options.threads,
        "device": options.device,
        "features": plan.extractor.name,
        "features_identity": plan.extractor.identity,
        "versions": versions(backend),
    }


def _draw(plan: Plan, sides: Mapping[str, Draw], files: FeatureFiles, kept: bool) -> None:
    """Fills the rows that are not. kept: a stopped run goes on from them."""
    with console.progress(int((~files.filled).sum()), "measuring") as bar:
        try:
            draw_features(plan.order, plan.batch, sides, plan.extractor, files, bar.advance)
        except KeyboardInterrupt:
            if kept:
                click.echo(
                    f"\nstopped after {files.filled.sum():,} of {plan.order.images:,} images:"
                    " repeat the command to continue",
                    err=True,
                )
            raise


def _saving(draw: Draw, side: str, directory: Path) -> Draw:
    """A side that also writes each image, in a folder a schedule. Raises OutputError."""
    make_directory(directory)

    def drawn(order: Order, indices: range) -> dict[int, ByteImages]:
        images = draw(order, indices)
        for steps, pictures in images.items():
            folder = directory / f"{side}-{_scope(steps).replace(' ', '-')}"
            make_directory(folder)
            for index, label, image in zip(indices, order.labels(indices), to_pil(pictures), strict=True):
                write_image(folder / f"{index:05d}-class{label:04d}.png", image)
        return images

    return drawn


def _rows(plan: Plan, sides: list[str], files: FeatureFiles, compared: Reference | None) -> list[Measurement]:
    rows = []
    for steps in plan.schedules:
        readings = [readings_of(files, side, steps) for side in sides]
        apart = files.arrays.get(f"difference-{steps}")
        # Published figures are measured against published statistics.
        published = plan.published.get(steps) if compared and compared.features is None else None
        labels = plan.order.labels(range(plan.order.images))
        how = (plan.limits, plan.resamples, published)
        rows += measure(_scope(steps), readings, labels, apart, compared, *how)
    return rows


def _scope(steps: int) -> str:
    """The name of a schedule, for people."""
    return f"{steps} step{'s' if steps > 1 else ''}"


def _title(manifest: Manifest, plan: Plan, compared: Reference | None) -> str:
    text = (
        f"{plan.order.images:,} images, seed {plan.order.seed}, labels {plan.order.label_rule}"
        f" ({describe_weights(manifest)})\nfeatures: {plan.extractor.name}, {plan.extractor.width} wide"
    )
    if compared is not None:
        count = f" ({compared.fit.count:,} images)" if compared.fit.count is not None else ""
        text += f"; reference set: {compared.name}{count}"
    return text + (f"; in brackets: 95 % of {plan.resamples} resamples" if plan.resamples > 1 else "")
