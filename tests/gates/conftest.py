"""The embedded models' bundles in every precision, and the commands in one process, as users call them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ddexport.validate import cli, plots
from ddexport.validate.fid import run as fid_run
from ddexport.validate.reference import TorchReference

MODELS = ("digits-var", "digits-llamagen")
both_models = pytest.mark.parametrize("model", MODELS)
# The other family is in `make test-all`, where a fault or a file has nothing to do with the family.
ci_model = pytest.mark.parametrize("model", [MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)])
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@pytest.fixture
def planted(embedded_bundle: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """planted(model, precision, fault): a copy of the model's bundle with a fault in it."""

    def plant(model: str, precision: str = "fp32", fault: Callable[[Path, str], None] | None = None) -> Path:
        bundle = tmp_path / model
        shutil.copytree(embedded_bundle(model), bundle, ignore=shutil.ignore_patterns("parity", "engines"))
        if fault is not None:
            fault(bundle, precision)
        return bundle

    return plant


DRAWN: dict[str, Any] = {}
LOADED: dict[tuple[str, str], Any] = {}


@pytest.fixture(scope="module", autouse=True)
def one_reference() -> Iterator[None]:
    """In these modules what the PyTorch side draws depends on recipe and request alone: it is drawn once."""
    draw = TorchReference.draw

    def draw_once(reference: Any, request: Any, advance: Any) -> Any:
        arrays = (request.labels, request.seeds)
        key = json.dumps(
            [reference.recipe.to_dict(), request.conditions.prompts, *(array.tolist() for array in arrays)]
        )
        if key not in DRAWN:
            DRAWN[key] = draw(reference, request, advance)
        return DRAWN[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchReference, "draw", draw_once)
        # The reference set of the digits too: it depends on the features alone.
        load = fid_run.load

        def load_once(name: str, extractor: Any, recipe: Any) -> Any:
            if (name, extractor.identity) not in LOADED:
                LOADED[name, extractor.identity] = load(name, extractor, recipe)
            return LOADED[name, extractor.identity]

        patch.setattr(fid_run, "load", load_once)
        yield


@pytest.fixture
def parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """parity(bundle, precision): the real command in this process, without its pictures. A quarter of the
    recipe's images show a fault as well.
    """
    monkeypatch.setattr(plots, "of_parity", lambda *_: {})

    def run(bundle: Path, precision: str = "fp32", images: int = 16) -> Result:
        options = ("--backend", "onnxruntime", "--precision", precision, "--threads", "1", "--json")
        where = ("--images", str(images), "--report", str(tmp_path / "report"))
        return CliRunner().invoke(cli.command, ["parity", str(bundle), *options, *where])

    return run


@pytest.fixture(scope="session")
def proven(
    embedded_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """proven(model): an unbroken bundle that passed `validate parity` in float32, with all that this leaves.
    Do not write into it.
    """

    @functools.cache
    def prove(model: str) -> Path:
        bundle = tmp_path_factory.mktemp("proven") / model
        shutil.copytree(embedded_bundle(model), bundle, ignore=shutil.ignore_patterns("parity"))
        options = ("--backend", "onnxruntime", "--threads", "1", "--images", "16")
        result = CliRunner().invoke(cli.command, ["parity", str(bundle), *options])
        assert result.exit_code == 0, result.stderr
        return bundle

    return prove


def failed_rows(result: Result) -> set[str]:
    """The names of the rows past their limit."""
    return {row["name"] for row in json.loads(result.stdout)["rows"] if not row["passed"]}
