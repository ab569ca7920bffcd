"""`validate fid`, `validate report` and `doctor --check` on planted faults: none of them says that all is
well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ddexport.runtime.doctor import command as doctor_command
from ddexport.validate import cli
from tests.gates import faults
from tests.gates.conftest import both_models, ci_model
from tests.gates.test_parity_gate import without_noise

Planted = Callable[..., Path]


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(cli.command, [*map(str, arguments)])


def fid(bundle: Path, *options: object) -> Result:
    few = ("--images", 200, "--bootstrap", 40)
    return validate("fid", bundle, "--backend", "onnxruntime", "--threads", 1, *few, *options)


def doctor(bundle: Path, *options: object) -> Result:
    arguments = [str(bundle), "--check", "--backend", "onnxruntime", *map(str, options)]
    return CliRunner().invoke(doctor_command, arguments)


@ci_model
def test_fid_sees_what_users_draw(planted: Planted, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Without re-noising the second step's images differ; the graphs are right. (`make quality` shows that an
    unbroken bundle passes: so few images are too few a difference.)
    """
    bundle = planted(model)
    assert "images that differ" not in fid(bundle, "--steps", 2).stderr
    without_noise(monkeypatch)
    result = fid(bundle, "--steps", 2)
    assert result.exit_code == 3, result.output
    assert "images that differ" in result.stderr


@ci_model
@pytest.mark.parametrize(
    "fault",
    [
        faults.in_codebook(lambda table: np.roll(table, 1, axis=0)),
        faults.in_graph(faults.runner_up),
        faults.in_graph(faults.negated_noise),
        faults.in_graph(faults.perturbed_weight),
    ],
    ids=["rolled codebook", "runner-up", "other noise", "one weight"],
)
def test_fid_fails_on_a_fault_of_the_bundle(
    planted: Planted, model: str, fault: Callable[[Path, str], None]
) -> None:
    assert fid(planted(model, "fp32", fault), "--steps", 1).exit_code == 3


@ci_model
def test_fid_fails_on_a_small_decoder_that_costs_too_much(planted: Planted, model: str) -> None:
    """A tenth of the FID is allowed; the full decoder's images are as good as before."""
    bundle = planted(model, "fp32", faults.in_graph(faults.brighter, "decoder_small"))
    result = fid(bundle, "--steps", 1, "--decoder", "small")
    assert result.exit_code == 3, result.output
    assert "FID, increase" in result.stderr
    assert "images that differ" not in fid(bundle, "--steps", 1).stderr


def test_fid_without_a_reference_set_gives_no_verdict(planted: Planted) -> None:
    result = fid(planted("digits-var"), "--steps", 1, "--reference", "none")
    assert result.exit_code == 1, result.output
    assert result.stdout.strip().splitlines()[-1].startswith("no verdict: ")


@ci_model
def test_a_report_of_another_bundle_is_not_believed(planted: Planted, model: str) -> None:
    """The decoder is broken after the reports were written."""
    bundle = planted(model)
    parity = validate("parity", bundle, "--backend", "onnxruntime", "--threads", 1)
    assert parity.exit_code == 0, parity.stderr
    before = validate("report", bundle, "-o", bundle / "page.html")
    assert before.exit_code == 0, before.stderr
    faults.in_graph(faults.brighter, "decoder")(bundle, "fp32")
    after = validate("report", bundle, "-o", bundle / "page.html")
    assert after.exit_code != 0
    assert "passed" not in after.stdout
    assert doctor(bundle).exit_code == 3  # the golden file is of the other manifest too


class TestDoctor:
    """Neither PyTorch nor a checkpoint is asked for."""

    @both_models
    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    def test_an_unbroken_bundle_draws_what_pytorch_drew(
        self, proven: Any, model: str, precision: str
    ) -> None:
        result = doctor(proven(model), "--precision", precision, "--json")
        assert result.exit_code == 0, result.output
        checks = json.loads(result.stdout)["checks"]
        assert {one["steps"] for one in checks} >= {"1", "2", "teacher"}
        assert all(one["images"] == 8 for one in checks)

    @ci_model
    def test_a_sampler_that_is_wrong_where_it_is_deployed_fails(
        self, proven: Any, monkeypatch: pytest.MonkeyPatch, model: str
    ) -> None:
        bundle = proven(model)  # before the fault
        without_noise(monkeypatch)
        result = doctor(bundle)
        assert result.exit_code == 3, result.output
        assert "steps: 2" in result.stderr
