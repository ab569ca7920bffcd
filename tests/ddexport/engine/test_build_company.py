"""Builders at the same time, and builders that are killed: nobody ever sees half an engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from ddexport.runtime.engines import read_engine
from ddexport.runtime.manifest import sha256_of

from ddexport.engine.cache import EngineCache
from ddexport.engine.module import TensorRT

PROGRAM = """
    import json, sys
    from pathlib import Path
    from ddexport.engine import build as build_module
    from ddexport.engine.cache import EngineCache
    from ddexport.engine.module import load_tensorrt
    from ddexport.engine.options import BuildOptions
    from ddexport.runtime.engines import Profile
    {before}
    built = build_module.build_engines(
        Path(sys.argv[1]), load_tensorrt("tensorrt-rtx"),
        BuildOptions(profiles=(Profile(1, 2, 4),), optimization_level=0),
        roles=("student",), cache=EngineCache(Path(sys.argv[2])),
    )
    print(json.dumps([item.origin for item in built]))
"""


def start(bundle: Path, cache: EngineCache, before: str = "") -> subprocess.Popen[str]:
    program = textwrap.dedent(PROGRAM).replace("{before}", textwrap.dedent(before))
    command = [sys.executable, "-c", program, str(bundle), str(cache.directory)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.tensorrt
@pytest.mark.parametrize("place", ["one bundle", "two bundles"])
def test_two_builders_at_once_build_once(
    toy_bundle: Any, rtx: TensorRT, cache: EngineCache, place: str
) -> None:
    """Protects against two processes that write the same files: the second takes what the first has built."""
    one = toy_bundle("one")
    two = one if place == "one bundle" else toy_bundle("two")
    # Each says when it is about to build, and then takes its time, so that they really meet.
    slow = """
        import time
        plain = build_module.build_plan
        def slowly(*arguments):
            time.sleep(1.5)
            return plain(*arguments)
        build_module.build_plan = slowly
    """
    processes = [start(one, cache, slow), start(two, cache, slow)]
    origins = [json.loads(process.communicate(timeout=120)[0])[0] for process in processes]
    assert sorted(origins) == ["built", "kept" if place == "one bundle" else "cache"]
    for folder in (one, two):
        (sidecar,) = (folder / "engines").rglob("*.json")
        engine = read_engine(folder, sidecar)
        assert sha256_of(sidecar.with_suffix(".plan")) == engine.sha256
    assert cache.leftovers() == [] and len(cache.entries()[0]) == 1


@pytest.mark.tensorrt
@pytest.mark.parametrize("moment", ["building", "storing", "between plan and sidecar"])
def test_a_killed_builder_harms_nobody(
    toy_bundle: Any, build: Any, cache: EngineCache, tmp_path: Path, moment: str
) -> None:
    """Protects against half-written engines: the next build cleans up, waits for no lock, and succeeds."""
    folder, ready = toy_bundle(), tmp_path / "ready"
    halt = f"""
        import shutil, time
        from pathlib import Path
        from ddexport.engine import cache as cache_module
        def halt(*arguments):
            Path({str(ready)!r}).touch()
            time.sleep(600)
    """
    hook = {
        "building": """
            plain = build_module.build_plan
            def partly(*arguments):
                arguments[5].write_bytes(b"half a plan")
                halt()
            build_module.build_plan = partly
        """,
        "storing": """
            def partly(source, target):
                Path(target).write_bytes(b"half a plan")
                halt()
            cache_module.shutil.copyfile = partly
        """,
        "between plan and sidecar": "build_module._write_text = halt\n",
    }[moment]
    process = start(folder, cache, textwrap.dedent(halt) + textwrap.dedent(hook))
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    finally:
        process.kill()
        process.communicate()
    assert not list((folder / "engines").rglob("*.json"))  # nothing that the runtime would load
    (item,) = build(folder, roles=("student",))
    assert item.origin == ("cache" if moment == "between plan and sidecar" else "built")
    assert sha256_of(item.plan) == item.engine.sha256
    assert {path.name for path in (folder / "engines").rglob("*") if path.is_file()} <= {
        ".lock",
        "student_fp16.plan",
        "student_fp16.json",
    }
    assert cache.leftovers() == [] and len(cache.entries()[0]) == 1
