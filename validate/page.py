"""`validate report`: everything that was measured of a bundle on one HTML page, for people.

The page shows the reports and pictures that `validate parity` and `validate fid` left in BUNDLE/parity, and
the times of `ddexport bench --save`. A bundle comes from others: every text is escaped, pictures are decoded
and encoded again, limits are the manifest's, verdicts are made again from the values, and a report of another
manifest is left out.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import asdict, replace

from ddexport.recipe import FILE_OPTIONS, FidGate, FidLimits
from ddexport.runtime import console
from ddexport.runtime.bundle import FILE_NAME, FULL, TEACHER, Manifest, read_manifest, sha256_of
from ddexport.runtime.errors import DDError, VerificationError
from ddexport.runtime.options import PATH, option
from ddexport.runtime.records import convert, read_json
from ddexport.validate.limits import limits_of
from ddexport.validate.options import KINDS, shared

if TYPE_CHECKING:
    from ddexport.runtime.backends._saved import Time
    from ddexport.validate.report import Measurement, Report

FOLDER, NAME = "parity", "index.html"
TEMPLATE = "page.html.j2"
FID_LIMITS = {  # the field of the manifest's limits by the name of a row
    "FID, difference": "difference",
    "feature distance, paired": "distance",
    "images that differ": "changed",
    "FID, increase": "increase",
    "share read as the class, difference": "read",
}
CARDS = {  # the measurements that are shown large, what the page calls them, and their unit
    "tokens that differ": ("tokens that differ", ""),
    "logits, largest error": ("logit error", ""),
    "embeddings, relative error": ("embedding error", ""),
    "image PSNR, dB": ("worst image", " dB"),
    "image, largest 8-bit difference": ("8-bit difference", ""),
    "FID, difference": ("FID difference", ""),
    "FID, increase": ("FID increase", ""),
}
MAX_BYTES, MAX_SIDE = 16 << 20, 4096  # of a picture
AT_ONCE, FEWER = 5000, 500  # of --run: the recipe's images for FID up to so many, else so many

EPILOG = """
\b
Examples:
  ddexport validate report digits-var --run --open
  ddexport validate report digits-var -o digits.html
  ddexport validate report digits-var --json
"""


class PageError(DDError):
    """A report or a picture that the page leaves out."""


@dataclass
class Facts:
    """What is on the page. digest: SHA-256 of bundle.json. shown: each report, and its pictures as data URLs
    by title. times: of the graphs that lie there. remarks: what was left out, and why.
    """

    bundle: Path
    manifest: Manifest
    digest: str
    shown: list[tuple[Report, dict[str, str]]] = field(default_factory=list)
    times: list[Time] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def reports(self) -> list[Report]:
        """Those that are shown."""
        return [report for report, _ in self.shown]

    @property
    def verdict(self) -> tuple[str, str]:
        """`good`, `bad` or `open`, and the same in words."""
        counted = [r for r in self.reports if not r.no_verdict and any(row.gated for row in r.rows)]
        gated = sum(row.gated for report in counted for row in report.rows)
        if failed := sum(len(report.failures) for report in counted):
            return "bad", f"{failed} of {gated} measurements past their limits"
        if not counted:
            return "open", "no verdict: no report compares this bundle with its limits"
        measured = ", ".join(_title(report.kind, report.variant) for report in counted)
        return "good", f"{gated} of {gated} measurements within their limits: {measured}"

    @property
    def cards(self) -> list[dict[str, str]]:
        """Of each report the rows that are nearest to their limits: title, value, limit, what it is of, and
        `good`, `bad`, or `open` without a verdict.
        """
        cards = []
        for report in self.reports:
            for name, (title, unit) in CARDS.items():
                rows = [row for row in report.rows if row.name == name and row.gated]
                if rows:
                    worst = max(rows, key=way)
                    kind = "bad" if not worst.passed else "open" if report.no_verdict else "good"
                    limit = f"{worst.direction} {worst.limit:g}{unit}"
                    of = f"{report.variant}, {report.images:,} images"
                    value = f"{worst.value:.3g}{unit}"
                    cards.append({"title": title, "value": value, "limit": limit, "of": of, "kind": kind})
        return cards

    @property
    def missing(self) -> list[tuple[str, str]]:
        """What was not measured, and the command that measures it."""
        have = {(report.kind, report.variant) for report in self.reports}
        missing = [
            (_title(kind, precision), _command(self.bundle, self.manifest, kind, precision))
            for precision in self.manifest.precisions
            for kind in KINDS
            if (kind, precision) not in have
        ]
        if not self.times:
            missing.append(("times", shlex.join(["ddexport", "bench", str(self.bundle), "--save"])))
        return missing


def collect(bundle: Path) -> Facts:
    """Reads a bundle, its reports and its times. Raises BundleError, also where a file has another SHA-256
    than the manifest states.
    """
    facts = Facts(bundle, read_manifest(bundle), sha256_of(bundle / FILE_NAME))
    for path in sorted((bundle / FOLDER).glob("*-*.json")):
        if path.name.partition("-")[0] in KINDS:
            with _remarking(facts, path.name):
                _add_report(facts, path.name)
    precisions, kinds = facts.manifest.precisions, list(KINDS)
    facts.shown.sort(key=lambda one: (precisions.index(one[0].precision), kinds.index(one[0].kind)))
    with _remarking(facts, "bench.json"):
        facts.times = _times(facts)
    return facts


def render(facts: Facts) -> str:
    """The page as one text. Raises DDError without jinja2."""
    from datetime import datetime, timezone
    from importlib import resources

    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise DDError("the page needs jinja2", 'pip install "ddexport[validate]"') from error
    trimmed = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(autoescape=True, undefined=StrictUndefined, **trimmed)
    environment.filters |= {
        "way": way,
        "sign": lambda text: text.replace("<=", "≤").replace(">=", "≥"),
        "versions": lambda packages: ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    template = (resources.files("ddexport.validate") / TEMPLATE).read_text(encoding="utf-8")
    created = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    values = {"facts": facts, "manifest": facts.manifest, "kinds": KINDS, "created": created}
    return str(environment.from_string(template).render(values))


def write_page(bundle: Path, target: Path | None = None, facts: Facts | None = None) -> Path:
    """Writes the page of a bundle, and to stderr what is left out. Returns its path.

    target: BUNDLE/parity/index.html by default. facts: those of `collect`, if it has been called. Raises
    BundleError for a bundle that is not what its manifest says, and OutputError.
    """
    from ddexport.runtime.files import atomic_write, make_directory

    facts = facts or collect(bundle)
    path = target or _inside(bundle, FOLDER) / NAME
    page = render(facts).encode()
    make_directory(path.parent)
    with atomic_write(path, follow=target is not None) as stream:
        stream.write(page)
    for remark in facts.remarks:
        click.echo(f"warning: {_printable(remark)}", err=True)
    return path


def make_missing(facts: Facts, **options: Any) -> Facts:
    """Measures what `facts` lacks in one precision, parity and image quality, and collects again.

    options: those of the command. Raises DDError where not even parity can be measured.
    """
    precision = options["precision"] or facts.manifest.precisions[0]
    have = {(report.kind, report.variant) for report in facts.reports}
    troubles = []
    if ("parity", precision) not in have:
        _make_parity(facts, options)
    if ("fid", precision) not in have:
        try:
            _make_fid(facts, options)
        except DDError as error:
            troubles = [f"image quality could not be measured: {error.message}. {error.hint}".rstrip()]
    made = collect(facts.bundle)
    made.remarks += troubles
    return made


def summary(facts: Facts) -> dict[str, Any]:
    """What was measured, as plain data."""
    kind, words = facts.verdict
    return {
        "bundle": facts.bundle,
        "name": facts.manifest.name,
        "random_weights": facts.manifest.weights.kind == "random",
        "manifest": facts.digest,
        "verdict": {"good": "passed", "bad": "failed", "open": "no verdict"}[kind],
        "summary": words,
        "reports": [report.to_dict() for report in facts.reports],
        "times": facts.times,
        "missing": dict(facts.missing),
        "remarks": facts.remarks,
    }


def way(row: Measurement) -> float:
    """How much of its limit a value uses: 0 to 1, and more past it. Decibels count as the rms errors they
    stand for.
    """
    if row.limit is None or math.isnan(row.value):
        return 0.0 if row.passed else math.inf
    if row.direction == "at least":
        return float(10 ** min((row.limit - row.value) / 20, 300.0))
    return row.value / row.limit if row.limit else 0.0 if row.passed else math.inf


@contextmanager
def _remarking(facts: Facts, name: str) -> Iterator[None]:
    """What cannot be used becomes a remark."""
    try:
        yield
    except DDError as error:
        facts.remarks.append(f"{name} is left out: {error.message}")


def _add_report(facts: Facts, name: str) -> None:
    """Raises DDError for a report that says nothing of this bundle."""
    from ddexport.validate.report import read

    report = read(_file(facts.bundle, name))
    if name != f"{report.kind}-{report.variant}.json":
        raise PageError(f"it is a report of {report.kind} in {report.variant}")
    if report.precision not in facts.manifest.precisions:
        raise PageError(f"the bundle has no precision {report.precision}")
    if report.manifest != facts.digest:
        again = _command(facts.bundle, facts.manifest, report.kind, report.precision)
        again += "" if report.decoder == FULL else f" --decoder {report.decoder}"
        raise PageError(f"it is not of this {FILE_NAME}; make it again: {again}")
    report = _with_limits(report, facts.manifest)
    if report.no_verdict:
        facts.remarks.append(f"{name} has no verdict: {report.no_verdict}")
    pictures = {}
    for title, picture in report.pictures.items():
        with _remarking(facts, picture):
            pictures[title] = _data_url(_file(facts.bundle, picture))
    facts.shown.append((report, pictures))


def _file(bundle: Path, name: str) -> Path:
    """A file in BUNDLE/parity. Raises DDError where it, or what it links to, lies elsewhere."""
    if Path(name).name != name:
        raise PageError(f"{name!r} is not the name of a file")
    path = _inside(bundle, f"{FOLDER}/{name}")
    if not path.is_file():
        raise PageError("there is no such file")
    return path


def _inside(bundle: Path, name: str) -> Path:
    """BUNDLE/name. Raises PageError where it is a link, or in one, that leads out of the bundle."""
    path = bundle / name
    if not path.resolve().is_relative_to(bundle.resolve()):
        raise PageError(f"{name} lies outside the bundle")
    return path


def _with_limits(report: Report, manifest: Manifest) -> Report:
    """The report with the manifest's limits. Raises DDError where the manifest does not state them."""
    if report.kind == "parity":
        limits = asdict(limits_of(manifest, report.precision))
        rules = [row.rule for row in report.rows]
    else:
        gate = _fid_gate(manifest)
        by_precision: Mapping[Any, FidLimits] = gate.limits if gate else {}
        stated = by_precision.get(report.precision) if report.decoder == FULL else gate and gate.decoders
        limits = asdict(stated) if stated else {}
        # In other features than the manifest's, FID has another unit: such a row has no limit.
        rules = [FID_LIMITS.get(row.name, "") if row.gated else "" for row in report.rows]
    if unknown := [rule for rule in rules if rule and rule not in limits]:
        raise PageError(f"the manifest states no limit {unknown[0]!r} for {report.precision}")
    rows = [
        replace(row, limit=limits[rule]) if rule else row
        for row, rule in zip(report.rows, rules, strict=True)
    ]
    return replace(report, rows=tuple(rows))


def _fid_gate(manifest: Manifest) -> FidGate | None:
    """How the manifest measures image quality. Raises PageError."""
    stated = manifest.parity.get("fid")
    return convert(FidGate, stated, FILE_NAME, PageError) if stated else None


def _times(facts: Facts) -> list[Time]:
    """What `ddexport bench --save` measured of the graphs that lie there."""
    from ddexport.runtime.backends import _saved

    path = _inside(facts.bundle, _saved.FILE)
    if not path.is_file():
        return []
    graphs = _saved._digest(facts.manifest)
    times = convert(list[_saved.Time], read_json(path), _saved.FILE)
    return [time for time in times if time.graphs == graphs]


def _data_url(path: Path) -> str:
    """A PNG, decoded and encoded again, which drops whatever else is in the file. Raises PageError."""
    import base64
    import io

    from PIL import Image

    buffer = io.BytesIO()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        with Image.open(path, formats=["PNG"]) as image:
            if max(image.size) > MAX_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels")
            pixels = Image.new("RGB", image.size, "white")
            pixels.paste(image.convert("RGB"))
            pixels.save(buffer, "PNG", optimize=True)
    except Exception as error:  # the bytes are untrusted: a damaged PNG can make its reader raise anything
        raise PageError(f"not a picture that the page shows: {error}") from error
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _title(kind: str, precision: str) -> str:
    return f"{KINDS[kind]} in {precision}"


def _command(bundle: Path, manifest: Manifest, kind: str, precision: str) -> str:
    """The command that makes a report."""
    words = ["ddexport", "validate", kind, str(bundle)]
    for source in manifest.weights.files if manifest.weights.kind == "checkpoint" else ():
        if source.role in FILE_OPTIONS and not source.repository and (kind, source.role) != ("fid", TEACHER):
            words += [FILE_OPTIONS[source.role], source.file]
    words += ["--precision", precision] if precision != manifest.precisions[0] else []
    return shlex.join(words)


def _printable(text: str) -> str:
    """Without the control characters by which a text can take over a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _make_parity(facts: Facts, options: Mapping[str, Any]) -> None:
    from ddexport.validate import plots
    from ddexport.validate.conditions import names_of
    from ddexport.validate.parity import Options, run_parity
    from ddexport.validate.report import write

    with console.stage("parity"):
        report, comparison, _ = run_parity(Options(bundle=facts.bundle, **options))
    names = names_of(facts.bundle, facts.manifest)
    write(report, _inside(facts.bundle, FOLDER), plots.of_parity(report, comparison, names))


def _make_fid(facts: Facts, options: Mapping[str, Any]) -> None:
    from ddexport.validate import plots
    from ddexport.validate.fid import Options, run_fid
    from ddexport.validate.report import write

    gate = _fid_gate(facts.manifest)
    images = gate.images if gate and gate.images <= AT_ONCE else FEWER
    names = ("precision", "checkpoint", "vae", "text_encoder", "small_decoder")
    own = {name: options[name] for name in names if name in options}
    with console.stage("image quality"):
        report = run_fid(Options(bundle=facts.bundle, images=images, **own), None)
    write(report, _inside(facts.bundle, FOLDER), plots.of_fid(report))


@click.command("report", cls=console.Command, epilog=EPILOG)
@shared("bundle", whole=True)
@option("-o", "--output", type=PATH, metavar="FILE", show_default="BUNDLE/parity/index.html",
        help="File to write the page to.")  # fmt: skip
@option("--run", is_flag=True, help="First make the reports that are missing, with the options below.")
@shared("images", help="Number of images for parity.")
@shared("precision", "checkpoint", "vae", "teacher", "text-encoder", "small-decoder")
@option("--open", "opened", is_flag=True, help="Open the page in a browser.")
@shared("json")
@console.debug_option
def command(
    bundle: Path, output: Path | None, run: bool, opened: bool, as_json: bool, **options: Any
) -> None:
    """Write an HTML page with all measurements of BUNDLE.

    The page is one file. It shows the reports that `validate parity` and `validate fid` wrote to
    BUNDLE/parity; the command lists the missing ones, and how to make them. Exit code 3 if a measurement
    exceeds its limit, 1 if no report has compared the bundle with its limits.
    """
    facts = collect(bundle)
    if run:
        facts = make_missing(facts, **options)
    page = write_page(bundle, output, facts)
    if as_json:
        console.emit_json(summary(facts))
    else:
        click.echo(page)
    for what, how in facts.missing:
        click.echo(_printable(f"not measured: {what}: {how}"), err=True)
    if opened:
        click.launch(page.resolve().as_uri())
    kind, words = facts.verdict
    if kind == "bad":
        raise VerificationError(words, f"see {page}")
    if kind == "open":
        raise DDError(words, f"see {page}; --run makes what is missing")
