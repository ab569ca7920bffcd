"""The runtime lives without the build time, is there once under one name, and is imported in no time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT_BUILD_TIME = """
import sys

class Blocker:
    blocked = {"torch", "onnx", "onnxscript", "validate", "yaml", "safetensors"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked or name.startswith("ddexport.validate"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import ddexport, ddexport.runtime.cli, ddexport.runtime.doctor, ddexport.runtime.registry
from ddexport import runtime
assert not {"numpy", "PIL", "msgspec", "onnxruntime", "torch"} & set(sys.modules)
from ddexport.runtime.errors import DDError
from ddexport.runtime.infer import command
from ddexport.runtime.pipeline import Pipeline, load
for package in (ddexport, runtime):
    assert (package.load, package.Pipeline, package.DDError) == (load, Pipeline, DDError)
    assert package.__version__ and set(package.__all__) == {"load", "Pipeline", "DDError", "__version__"}
    assert not hasattr(package, "laod")
with runtime.load(sys.argv[1]) as pipe:
    assert len(pipe(["zero", 2], steps=2).images) == 2
command([sys.argv[1], "--steps", "2", "--dump", "dump.npz"])
"""


def python(*arguments: object, cwd: Path, path: Path | None = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_no_entrance_brings_an_error_class_in_twice(tmp_path: Path) -> None:
    """Else an error that is raised under one name would not be caught under the other."""
    for words in (("runtime/infer.py", "nowhere"), ("-m", "validate", "parity", "nowhere")):
        done = python(*words, cwd=ROOT)
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert len(lines) == 2 and lines[0].startswith("error: "), done.stderr


def test_the_runtime_alone(shared_bundle: Path, tmp_path: Path) -> None:
    """Everything works without the build-time packages; its names are there, and nothing heavy is imported
    before they are used."""
    done = python("-c", WITHOUT_BUILD_TIME, shared_bundle, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dump.npz", "out.png"]


def test_import_and_help_take_less_than_half_a_second(tmp_path: Path) -> None:
    """The best of several runs: the limit is for the code, not for a busy machine."""
    for words in (("-c", "import ddexport"), (ROOT / "runtime" / "infer.py", "--help")):
        for _ in range(5):
            start = time.perf_counter()
            assert python(*words, cwd=tmp_path).returncode == 0
            if (spent := time.perf_counter() - start) < 0.5:
                break
        assert spent < 0.5, words


def test_the_script_runs_from_anywhere(shared_bundle: Path, tmp_path: Path) -> None:
    """A file of the working directory or of the script's own must not pass for another module."""
    for name in ("ddexport.py", "runtime.py", "labels.py", "click.py"):
        (tmp_path / name).write_text("raise RuntimeError('wrong module')")
    script = ROOT / "runtime" / "infer.py"
    done = python(script, shared_bundle, "--label", "one", cwd=tmp_path, path=None)
    assert done.returncode == 0 and (tmp_path / "out.png").is_file(), done.stderr
    code = f"""
import runpy, sys
sys.argv, sys.path[0] = ['infer.py', '--help'], {str(script.parent)!r}
try:
    runpy.run_path({str(script)!r}, run_name='__main__')
except SystemExit:
    assert {str(script.parent)!r} not in sys.path and {str(ROOT)!r} == sys.path[0], sys.path
"""
    assert python("-c", code, cwd=tmp_path, path=None).returncode == 0
