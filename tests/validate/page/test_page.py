"""The page: complete, self-contained, and harmless whatever a bundle says of itself."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec import structs

from ddexport.runtime.bundle import file_info, read_manifest, sha256_of
from ddexport.runtime.errors import BundleError
from ddexport.validate.page.command import command
from ddexport.validate.page.facts import collect
from ddexport.validate.page.make import Making, make_missing
from ddexport.validate.page.reports import Measured
from ddexport.validate.page.view import cards, render, room, summary, verdict

HOSTILE = "<script>alert('x')</script>\"'><img src=http://example.org/x onerror=alert(1)>{{ 7 * 7 }}"
INTERVAL = {"value": 0.5, "low": 0.4, "high": 0.6}


class Elements(HTMLParser):
    """Every start tag with its attributes, and the tags that were left open."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def fid_report(bundle: Path, **changes) -> dict:
    figures = [
        {
            "steps": steps,
            "name": "FID",
            "bundle": INTERVAL,
            "reference": INTERVAL,
            "difference": {"value": 1e-6},
        }
        for steps in (1, 2)
    ]
    row = {"scope": "1 step", "name": "FID, difference", "value": 1e-6, "limit": 0.01, "direction": "at most"}
    report = {
        "name": read_manifest(bundle).name,
        "manifest": sha256_of(bundle / "bundle.json"),
        "passed": True,
        "precision": "fp32",
        "backend": "toy",
        "images": 500,
        "seed": 0,
        "features": "digits",
        "compared": {"spec": "data"},
        "figures": figures,
        "measurements": [row],
    }
    return report | changes


def state_limit(bundle: Path, difference: float) -> None:
    """Of the FID difference, in the manifest."""
    data = json.loads((bundle / "bundle.json").read_text())
    limits = {"difference": difference, "distance": None, "changed": None, "provisional": False}
    gate = {"features": "digits", "images": 500, "limits": {"fp32": limits}, "reference": ""}
    data["parity"]["fid"] = gate
    (bundle / "bundle.json").write_text(json.dumps(data))


@pytest.fixture(scope="session")
def reported(random_bundle, tmp_path_factory) -> Path:
    """A bundle of random weights with every report that --run makes of it, and one of image quality."""
    bundle = tmp_path_factory.mktemp("reported") / "bundle"
    shutil.copytree(random_bundle, bundle)
    state_limit(bundle, 0.01)
    make_missing(collect(bundle), Making(bundle, images=2))
    (bundle / "parity" / "fid-fp32.json").write_text(json.dumps(fid_report(bundle)))
    return bundle


@pytest.fixture
def copy(reported, tmp_path) -> Path:
    shutil.copytree(reported, tmp_path / "bundle")
    return tmp_path / "bundle"


def page_of(bundle: Path) -> str:
    return render(collect(bundle), "today")


def test_run_makes_what_was_missing(reported):
    facts = collect(reported)
    assert facts.missing == [] and facts.remarks == []
    assert len(facts.parity) == len(facts.evidence) == 1 and len(facts.latency) == 4
    assert sorted(facts.evidence[0].samples) == [1, 2]
    assert verdict(facts)[0] == "good"


def test_what_was_measured_is_on_the_page(reported):
    page, facts = page_of(reported), collect(reported)
    for heading in (
        "Samples",
        "Image quality",
        "How close the choices are",
        "Worst cases",
        "Parity",
        "Latency",
    ):
        assert re.search(rf"<h2>{heading}", page), heading
    for one in facts.parity[0].measurements:
        assert one.name in page
    for info in facts.manifest.files():
        assert info.sha256 in page
    assert "FID against the number of steps" in page
    assert facts.manifest_sha256 in page and facts.manifest.tools["torch"] in page


def test_random_weights_are_said_loudly(reported, golden_bundle):
    assert 'class="alarm"' in page_of(reported) and "Random weights" in page_of(reported)
    assert 'class="alarm"' not in page_of(golden_bundle)


def test_the_page_needs_nothing_but_itself(reported):
    """No script, no style sheet, font or picture from elsewhere, and a policy that forbids them."""
    page = page_of(reported)
    elements = Elements(page)
    assert elements.open == []
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in elements.found}
    for _, attributes in elements.found:
        assert attributes.get("src", "data:image/png").startswith("data:image/png")
        assert "href" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page and "@import" not in page
    policy = next(a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_it_is_for_phones_paper_and_the_dark(reported):
    page = page_of(reported)
    for feature in ("width=device-width", "prefers-color-scheme: dark", "@media print", "max-width: 40rem"):
        assert feature in page


def test_a_bundle_without_reports_says_which_commands_make_them(golden_bundle):
    facts = collect(golden_bundle)
    page = render(facts, "today")
    assert verdict(facts) == ("open", "no verdict: no report holds this bundle to its limits")
    assert len(facts.missing) == 4
    for one in facts.missing:
        assert one.command in page
    assert f"validate parity {golden_bundle} --checkpoint student.pth --vae vae.pth" in page


def hostile_manifest(bundle: Path) -> None:
    labels = bundle / "labels.json"
    data = json.loads(labels.read_text())
    data["names"] = [f"{HOSTILE} {number}" for number in range(len(data["names"]))]
    labels.write_text(json.dumps(data))
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest |= {
        "name": HOSTILE,
        "title": HOSTILE,
        "created": HOSTILE,
        "published": {HOSTILE: {HOSTILE: HOSTILE}},
    }
    manifest |= {"licence": {HOSTILE: HOSTILE}, "tools": {HOSTILE: HOSTILE}}
    manifest["labels"] = structs.asdict(file_info(labels, bundle))
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def hostile_reports(bundle: Path) -> None:
    """Every text of every report, with the hash of the manifest made right again."""
    digest = sha256_of(bundle / "bundle.json")
    for path in (bundle / "parity").glob("*.json"):
        data = json.loads(path.read_text(), object_hook=_poisoned)
        if "manifest" in data:
            data["manifest"] = digest
        path.write_text(json.dumps(data))
    row = {"name": HOSTILE, "passes": 1, "how": HOSTILE, "frechet": [1.0], "image_ms": {HOSTILE: 1.0}}
    comparison = {"model": HOSTILE, "rows": [row, row | {"name": ""}]}
    (bundle / "parity" / "comparison.json").write_text(json.dumps(comparison))


def _poisoned(data: dict) -> dict:
    kept = ("picture", "reference", "bundle", "difference", "direction", "manifest", "value", "low", "high")
    pictures = {"picture", "factor"} & set(data)
    return {
        key: HOSTILE
        if isinstance(value, str) and not (key in kept and (pictures or key not in ("bundle",)))
        else value
        for key, value in data.items()
    }


def test_nothing_that_a_bundle_says_becomes_markup(copy):
    """Names, labels, places, notes, versions: all of it is text. Templates in it are not evaluated."""
    hostile_manifest(copy)
    hostile_reports(copy)
    facts = collect(copy)
    assert facts.remarks == [] and facts.evidence and facts.parity and facts.fid and facts.comparison
    page = render(facts, HOSTILE)
    elements = Elements(page)
    assert elements.open == []
    assert {"script"} & {tag for tag, _ in elements.found} == set()
    for tag, attributes in elements.found:
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("src", "data:image/png").startswith("data:image/png")
    assert "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page and "49" not in re.findall(r"&gt;(\d+)", page)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("parity.json", "{", "left out"),
        ("parity.json", "[" * 100_000, "left out"),
        ("parity.json", {"name": "other"}, "of another bundle, 'other'"),
        ("parity.json", {"measurements": [{"value": "x"}]}, "measurements[0].value"),
        ("parity.json", {"measurements": {}}, "measurements"),
        ("fid-fp32.json", {"figures": [{"steps": 1, "name": "FID"}]}, "bundle"),
        ("evidence-fp32.json", {"errors": {}}, "left out"),
        ("evidence-fp32.json", "[]", "not of this bundle.json"),
        ("comparison.json", '{"model": "other"}', "another model"),
        ("comparison.json", '{"model": "tiny", "rows": [{}]}', "rows[0]"),
    ],
)
def test_a_report_that_cannot_be_used_is_left_out_and_said(copy, name, content, said):
    """A whole text, or changes of the report that is there."""
    path = copy / "parity" / name
    text = content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content)
    path.write_text(text)
    facts = collect(copy)
    assert len(facts.remarks) == 1 and name in facts.remarks[0] and said in facts.remarks[0]
    assert "is left out" in render(facts, "today")


def test_reports_do_not_outlive_a_change_of_the_decoder(copy):
    """All colours brighter, hashes and sizes made right again: it was `passed, 79 of 79` once."""
    import onnx
    from onnx import numpy_helper

    path = copy / "decoder.onnx"
    model = onnx.load(path)
    bias = next(one for one in model.graph.initializer if list(one.dims) == [3])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), bias.name))
    onnx.save(model, path)
    manifest = json.loads((copy / "bundle.json").read_text())
    graph = next(one for one in manifest["graphs"] if one["role"] == "decoder")
    graph["files"] = [structs.asdict(file_info(path, copy))]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    result = CliRunner().invoke(command, [str(copy), "--json"])
    assert result.exit_code == 1, result.output
    data = json.loads(result.stdout)
    assert data["verdict"] == "no verdict" and "no report holds this bundle" in result.stderr
    assert data["parity"] == data["fid"] == data["evidence"] == data["latency"] == []
    stale = {"evidence-fp32.json", "fid-fp32.json", "latency-fp32.json", "parity-fp32.json", "parity.json"}
    assert {remark.split()[0] for remark in data["remarks"]} == stale
    for remark in data["remarks"]:
        assert "not of this bundle.json; make it again: ddexport validate" in remark and str(copy) in remark


@pytest.mark.parametrize("stated", [None, "0" * 64])
@pytest.mark.parametrize("name", ["fid-fp32.json", "parity.json", "evidence-fp32.json"])
def test_a_report_names_the_manifest_it_is_of(copy, name, stated):
    path = copy / "parity" / name
    data = json.loads(path.read_text())
    del data["manifest"]
    path.write_text(json.dumps(data | ({"manifest": stated} if stated else {})))
    (remark,) = collect(copy).remarks
    assert remark.startswith(f"{name} is left out: it is not of this bundle.json")


def test_times_of_no_bundle_are_shown_as_they_are(copy):
    """`validate speed` and the benchmark time models: their tables say nothing of one export."""
    rows = [{"backend": "x", "precision": "fp32", "batch": 1, "total_ms": 3.0}]
    (copy / "parity" / "bench.json").write_text(json.dumps(rows))
    assert [row.total_ms for row in collect(copy).latency if row.backend == "x"] == [3.0]


@pytest.mark.parametrize(
    "said",
    [{"passed": None, "no_verdict": "it rained"}, {"passed": False}, {"passed": None}, {"passed": "yes"}],
)
def test_a_report_that_claims_no_pass_is_none(copy, said):
    """Its rows are shown, and none of them counts."""
    path = copy / "parity" / "fid-fp32.json"
    path.write_text(json.dumps(fid_report(copy) | said))
    facts = collect(copy)
    kind, words = verdict(facts)
    assert kind == "good" and words.endswith("limits: parity")
    assert facts.remarks == [
        f"fid-fp32.json has no verdict: {said.get('no_verdict', 'it does not say that it passed')}"
    ]
    assert {card["kind"] for card in cards(facts) if card["title"] == "FID difference"} == {"open"}
    for parity in (copy / "parity").glob("parity*.json"):
        parity.unlink()
    result = CliRunner().invoke(command, [str(copy)])
    assert result.exit_code == 1 and "no verdict" in result.stderr


def test_limits_of_image_quality_are_the_manifests(copy):
    """Whatever the report says they are."""
    state_limit(copy, 1e-7)
    (copy / "parity" / "fid-fp32.json").write_text(json.dumps(fid_report(copy)))
    (failure,) = collect(copy).failures
    assert (failure.name, failure.limit) == ("FID, difference", 1e-7)


def test_a_bundle_that_was_changed_has_no_page(copy):
    graph = copy / "decoder.onnx"
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"decoder\.onnx"):
        collect(copy)


def test_a_report_that_says_it_passed_is_checked_against_its_limit(copy):
    """The verdict is made of values and limits, not of what the report claims."""
    path = copy / "parity" / "parity.json"
    data = json.loads(path.read_text())
    gated = next(one for one in data["measurements"] if one["limit"] is not None)
    gated |= {"value": 1e9, "limit": 1.0, "direction": "at most", "passed": True}
    path.write_text(json.dumps(data | {"passed": True}))
    facts = collect(copy)
    assert verdict(facts)[0] == "bad" and "1 of" in verdict(facts)[1]
    assert '<tr class="bad">' in render(facts, "today")
    result = CliRunner().invoke(command, [str(copy)])
    assert result.exit_code == 3 and "past their limits" in result.stderr


@pytest.mark.parametrize(
    ("value", "limit", "direction", "expected"),
    [
        (0.0, 1.0, "at most", 0.0),
        (1.0, 1.0, "at most", 1.0),
        (1e-3, 1.0, "at most", 0.5),
        (1e-9, 1.0, "at most", 0.0),
        (2.0, 1.0, "at most", 1 + 0.30103 / 6),
        (60.0, 60.0, "at least", 1.0),
        (120.0, 60.0, "at least", 0.5),
        (float("inf"), 60.0, "at least", 0.0),
        (float("nan"), 60.0, "at least", 1.1),
        (1.0, 0.0, "at most", 1.1),
        (0.0, 0.0, "at most", 0.0),
    ],
)
def test_the_bar_shows_the_way_to_the_limit(value, limit, direction, expected):
    kept = value <= limit if direction == "at most" else value >= limit
    assert room(Measured("s", "n", value, limit, direction, kept, "", "")) == pytest.approx(
        expected, abs=0.01
    )


def test_the_command_writes_the_page_and_the_json(reported, tmp_path):
    page = tmp_path / "new" / "page.html"
    result = CliRunner().invoke(command, [str(reported), "-o", str(page), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["verdict"] == "passed" and data["random_weights"] is True
    assert data["evidence"][0]["margins"]["counts"] and "samples" not in data["evidence"][0]
    assert data["summary"] in page.read_text() and data == json.loads(json.dumps(data))
    assert {one["file"] for one in data["files"]} >= {"student.onnx", "decoder.onnx", "labels.json"}


def test_what_could_not_be_made_is_on_the_page(random_bundle, tmp_path):
    """This bundle does not say how its images are measured; everything else is made all the same."""
    shutil.copytree(random_bundle, tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    manifest["parity"].pop("fid", None)
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(manifest))
    result = CliRunner().invoke(command, [str(tmp_path / "bundle"), "--run", "--images", "2"])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "bundle" / "parity" / "index.html").read_text()
    assert "image quality could not be measured" in page and "could not be measured" in result.stderr
    assert "validate fid" in page and "Samples" in page


def test_a_folder_that_is_no_bundle_is_said(tmp_path):
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert result.exit_code == 1 and "not a bundle" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_summary_holds_no_pictures(reported):
    assert "picture" not in json.dumps(summary(collect(reported)), default=str)


def test_the_large_figures_are_those_nearest_to_their_limits(copy):
    """One bad row among many good ones of its name must be what is seen first."""
    path = copy / "parity" / "parity.json"
    data = json.loads(path.read_text())
    rows = [one for one in data["measurements"] if one["name"] == "image PSNR, dB" and one["limit"]]
    rows[1]["value"] = 61.5
    path.write_text(json.dumps(data))
    shown = {card["title"]: card for card in cards(collect(copy))}
    assert shown["worst image"]["value"] == "61.5 dB" and shown["worst image"]["kind"] == "good"
    rows[0]["value"] = 59.0
    path.write_text(json.dumps(data))
    assert {card["title"]: card["kind"] for card in cards(collect(copy))}["worst image"] == "bad"


def test_precisions_stand_side_by_side_and_the_last_run_of_each_counts(copy):
    """`parity.json` is what the last run wrote; the file with the precision in its name may be older."""
    folder = copy / "parity"
    latest = json.loads((folder / "parity.json").read_text())
    (folder / "parity-fp16.json").write_text(json.dumps(latest | {"precision": "fp16", "images": 5}))
    (folder / "parity.json").write_text(json.dumps(latest | {"images": 77}))
    found = collect(copy).parity
    assert [(report.precision, report.images) for report in found] == [("fp32", 77), ("fp16", 5)]
