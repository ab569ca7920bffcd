"""The branch of full TensorRT, with TensorRT-RTX under its name: see full.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddexport.engine.module import TensorRT
from ddexport.runtime import machine
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.engines import find_engines, fit
from ddexport.runtime.machine import Gpu


@pytest.mark.tensorrt
def test_full_tensorrt_gets_what_is_asked_for(
    toy_bundle: Any, rtx: TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strong typing, TF32 off, the wider engines, and no kernel times measured on another GPU. The runtime
    takes the engines of this machine without a remark."""
    folder, timing = toy_bundle(), tmp_path / "timing"
    program = [sys.executable, str(Path(__file__).with_name("full.py")), str(folder), str(timing)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    result, log = json.loads(done.stdout), done.stderr
    place = "engines/tensorrt-11.4.0.106-sm90/student_fp16.plan"
    assert [result[name] for name in ("plain", "wide", "same")] == [f"built {place}"] * 2 + [f"kept {place}"]
    assert "Flags                  | [STRONGLY_TYPED]" in log and "[TF32, STRONGLY_TYPED]" in log
    assert "[WORKSPACE: 1024.00 MiB" in log and "setHardwareCompatibilityLevel() is unsupported" in log
    assert timing.exists() and not list(tmp_path.glob(".*.part"))
    refused = {
        "compatible": ("BuildError", "libnvinfer_lean"),  # which TensorRT-RTX lacks
        "other GPU": ("BuildError", "timing cache"),
        "both": ("ModuleError", "tensorrt-rtx"),
    }
    for name, (kind, word) in refused.items():
        assert result[name][0] == kind and word in result[name][1], result[name]
    here, there = Gpu(0, "NVIDIA Test 9000", (9, 0), 1), Gpu(0, "NVIDIA H100", (9, 0), 1)
    monkeypatch.setitem(sys.modules, "tensorrt", type("package", (), {"__version__": "11.4.0.106"}))
    ((engines,), errors), manifest = find_engines(folder), read_manifest(folder)
    assert not errors and engines.engines["student", None].hardware == "ampere+"
    words = ("Test 9000", "H100", "13.0", "12.8")
    for gpu, driver, remarks in ((here, (13, 0), ()), (there, (12, 8), words)):
        monkeypatch.setattr(machine, "cuda", lambda gpu=gpu, driver=driver: machine.Cuda((gpu,), driver, ""))
        reason, note, fits = fit(folder, manifest, engines)
        assert (reason, bool(note), fits) == ("", bool(remarks), True)
        assert all(word in note for word in remarks)
