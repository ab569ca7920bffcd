"""One measurement of `validate fid`, from the open bundle to the report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
from msgspec import to_builtins

from ddexport.recipe import recipe_of
from ddexport.runtime import console
from ddexport.runtime.bundle import FILE_NAME, ROLES, Manifest, sha256_of
from ddexport.runtime.files import make_directory, write_image
from ddexport.runtime.images import to_pil
from ddexport.runtime.pipeline import Pipeline, load
from ddexport.validate.contents import check_contents, check_recipe, open_manifest
from ddexport.validate.devices import torch_device
from ddexport.validate.drawing import ByteImages, Draw, by_pipeline, by_reference, student_schedules
from ddexport.validate.features._base import Extractor, load_extractor
from ddexport.validate.fid_figures import Resampling, figures_of, measurements_of, published_of
from ddexport.validate.fid_plan import NONE, Options, Plan, order_of, plan_of, require_enough
from ddexport.validate.fid_report import LEAST_RESAMPLES, Compared, FidReport, Settings
from ddexport.validate.fid_state import State, digest_of
from ddexport.validate.paired import BUNDLE, REFERENCE, PairedRun, Sink, Sizes
from ddexport.validate.reference import build_reference, describe_weights
from ddexport.validate.references import Reference
from ddexport.validate.references import load as load_reference
from ddexport.validate.runners import opened
from ddexport.validate.statistics import GROUPS

WIDE = 512  # features: their covariances, one a group and side, take the memory, their roots the time
GROUPS_NARROW = 100  # more than are usual, where they cost nothing: steadier intervals
RESAMPLES, RESAMPLES_WIDE = 200, LEAST_RESAMPLES
SAMPLE = 10_000  # images a side whose features are kept, for neighbours and kernels


def run_fid(options: Options, state_root: Path | None = None) -> FidReport:
    """Draws, measures and compares; goes on where a stopped run of the same settings was.

    state_root: where the state of a run is kept unless `options.state` names a directory; None: nowhere.
    Raises DDError for everything that can be wrong with bundle, options, files and places.
    """
    start = time.perf_counter()
    torch_device(options.device)  # said before the work
    with console.stage(f"loading {options.bundle}", keep=False):
        manifest = open_manifest(options.bundle)
        digest = sha256_of(options.bundle / FILE_NAME)
        check_recipe(manifest)
    how = (options.backend, options.precision, options.emulate, options.threads)
    with opened(options.bundle, manifest, *how) as pipe:
        plan = plan_of(manifest, pipe.precision, options)
        extractor = load_extractor(plan.features, options.features_weights, options.device)
        require_enough(plan.order.images, extractor, options.allow_few)
        job = _Job(options, manifest, digest, pipe, plan, extractor)
        compared = job.compared()
        run = job.paired_run()
        state = job.state(state_root)
        resumed = run.resume(state) if state else 0
        _draw(run, plan.batch, state, _sink(run, options.save_images))
        try:
            report = job.report(run, compared, resumed, start)
        except BaseException:  # the intervals of wide features take minutes, and may be stopped too
            if state:
                run.keep(state)
            raise
    if state:
        state.discard()
    if state_root:
        with suppress(OSError):  # holds the states of other runs, or was never made
            state_root.rmdir()
    return report


class RateProgress(console.Progress[None]):
    """A bar that also says how fast it goes; `start` images were done before."""

    def __init__(self, total: int, label: str, start: int = 0) -> None:
        super().__init__((), total, label)
        self._before = self._done = start

    def _text(self, elapsed: float) -> str:
        here = self._done - self._before
        left = (self._total or 0) - self._done
        rest = f"  {console.duration(elapsed / here * left)} left" if here and left > 0 else ""
        share = self._done / (self._total or 1)
        bar = ("#" * round(24 * share)).ljust(24, ".")
        rate = here / elapsed if elapsed else 0.0
        return f"{self._label}  [{bar}]  {self._done}/{self._total}  {rate:.3g} images/s{rest}"


@dataclass(frozen=True)
class _Job:
    """What one measurement is made of, once bundle and extractor are open."""

    options: Options
    manifest: Manifest
    digest: str  # SHA-256 of the manifest's file, as it was when the run began
    pipe: Pipeline
    plan: Plan
    extractor: Extractor

    def compared(self) -> Reference | None:
        """The set of images that the figures are measured against."""
        if self.plan.compared == NONE:
            return None
        recipe = recipe_of(self.manifest)
        with console.stage(f"reading the reference set {self.plan.compared}", keep=False):
            return load_reference(
                self.plan.compared, self.extractor, recipe=recipe, draw=self._another_bundle
            )

    def paired_run(self) -> PairedRun:
        """Both sides, or the bundle alone, with nothing drawn yet."""
        options = self.options
        sides: dict[str, Draw] = {BUNDLE: by_pipeline(self.pipe, self.plan.schedules)}
        if options.reference_model:
            with console.stage("building the PyTorch reference", keep=False):
                files = {"student": options.checkpoint, "tokenizer": options.vae}
                reference = build_reference(
                    self.manifest, files, options.weights, options.threads, device=options.device
                )
                check_contents(options.bundle, self.manifest, reference)
                sides[REFERENCE] = by_reference(reference, self.plan.schedules)
        sizes = Sizes(self.extractor.width, self.extractor.classes, self._groups, SAMPLE)
        return PairedRun(self.plan.order, self.plan.schedules, self.extractor, sides, sizes)

    def state(self, root: Path | None) -> State | None:
        """Where the run is kept: in the directory that was named, else under `root` by its own name."""
        if self.options.state is not None:
            return State(self.options.state, self._key())
        return State(root / digest_of(self._key()), self._key()) if root else None

    def report(self, run: PairedRun, compared: Reference | None, resumed: int, start: float) -> FidReport:
        """The figures of a finished run. `start`: of the clock."""
        gate = self.plan.gate
        how = Resampling(self._resamples, allow_few=self.options.allow_few)
        with console.stage("computing the figures", keep=False):
            figures = figures_of(run, compared, how)
            measurements = measurements_of(run, figures, gate, how)
            measurements += published_of(run, compared, figures, self.manifest.published.get("fid") or {})
        settings = self._settings(compared, resumed, time.perf_counter() - start)
        return FidReport(settings, asdict(gate), tuple(figures), tuple(measurements))

    def _another_bundle(self, path: Path) -> Iterator[ByteImages]:
        """Images of another bundle in its student's most steps, as many as are measured; of the next seed,
        because images from the same noise would be no independent set.
        """
        options = self.options
        with load(path, options.backend, options.threads) as other:
            seed = (options.seed + 1) % 2**64
            order = order_of(other.manifest, self.plan.order.images, seed)
            alone = student_schedules(other.manifest.schedules, other.manifest.sequence.split)
            steps = max(alone)
            schedules = {steps: alone[steps]}
            draw = by_pipeline(other, schedules)
            for indices in console.progress(order.batches(self.plan.batch), f"drawing from {path}"):
                yield draw(order, indices)[steps]

    @property
    def _groups(self) -> int:
        return GROUPS_NARROW if self.extractor.width <= WIDE else GROUPS

    @property
    def _resamples(self) -> int:
        default = RESAMPLES if self.extractor.width <= WIDE else RESAMPLES_WIDE
        return default if self.options.bootstrap is None else self.options.bootstrap

    def _key(self) -> dict[str, Any]:
        """Everything that the counted numbers depend on, to the last bit."""
        manifest, paired = self.manifest, self.options.reference_model
        return {
            "bundle": _hashes(self.manifest, self.pipe.precision),
            "recipe": dict(manifest.recipe) if paired else None,
            "weights": to_builtins(manifest.weights) if paired else None,
            "copy of the weights": self.options.weights,
            "reference model": paired,
            "precision": self.pipe.precision,
            "backend": self.pipe.backend.name,
            "threads": self.options.threads,
            "device": self.options.device,
            "images": self.plan.order.images,
            "labels": self.plan.order.label_rule,
            "seed": self.plan.order.seed,
            "steps": sorted(self.plan.schedules),
            "batch": self.plan.batch,
            "features": self.extractor.identity,
            "groups": self._groups,
            "sample": SAMPLE,
            "versions": _versions(),
        }

    def _settings(self, compared: Reference | None, resumed: int, seconds: float) -> Settings:
        manifest, order = self.manifest, self.plan.order
        return Settings(
            bundle=str(self.options.bundle),
            manifest=self.digest,
            name=manifest.name,
            weights=describe_weights(manifest),
            precision=self.pipe.precision,
            backend=self.pipe.backend.name,
            images=order.images,
            seed=order.seed,
            labels=order.label_rule,
            batch=self.plan.batch,
            steps=tuple(self.plan.schedules),
            features=self.extractor.name,
            features_identity=self.extractor.identity,
            features_width=self.extractor.width,
            compared=Compared(self.plan.compared, compared.count, compared.identity) if compared else None,
            paired=self.options.reference_model,
            bootstrap=self._resamples,
            versions=_versions(),
            hashes=_hashes(self.manifest, self.pipe.precision),
            resumed_at=resumed,
            seconds=round(seconds, 2),
            allow_few=self.options.allow_few,
            random_features=self.extractor.random_weights,
            device=self.options.device,
        )


def _draw(run: PairedRun, batch: int, state: State | None, sink: Sink | None) -> None:
    with RateProgress(run.order.images, "measuring", run.done) as bar:
        try:
            run.run(batch, state, bar.advance, sink)
        except KeyboardInterrupt:
            if state is not None and state.path.is_file():
                click.echo(
                    f"\nstopped after {run.done:,} of {run.order.images:,} images:"
                    " the same command goes on from there",
                    err=True,
                )
            raise


def _sink(run: PairedRun, directory: Path | None) -> Sink | None:
    """Writes each image as it is drawn, in a folder a side and schedule. Raises OutputError."""
    if directory is None:
        return None
    places = {key: directory / f"{key[0]}-{key[1]}-step{'s' if key[1] > 1 else ''}" for key in run.sets}
    for place in places.values():
        make_directory(place)

    def sink(side: str, steps: int, indices: range, images: ByteImages) -> None:
        labels = run.order.labels(indices)
        for index, label, image in zip(indices, labels, to_pil(images), strict=True):
            write_image(places[side, steps] / f"{index:05d}-class{label:04d}.png", image)

    return sink


def _hashes(manifest: Manifest, precision: str) -> dict[str, str]:
    graphs = [manifest.graph(role, precision) for role in ROLES]
    return {info.file: info.sha256 for graph in graphs for info in graph.files}


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("ddexport", "torch", "onnxruntime", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # another engine than onnxruntime, or a source tree
            continue
    return versions
