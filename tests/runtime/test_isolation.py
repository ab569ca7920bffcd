"""The runtime lives without the build time: no torch, no onnx, no import that anyone has to wait for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BLOCKER = """
import sys

class Blocker:
    blocked = {"torch", "onnx", "onnxscript", "ddexport", "validate", "yaml", "safetensors"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def python(
    *arguments: object, cwd: Path, path: Path | None = ROOT, blocked: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs Python, with the source tree on its path or not; `blocked` runs code behind the blocker."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    words = [str(argument) for argument in arguments]
    if blocked:
        words = ["-c", BLOCKER + words[0], *words[1:]]
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_everything_works_without_the_build_time_packages(shared_bundle: Path, tmp_path: Path) -> None:
    code = """
from ddexport import runtime
from ddexport.runtime.infer import command
with runtime.load(sys.argv[1]) as pipe:
    assert len(pipe(["zero", 2], steps=2).images) == 2
command([sys.argv[1], "--steps", "2", "--dump", "dump.npz"])
"""
    done = python(code, shared_bundle, cwd=tmp_path, blocked=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").exists()
    assert (tmp_path / "dump.npz").exists()


def test_importing_the_runtime_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, runtime, runtime.infer, runtime.manifest, runtime.registry\n"
        "print([name for name in ('numpy', 'PIL', 'onnxruntime', 'torch') if name in sys.modules])"
    )
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "[]"


def test_the_names_of_the_package_are_there(tmp_path: Path) -> None:
    code = (
        "from ddexport import runtime\n"
        "from ddexport.runtime.pipeline import load, Pipeline\n"
        "assert runtime.load is load and runtime.Pipeline is Pipeline\n"
        "assert issubclass(runtime.DDError, Exception) and runtime.__version__\n"
        "assert set(runtime.__all__) >= {'load', 'Pipeline', 'DDError'}\n"
        "assert not hasattr(runtime, 'laod')"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [("-c", "import runtime"), (ROOT / "runtime" / "infer.py", "--help")])
def test_import_and_help_take_less_than_half_a_second(arguments: tuple[object], tmp_path: Path) -> None:
    """The best of several runs: the limit is for the code, not for a busy machine."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert python(*arguments, cwd=tmp_path).returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_the_script_runs_from_anywhere_without_an_installation(shared_bundle: Path, tmp_path: Path) -> None:
    """A file of the working directory or of the script's own must not pass for another module."""
    for name in ("runtime.py", "labels.py", "click.py"):
        (tmp_path / name).write_text("raise RuntimeError('wrong module')")
    done = python(ROOT / "runtime" / "infer.py", shared_bundle, "--label", "one", cwd=tmp_path, path=None)
    assert done.returncode == 0, done.stderr
    assert "1 image in 1 step" in done.stdout
    code = (
        f"import runpy, sys\nsys.argv = ['infer.py', '--help']\nsys.path[0] = {str(ROOT / 'runtime')!r}\n"
        + (
            f"try:\n    runpy.run_path({str(ROOT / 'runtime' / 'infer.py')!r}, run_name='__main__')\n"
            "except SystemExit:\n    pass\n"
            f"assert {str(ROOT / 'runtime')!r} not in sys.path and {str(ROOT)!r} == sys.path[0], sys.path"
        )
    )
    done = python("-c", code, cwd=tmp_path, path=None)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_and_reports_errors_in_two_lines(tmp_path: Path) -> None:
    done = python("-m", "ddexport.runtime.infer", tmp_path / "nothing", cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: not a bundle")
    assert done.stderr.count("\n") == 2
