"""Run as a program: builds with what calls itself full TensorRT, and is TensorRT-RTX with a GPU made up.

Full TensorRT needs a GPU, and Polygraphy takes one package a process. TensorRT-RTX 1.7 has the names of
TensorRT 11.4 that a build uses, so that the configuration is a real one; it ignores what only the other has.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import tensorrt_rtx

from ddexport.engine.build import build_engines
from ddexport.engine.module import load_tensorrt
from ddexport.engine.options import BuildOptions
from ddexport.runtime import machine
from ddexport.runtime.engines import Profile
from ddexport.runtime.errors import DDError

folder, timing = map(Path, sys.argv[1:])
package: Any = ModuleType("tensorrt")
package.__dict__.update(vars(tensorrt_rtx) | {"__version__": "11.4.0.106"})
sys.modules["tensorrt"] = package
machine.cuda = lambda: machine.Cuda((machine.Gpu(0, "NVIDIA Test 9000", (9, 0), 1),), (13, 0), "")
logging.basicConfig(level="INFO", stream=sys.stderr)
result: dict[str, Any] = {}


def attempt(name: str, call: Any) -> None:
    try:
        result[name] = call()
    except DDError as error:
        result[name] = [type(error).__name__, error.message]


def build(**options: Any) -> str:
    quick = {"profiles": (Profile(1, 2, 4),), "optimization_level": 0}
    # TensorRT-RTX cannot read the file of a second engine's kernel times without a GPU.
    roles = ("student",) if "timing_cache" in options else ()
    item, *_ = build_engines(folder, load_tensorrt(), BuildOptions(**quick | options), roles=roles)
    return f"{item.origin} {item.plan.relative_to(folder)}"


attempt("plain", build)
attempt("wide", lambda: build(hardware="ampere+", timing_cache=timing, workspace=1 << 30, tf32=True))
attempt("same", lambda: build(hardware="ampere+", timing_cache=timing, workspace=1 << 30, tf32=True))
attempt("compatible", lambda: build(version_compatible=True))
tensorrt_rtx.IBuilderConfig.set_timing_cache = lambda *_, ignore_mismatch: False
attempt("other GPU", lambda: build(timing_cache=timing, workspace=2 << 30))
attempt("both", lambda: load_tensorrt("tensorrt-rtx"))
sys.stdout.write(json.dumps(result))
