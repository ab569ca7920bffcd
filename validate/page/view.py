"""Facts into the page: jinja2 with escaping of everything, and the plots."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from typing import Any

from msgspec import structs, to_builtins

from ddexport.runtime.errors import DDError
from ddexport.validate.page import svg
from ddexport.validate.page.evidence import Evidence
from ddexport.validate.page.facts import Facts
from ddexport.validate.page.reports import Interval, Measured, Quality, Report

KINDS = {"parity": "parity", "fid": "image quality"}
TEMPLATE, STYLE = "page.html.j2", "page.css"
CARDS = {  # measurements that are shown large: what the page calls them, and their unit
    "tokens that differ": ("tokens that differ", ""),
    "logits, largest error": ("logit error", ""),
    "embeddings, relative error": ("embedding error", ""),
    "image PSNR, dB": ("worst image", " dB"),
    "image, largest 8-bit difference": ("8-bit difference", ""),
    "FID, difference": ("FID difference", ""),
}


def render(facts: Facts, created: str) -> str:
    """The page as one text; `created` says when. Raises DDError without jinja2."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise DDError("the page needs jinja2", 'pip install "ddexport[validate]"') from error

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=number,
        size=size,
        figure=figure,
        picture=picture,
        room=room,
        count="{:,}".format,
        scopes=scopes,
        fid_rows=fid_rows,
    )
    environment.tests["random"] = lambda weights: weights.kind == "random"
    here = resources.files("ddexport.validate.page")
    template = environment.from_string((here / TEMPLATE).read_text(encoding="utf-8"))
    page: str = template.render(
        facts=facts,
        manifest=facts.manifest,
        style=Markup((here / STYLE).read_text(encoding="utf-8")),
        created=created,
        verdict=verdict(facts),
        cards=cards(facts),
        latency_columns=latency_columns(facts),
        samples=samples(facts),
        closeness=[(evidence, Markup(_closeness(evidence))) for evidence in facts.evidence],
        steps=[(name, Markup(plot)) for name, plot in quality_plots(facts)],
        compared=Markup(_against_passes(facts)) if facts.comparison else "",
        versions=versions(facts),
    )
    return page


def summary(facts: Facts) -> dict[str, Any]:
    """What is on the page, as plain data: everything but the pictures."""
    manifest = facts.manifest
    evidence = []
    for entry in facts.evidence:
        data = {key: value for key, value in structs.asdict(entry).items() if key not in ("samples", "worst")}
        shown = ("scope", "place", "size", "factor")
        evidence.append(
            data | {"worst": [{key: getattr(image, key) for key in shown} for image in entry.worst]}
        )
    kind, words = verdict(facts)
    data = {
        "bundle": facts.bundle,
        "name": manifest.name,
        "title": manifest.title,
        "verdict": {"good": "passed", "bad": "failed"}.get(kind, "no verdict"),
        "summary": words,
        "random_weights": manifest.weights.kind == "random",
        "weights": manifest.weights,
        "manifest_sha256": facts.manifest_sha256,
        "files": [
            {"file": info.file, "sha256": info.sha256, "bytes": info.bytes} for info in manifest.files()
        ],
        "versions": versions(facts),
        "parity": facts.parity,
        "fid": facts.fid,
        "evidence": evidence,
        "latency": facts.latency,
        "comparison": facts.comparison,
        "missing": facts.missing,
        "remarks": facts.remarks,
    }
    plain: dict[str, Any] = to_builtins(data, enc_hook=str, str_keys=True)
    return plain


def verdict(facts: Facts) -> tuple[str, str]:
    """The class of the page's pill and its words."""
    reports = (*facts.parity, *facts.fid)
    if facts.failures:
        gated = sum(len(report.gated) for report in reports)
        return "bad", f"{len(facts.failures)} of {gated} measurements past their limits"
    counted = [report for report in reports if report.gated and not report.no_verdict]
    if not counted:
        return "open", "no verdict: no report holds this bundle to its limits"
    gated = sum(len(report.gated) for report in counted)
    kinds = " and ".join(dict.fromkeys(KINDS[report.kind] for report in counted))
    return "good", f"{gated} of {gated} measurements within their limits: {kinds}"


def cards(facts: Facts) -> list[dict[str, Any]]:
    """The few numbers to look at first: name, value, limit, what it is of, its class."""
    reports = (*facts.parity, *facts.fid)
    cards = []
    for precision in dict.fromkeys(report.precision for report in reports):
        for report in reports:
            rows = _worst_by_name(report.gated) if report.precision == precision else {}
            cards += [
                _card(title, rows[name], unit, report)
                for name, (title, unit) in CARDS.items()
                if name in rows
            ]
    return cards


def _card(title: str, row: Measured, unit: str, report: Report) -> dict[str, Any]:
    sign = "at most" if row.direction == "at most" else "at least"
    return {
        "title": title,
        "value": (number(row.value) if abs(row.value) >= 1 else f"{row.value:.2g}") + unit,
        "limit": f"{sign} {number(row.limit)}{unit}",
        "of": f"{report.precision}, {report.images:,} images",
        "kind": "bad" if not row.passed else "open" if report.no_verdict else "good",
    }


def _worst_by_name(rows: Sequence[Measured]) -> dict[str, Measured]:
    """Of the rows of one name that which is nearest to its limit, or furthest past it."""
    worst: dict[str, Measured] = {}
    for row in rows:
        if row.name not in worst or room(row) > room(worst[row.name]):
            worst[row.name] = row
    return worst


def room(row: Measured) -> float:
    """How much of the way to its limit a value has gone, over six decades: 0 to 1, and more past it."""
    if row.limit is None:
        return 0.0
    if math.isnan(row.value):
        return 1.1
    if row.direction == "at least":  # decibels: 20 are a factor of ten
        decades = (row.limit - row.value) / 20
    elif row.value <= 0:
        return 0.0
    else:
        decades = math.log10(row.value / row.limit) if row.limit > 0 else math.inf
    return min(max(1 + decades / 6, 0.0 if row.passed else 1.01), 1.1)


def scopes(rows: Sequence[Measured]) -> list[tuple[str, list[Measured]]]:
    """The measurements of a report by scope, in its order."""
    return [(scope, list(group)) for scope, group in groupby(rows, key=lambda row: row.scope)]


def fid_rows(report: Report) -> list[tuple[int, list[Quality]]]:
    """The figures of a report by schedule."""
    return [(steps, list(group)) for steps, group in groupby(report.figures, key=lambda figure: figure.steps)]


def latency_columns(facts: Facts) -> list[tuple[str, str]]:
    """Field and heading of the columns that some row fills."""
    heads = (
        ("student_ms", "student, ms"),
        ("decoder_ms", "decoder, ms"),
        ("total_ms", "batch, ms"),
        ("images_per_s", "images a second"),
        ("peak_mib", "peak, MiB"),
    )
    return [(name, head) for name, head in heads if any(getattr(row, name) for row in facts.latency)]


def samples(facts: Facts) -> list[tuple[Evidence, int, list[tuple[str, bytes]]]]:
    """Evidence, steps, and (name of the class, picture) of each image."""
    return [
        (evidence, steps, [(_label(facts, sample.label), sample.picture) for sample in images])
        for evidence in facts.evidence
        for steps, images in sorted(evidence.samples.items())
    ]


def quality_plots(facts: Facts) -> list[tuple[str, str]]:
    """A plot of FID against steps for every report that has it."""
    plots = []
    for report in facts.fid:
        rows = [row for row in report.figures if row.name == "FID"]
        if not rows:
            continue
        names = [f"{row.steps} step{'s' * (row.steps > 1)}" for row in rows]
        points = [
            svg.Point(place, value.value, value.low, value.high, side)
            for place, row in enumerate(rows)
            for side, value in (("side-bundle", row.bundle), ("side-reference", row.reference))
            if value is not None
        ]
        sides = [("side-bundle", "bundle")]
        sides += [("side-reference", "PyTorch")] if any(row.reference for row in rows) else []
        title = f"FID against the number of steps, {report.precision}, features {report.features}"
        plots.append((title, svg.against_steps(points, names, sides, title)))
    return plots


def versions(facts: Facts) -> dict[str, str]:
    """Of the tools that made the bundle, then of those that measured it."""
    tools = {f"{name} (export)": str(version) for name, version in facts.manifest.tools.items()}
    for report in (*facts.parity, *facts.fid):
        tools |= {f"{name} ({report.kind})": version for name, version in report.versions.items()}
    return tools


def number(value: float | None) -> str:
    """Four digits, and a word for what is none."""
    if value is not None and math.isfinite(value) and value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if value is None:
        return ""
    return {"inf": "infinite", "nan": "not a number"}.get(str(value), f"{value:.4g}")


def figure(interval: Interval | None, sign: bool = False) -> str:
    """`0.431 [0.402, 0.467]`."""
    if interval is None:
        return ""
    plus = "+" if sign else ""
    text = f"{interval.value:{plus}.4g}" if math.isfinite(interval.value) else number(interval.value)
    return (
        text
        if interval.low is None or interval.high is None
        else f"{text} [{interval.low:{plus}.3g}, {interval.high:{plus}.3g}]"
    )


def size(count: int) -> str:
    """Bytes for people."""
    value, units = float(count), iter(("bytes", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def picture(data: bytes) -> str:
    """A PNG as the address of an image."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _label(facts: Facts, label: int) -> str:
    return facts.names[label] if label < len(facts.names) else str(label)


def _against_passes(facts: Facts) -> str:
    kinds = {"teacher": "side-teacher", "DD": "side-bundle"}
    points = [
        (
            row.name,
            float(row.passes),
            row.frechet,
            kinds.get(row.name.split()[0] if row.name else "", "side-reference"),
        )
        for row in facts.comparison
    ]
    return svg.against_passes(points, "Frechet distance against passes of a network")


def _closeness(evidence: Evidence) -> str:
    title = f"errors of logits and margins between choices, {evidence.precision}"
    return svg.closeness(evidence.errors, evidence.margins, evidence.token_margin, evidence.mismatches, title)
