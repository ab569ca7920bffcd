"""`ddexport web` without a browser: what it refuses, and how it gets onnxruntime-web."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ddexport import site
from ddexport.cli import main

Web = Callable[..., Result]


def program(folder: Path, script: str) -> None:
    """An npm that does what the script says."""
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Web:
    """web(...): the command, with a cache of its own and an npm that packs `content`, whose hash is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(site.sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "package" / "dist").mkdir(parents=True)
    for name in site.FILES:
        (tmp_path / "package" / "dist" / name).write_text(name)
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path, "package"))
    monkeypatch.setattr(site, "SHA512", site._digest(packed.read_bytes()))
    program(tmp_path / "bin", f"cp {packed} {site.PACKAGE}-{site.VERSION}.tgz")

    def run(*words: object) -> Result:
        return CliRunner().invoke(main, ["web", "-o", str(tmp_path / "site"), *map(str, words)])

    return run


def refused(result: Result, words: str, code: int = 1) -> None:
    assert result.exit_code == code and words in result.stderr and "\nhint: " in result.stderr, result.stderr


def test_the_package_is_fetched_once(web: Web, golden_bundle: Path, tmp_path: Path) -> None:
    result = web(golden_bundle, "--json")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "site" / "onnxruntime" / "ort.wasm.bundle.min.js").read_text() == site.FILES[0]
    assert json.loads(result.stdout)["bundles"] == {"var-dd-small": "fp32"}
    refused(web(golden_bundle), "exists already")
    program(tmp_path / "bin", "exit 1")
    assert web(golden_bundle, "--force").exit_code == 0
    [kept] = (tmp_path / "cache" / "ddexport").iterdir()
    kept.write_bytes(b"damaged")
    refused(web(golden_bundle, "--force"), "npm could not fetch")
    assert (tmp_path / "site" / "site.json").is_file()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo other > onnxruntime-web-1.30.0.tgz", "is not the one known here"),
        ("echo npm error network ENOTFOUND >&2; exit 1", "1.30.0: network ENOTFOUND"),
        ("exit 0", "npm could not fetch"),
        (None, "npm is not installed"),
    ],
)
def test_nothing_half_fetched_is_left(
    web: Web,
    golden_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str | None,
    words: str,
) -> None:
    program(tmp_path / "bin", script or "")
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    refused(web(golden_bundle), words)
    assert not (tmp_path / "site").exists()
    assert script is None or not [*(tmp_path / "cache" / "ddexport").iterdir()]


def test_bundles_that_no_page_draws_with(
    web: Web, embedded_bundle: Callable[[str], Path], golden_bundle: Path, text_bundle: Path, tmp_path: Path
) -> None:
    refused(web(embedded_bundle("digits-var"), "--precision", "bf16"), "no browser computes in bf16")
    refused(web(golden_bundle, "--precision", "int8"), "precision int8")
    refused(web(text_bundle), "draws from sentences")
    refused(web(golden_bundle, golden_bundle), "another bundle of this name")
    copy = Path(shutil.copytree(golden_bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(manifest | {"name": "../outside"}))
    refused(web(copy), "cannot be a folder's name")
    (copy / "labels.json").write_text("{}")
    refused(web(copy), "labels.json")


def test_one_file_is_for_small_bundles(
    web: Web, golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(web(golden_bundle, "--single-file"), "ends in .html", 2)
    page = tmp_path / "page.html"
    page.write_text("mine")
    refused(web(golden_bundle, "--single-file", "-o", page), "exists already")
    monkeypatch.setattr(site, "SINGLE_BYTES", 1 << 10)
    refused(web(golden_bundle, "--single-file", "-o", page, "--force"), "0 MiB of bundles at most")
    assert page.read_text() == "mine"


def test_one_file_has_its_policy_and_no_way_out(web: Web, golden_bundle: Path, tmp_path: Path) -> None:
    """A script or a style is named by its hash, and nothing is fetched from a server."""
    page = tmp_path / "page.html"
    assert web(golden_bundle, "--single-file", "-o", page).exit_code == 0
    text = page.read_text()
    script = text.rpartition('<script type="module">')[2].partition("</script>")[0]
    style = text.partition("<style>")[2].partition("</style>")[0]
    policy = text.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    assert all(site._digest(part.encode(), "sha256") in policy for part in (script, style))
    assert "src=" not in text.partition('<script type="application/json"')[0] and "'self'" not in policy
