"""`validate parity --backend browser` passes, and ends with exit code 3 for every planted fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ddexport import site
from ddexport.validate import cli, plots
from tests.gates import faults
from tests.gates.conftest import MODELS, failed_rows

pytestmark = pytest.mark.web


@pytest.fixture
def parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Result]:
    """parity(bundle): the real command, without its pictures."""
    monkeypatch.setattr(plots, "of_parity", lambda *_: {})
    words = ["--backend", "browser", "--images", "4", "--json", "--report", str(tmp_path / "report")]
    return lambda bundle: CliRunner().invoke(cli.command, ["parity", str(bundle), *words])


@pytest.mark.slow
def test_an_unbroken_bundle_passes(planted: Callable[..., Path], parity: Callable[[Path], Result]) -> None:
    """Every schedule, and the small decoder in the first; Chromium's version is in the report. (In CI
    `make parity` shows that it passes.)"""
    result = parity(planted(MODELS[0]))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["passed"], report["backend"]) == (True, "browser")
    assert {"chromium", "onnxruntime-web"} <= set(report["versions"])
    scopes = {row["scope"] for row in report["rows"]}
    assert {f"{n} steps, end to end" for n in (2, 3, 4)} | {"1 step, decoder small, end to end"} < scopes


def test_another_decoder_fails(planted: Callable[..., Path], parity: Callable[[Path], Result]) -> None:
    """The small one in its place, with hashes that are right."""

    def swapped(bundle: Path, precision: str) -> None:
        shutil.copyfile(bundle / "decoder_small.onnx", bundle / "decoder.onnx")
        faults.rehash(bundle)

    result = parity(planted(MODELS[0], "fp32", swapped))
    assert result.exit_code == 3, result.output
    assert "8-bit image PSNR, dB" in failed_rows(result)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("ddexport.js", "labelIndex(names, aliases, label)", "(label + 1) % 10", "share of images left out"),
        ("noise.js", "radius * y", "-radius * y", "noise of seed 0"),
        ("images.js", "255", "254", "8-bit image PSNR, dB"),
    ],
)  # fmt: skip
def test_a_fault_of_the_javascript_fails(
    planted: Callable[..., Path], parity: Callable[[Path], Result], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, said: str,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(site.WEB, tmp_path / "web"))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    monkeypatch.setattr(site, "WEB", folder)
    result = parity(planted(MODELS[0]))
    assert result.exit_code == 3, result.output
    assert said in result.stderr


def test_a_missing_chromium_is_told(
    planted: Callable[..., Path], parity: Callable[[Path], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    result = parity(planted(MODELS[0]))
    assert result.exit_code == 1 and "apt-get install chromium" in result.stderr
