"""The report page and its plots: complete, self-contained, and harmless whatever a bundle says of itself."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ddexport.runtime.backends import _saved
from ddexport.runtime.bundle import read_manifest, sha256_of
from ddexport.runtime.errors import BundleError, DDError
from ddexport.validate import fid, plots
from ddexport.validate.page import collect, command, make_missing, render, way, write_page
from ddexport.validate.report import SCHEMA, Measurement, Report, write

HOSTILE = "<script>alert('x')</script>\"'><img src=http://example.org/x onerror=alert(1)>{{ 7 * 7 }}\x07"
OPTIONS = {"images": 2, "precision": None, "checkpoint": None, "vae": None, "teacher": None}


class Elements(HTMLParser):
    """Every start tag with its attributes, and the tags that were left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def fid_report(bundle: Path, **changes) -> Report:
    rows = []
    for scope in ("1 step", "2 steps"):
        rows += [
            Measurement("fid", scope, f"FID, {side}", 0.5, low=0.4, high=0.6)
            for side in ("bundle", "PyTorch")
        ]
        rows.append(Measurement("fid", scope, "FID, difference", 1e-6, 0.01, rule="FID, difference"))
    fields = {
        "schema": SCHEMA, "kind": "fid", "name": "tiny", "title": "the title", "precision": "fp32",
        "manifest": sha256_of(bundle / "bundle.json"), "backend": "toy", "images": 500, "seed": 0,
        "settings": {}, "versions": {"toys": "9.9"}, "seconds": 1.0, "rows": tuple(rows),
    }  # fmt: skip
    return Report(**fields | changes)


def edit(path: Path, **changes) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def state_limit(bundle: Path, difference: float) -> None:
    """Of the FID difference, in the manifest."""
    parity = json.loads((bundle / "bundle.json").read_text())["parity"]
    gate = {"features": "digits", "images": 9000, "limits": {"fp32": {"difference": difference}}}
    edit(bundle / "bundle.json", parity=parity | {"fid": gate})


@pytest.fixture(scope="session")
def reported(random_bundle, tmp_path_factory) -> Path:
    """A bundle of random weights with all that --run makes; FID of it is made up."""
    bundle = tmp_path_factory.mktemp("reported") / "bundle"
    shutil.copytree(random_bundle, bundle)
    state_limit(bundle, 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "Options", SimpleNamespace, raising=False)
        patch.setattr(fid, "run_fid", lambda o, _: fid_report(o.bundle, images=o.images), raising=False)
        make_missing(collect(bundle), **OPTIONS)
    return bundle


@pytest.fixture
def copy(reported, tmp_path) -> Path:
    shutil.copytree(reported, tmp_path / "bundle")
    return tmp_path / "bundle"


def run(*arguments):
    return CliRunner().invoke(command, [*map(str, arguments)])


def test_run_makes_what_was_missing(reported):
    facts = collect(reported)
    made = [("parity", "fp32", 2), ("fid", "fp32", 500)]
    assert [(r.kind, r.precision, r.images) for r in facts.reports] == made
    assert facts.remarks == [] and [what for what, _ in facts.missing] == ["times"]
    assert facts.verdict[0] == "good" and facts.verdict[1].endswith("parity in fp32, image quality in fp32")
    titles = list(facts.shown[0][1])
    assert titles[:2] == ["Samples, 1 step", "Samples, 3 steps"] and len(titles) == 5
    assert list(facts.shown[1][1]) == ["FID against the number of steps, with 95 % intervals"]


def test_what_was_measured_is_on_the_page(reported):
    facts = collect(reported)
    page = render(facts)
    for text in ("toys 9.9", "0.5 [0.4, 0.6]", "≤ 0.01"):
        assert text in page
    assert facts.digest in page and facts.manifest.tools["torch"] in page and facts.verdict[1] in page
    for report, pictures in facts.shown:
        assert report.title in page and all(address in page for address in pictures.values())
        assert all(row.name in page and row.where in page for row in report.rows)
    assert all(info.sha256 in page for info in facts.manifest.files())
    check_harmless(page)
    assert 'class="alarm"' in page  # random weights


def check_harmless(page: str) -> None:
    """No script, and no style sheet, font or picture from elsewhere."""
    elements = Elements(page)
    assert elements.open == []
    assert not {"script", "link", "iframe", "object", "base", "form", "a"} & {
        tag for tag, _ in elements.found
    }
    for _, attributes in elements.found:
        assert attributes.get("src", "data:image/png").startswith("data:image/png")
        assert not any(name.startswith("on") or name == "href" for name in attributes)
    assert "url(" not in page and "@import" not in page
    policy = next(a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_a_bundle_without_reports_says_which_commands_make_them(golden_bundle, tmp_path):
    result = run(golden_bundle, "-o", tmp_path / "page.html")
    assert result.exit_code == 1
    for words in ("validate parity", "validate fid"):
        line = f"ddexport {words} {golden_bundle} --checkpoint student.pth --vae vae.pth"
        assert line in result.stderr and line in (tmp_path / "page.html").read_text()
    assert 'class="alarm"' not in (tmp_path / "page.html").read_text()


def test_nothing_that_a_bundle_says_becomes_markup(copy):
    """Names, places, notes, versions: all of it is text. Templates in it are not evaluated, terminals not
    controlled."""
    texts = {"name": HOSTILE, "title": HOSTILE, "created": HOSTILE, "tools": {HOSTILE: HOSTILE}}
    texts |= {"licence": {HOSTILE: HOSTILE}, "published": {HOSTILE: {HOSTILE: HOSTILE}}}
    edit(copy / "bundle.json", **texts)
    rows = [Measurement(HOSTILE, HOSTILE, HOSTILE, 1.0, 2.0, where=HOSTILE, note=HOSTILE)]
    texts = {"name": HOSTILE, "title": HOSTILE, "backend": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    report = fid_report(copy, rows=tuple(rows), no_verdict=HOSTILE, **texts)
    write(report, copy / "parity", {HOSTILE: Image.new("RGB", (2, 2))})
    result = run(copy)
    assert len(collect(copy).shown) == 1 and "\x07" not in result.stderr
    page = (copy / "parity" / "index.html").read_text()
    check_harmless(page)
    assert "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page and "49" not in re.findall(r"&gt;(\d+)", page)


def test_a_report_that_cannot_be_used_is_left_out_with_a_remark(copy):
    """A whole text, or changes of the report that is there."""
    for name, content in (
        ("parity-fp32.json", "{"), ("parity-fp32.json", "[" * 100_000), ("parity-fp32.json", " " * (9 << 20)),
        ("parity-fp32.json", {"manifest": "0" * 64}), ("parity-fp32.json", {"precision": "fp16"}),
        ("parity-fp32.json", {"rows": [{"value": 10**400}]}), ("fid-fp32.json", {"kind": "other"}),
        ("fid-fp16.json", {"precision": "fp16"}),
    ):  # fmt: skip
        path, original = copy / "parity" / name, copy / "parity" / name.replace("fp16", "fp32")
        before = original.read_text()
        path.write_text(content if isinstance(content, str) else json.dumps(json.loads(before) | content))
        (remark,) = collect(copy).remarks
        assert remark.startswith(f"{name} is left out: "), content
        path.unlink()
        original.write_text(before)
    (copy / "parity" / name).write_text("{")
    facts = collect(copy)
    assert "is left out" in render(facts) and f"{name} is left out" in run(copy).stderr


def test_a_bundle_that_was_changed_has_no_page(copy, tmp_path):
    data = bytearray((copy / "decoder.onnx").read_bytes())
    data[-1] ^= 1
    (copy / "decoder.onnx").write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"decoder\.onnx"):
        write_page(copy)
    assert run(tmp_path).exit_code == 1


def test_a_report_without_a_verdict_counts_for_nothing(copy):
    """Its rows are shown, and neither pass nor fail."""
    rows = [Measurement("fid", "1 step", "FID, difference", 9.0, 0.01)]
    write(fid_report(copy, no_verdict="it rained", rows=tuple(rows)), copy / "parity")
    facts = collect(copy)
    assert facts.verdict[0] == "good" and facts.verdict[1].endswith("limits: parity in fp32")
    assert facts.remarks == ["fid-fp32.json has no verdict: it rained"]
    (copy / "parity" / "parity-fp32.json").unlink()
    assert run(copy).exit_code == 1


@pytest.mark.parametrize("kind", ["parity", "fid"])
def test_limits_are_the_manifests(copy, kind):
    """Whatever the report says they are, and that it passed."""
    path = copy / "parity" / f"{kind}-fp32.json"
    data = json.loads(path.read_text())
    name = {"parity": "embeddings, relative error", "fid": "FID, difference"}[kind]
    row = next(one for one in data["rows"] if one["name"] == name)
    stated = row["limit"]
    row |= {"value": 2 * stated, "limit": 3 * stated}
    edit(path, rows=data["rows"], passed=True, verdict="all is well")
    facts = collect(copy)
    (failure,) = [failure for report in facts.reports for failure in report.failures]
    assert (failure.name, failure.limit) == (name, stated)
    assert facts.verdict[0] == "bad" and '<tr class="bad">' in render(facts)
    result = run(copy)
    assert result.exit_code == 3 and "1 of" in result.stderr


def test_limits_that_the_manifest_lacks_are_no_limits(copy):
    row = Measurement("fid", "1 step", "images that differ", 1.0, 1.0)
    write(fid_report(copy, rows=(row,)), copy / "parity")
    assert collect(copy).verdict[1].endswith("parity in fp32")  # stated as none: shown
    parity = json.loads((copy / "bundle.json").read_text())["parity"]
    del parity["fid"], parity["fp32"]["image_max"]
    edit(copy / "bundle.json", parity=parity)
    for kind in ("parity", "fid"):
        edit(copy / "parity" / f"{kind}-fp32.json", manifest=sha256_of(copy / "bundle.json"))
    facts = collect(copy)
    assert facts.verdict[0] == "open" and len(facts.remarks) == 2
    assert "'changed'" in facts.remarks[0] and "image_max" in facts.remarks[1]


def test_the_bar_shows_the_way_to_the_limit():
    for value, limit, direction, expected in (
        (0.0, 1.0, "at most", 0.0), (0.25, 1.0, "at most", 0.25), (2.0, 1.0, "at most", 2.0),
        (60.0, 60.0, "at least", 1.0), (80.0, 60.0, "at least", 0.1), (40.0, 60.0, "at least", 10.0),
        (np.inf, 60.0, "at least", 0.0), (-np.inf, 60.0, "at least", 1e300),
        (np.nan, 60.0, "at least", np.inf),
        (1.0, 0.0, "at most", np.inf), (0.0, 0.0, "at most", 0.0), (5.0, None, "at most", 0.0),
    ):  # fmt: skip
        row = Measurement("m", "s", "n", float(value), limit, direction)
        assert way(row) == pytest.approx(expected), (value, limit)


def test_the_large_figures_are_those_nearest_to_their_limits(copy):
    """One bad row among many good ones of its name must be what is seen first."""
    path = copy / "parity" / "parity-fp32.json"
    data = json.loads(path.read_text())
    rows = [one for one in data["rows"] if one["name"] == "image PSNR, dB" and "limit" in one]
    for value, kind in ((rows[0]["limit"] + 1, "good"), (rows[0]["limit"] - 1, "bad")):
        rows[-1]["value"] = value
        edit(path, rows=data["rows"])
        (card,) = [card for card in collect(copy).cards if card["title"] == "worst image"]
        assert (card["value"], card["kind"]) == (f"{value:.3g} dB", kind)


def test_the_command_writes_the_page_and_the_json(reported, tmp_path):
    page = tmp_path / "new" / "page.html"
    result = run(reported, "-o", page, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["verdict"] == "passed" and data["random_weights"] is True
    assert data["summary"] in page.read_text() and "base64" not in result.stdout
    assert [report["verdict"][:5] for report in data["reports"]] == ["parit", "image"]


def test_what_could_not_be_made_is_on_the_page(copy, monkeypatch):
    def fail(*_):
        raise DDError("the features are missing", "say them")

    monkeypatch.setattr(fid, "Options", SimpleNamespace, raising=False)
    monkeypatch.setattr(fid, "run_fid", fail, raising=False)
    (copy / "parity" / "fid-fp32.json").unlink()
    result = run(copy, "--run", "--images", 2)
    assert result.exit_code == 0, result.output
    for text in ((copy / "parity" / "index.html").read_text(), result.stderr):
        assert "the features are missing. say them" in text


@pytest.mark.parametrize("name", ["parity-fp32.json", "parity-fp32-0.png", "bench.json", "index.html"])
def test_links_out_of_the_bundle_are_not_followed(copy, name):
    path = copy / name if name == "bench.json" else copy / "parity" / name
    outside = copy.parent / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("[]")
    path.symlink_to(outside)
    before = outside.read_bytes()
    if name == "index.html":  # a link is replaced, for it may lead anywhere
        assert not write_page(copy).is_symlink()
        assert outside.read_bytes() == before
    else:
        (remark,) = collect(copy).remarks
        assert name in remark and "outside the bundle" in remark


def png(size: tuple[int, int] = (2, 2)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_lose_what_they_carried(copy):
    """A picture may hide text or a second file behind its pixels; the page gets the pixels alone. What is no
    picture is left out, and so is what does not lie beside its report."""
    path = copy / "parity" / "parity-fp32-0.png"
    path.write_bytes(png() + b"<script>alert(1)</script>")
    address = collect(copy).shown[0][1]["Samples, 1 step"]
    content = base64.b64decode(address.partition(",")[2])
    assert b"script" not in content and Image.open(io.BytesIO(content)).size == (2, 2)
    for wrong in (b"<svg/>", png()[:40], png((5000, 1)), b"GIF89a", None, b"\x89PNG" + bytes(17 << 20)):
        path.unlink()
        if wrong is not None:
            path.write_bytes(wrong)
        facts = collect(copy)
        (remark,) = facts.remarks
        assert "parity-fp32-0.png is left out" in remark and "Samples, 1 step" not in facts.shown[0][1]
        path.write_bytes(png())
    (copy / "secret.png").write_bytes(png())
    edit(copy / "parity" / "fid-fp32.json", pictures={"a": "../secret.png"})
    facts = collect(copy)
    assert facts.shown[1][1] == {} and len(facts.remarks) == 1


def test_saved_times_are_shown_if_they_are_of_these_graphs(copy):
    _saved.save(copy, read_manifest(copy), {"onnxruntime": 4.0})
    facts = collect(copy)
    assert facts.missing == [] and '<td class="n">4</td><td class="n">250</td>' in render(facts)
    times = json.loads((copy / "bench.json").read_text())
    (copy / "bench.json").write_text(json.dumps([times[0] | {"graphs": "of another export"}]))
    assert [what for what, _ in collect(copy).missing] == ["times"]
    (copy / "bench.json").write_text("{")
    assert "bench.json is left out" in collect(copy).remarks[0]


def tile(picture, column: int, top: int = plots.GAP):
    left = plots.GAP + column * (plots.TILE + plots.GAP)
    return np.asarray(picture)[top : top + plots.TILE, left : left + plots.TILE]


def test_samples_keep_their_order_and_their_pixels():
    images = [np.full((8, 4, 3), 10 * number, np.uint8) for number in range(7)]
    sheet = plots.samples(images, ["a very long name that no tile has the room for"] * 7)
    assert [int(tile(sheet, column)[0, 0, 0]) for column in range(5)] == [0, 10, 20, 30, 40]
    assert int(tile(sheet, 0)[0, -1, 0]) == 255  # half as wide as high
    large = plots.samples([np.full((512, 512, 3), 7, np.uint8)], [""])
    assert (tile(large, 0) == 7).all()


def test_fid_is_plotted_without_intervals_and_without_values(tmp_path):
    (tmp_path / "bundle.json").write_text("{}")
    low = Measurement("fid", "1 step", "FID, bundle", 0.1)
    broken = Measurement("fid", "2 steps", "FID, bundle", float("nan"))
    assert list(plots.of_fid(fid_report(tmp_path, rows=(low, broken))))
    assert plots.of_fid(fid_report(tmp_path, rows=fid_report(tmp_path).rows[2:3])) == {}
