"""The runtime lives without the build time, is there once under one name, and is imported in no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Says at the end which files of ours are there twice, and how many error classes there are.
HOOK = f"""
import atexit, json, sys

@atexit.register
def tell():
    modules = {{id(m): m for m in sys.modules.values() if {str(ROOT)!r} in str(getattr(m, "__file__", ""))}}
    ours = {{key: m for key, m in modules.items() if ".venv" not in m.__file__}}
    files = [m.__file__ for m in ours.values()]
    errors = {{id(m.__dict__["DDError"]) for m in ours.values() if "DDError" in m.__dict__}}
    print(json.dumps([sorted({{f for f in files if files.count(f) > 1}}), len(errors)]), file=sys.stderr)
"""
BLOCKER = """
import sys

class Blocker:
    blocked = {"torch", "onnx", "onnxscript", "validate", "yaml", "safetensors"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked or name.startswith("ddexport.validate"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def python(*arguments: object, cwd: Path, path: Path | None = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


COMMAND = Path(sys.executable).with_name("ddexport")
ENTRANCES: list[tuple[object, ...]] = [
    ("runtime/infer.py", "BUNDLE", "-o", "OUT"),
    ("-m", "ddexport.runtime.infer", "BUNDLE", "-o", "OUT"),
    ("-m", "validate", "--help"),
    ("-m", "validate", "parity", "nowhere"),
    (COMMAND, "sample", "BUNDLE", "-o", "OUT"),
    (COMMAND, "--help"),
]


@pytest.mark.parametrize("words", ENTRANCES, ids=lambda words: " ".join(map(str, words[:3])))
def test_no_entrance_brings_a_file_of_ours_in_twice(
    words: tuple[object, ...], shared_bundle: Path, tmp_path: Path
) -> None:
    """Else an error class caught under one name would not be the other's."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    places = {"BUNDLE": shared_bundle, "OUT": tmp_path / "out.png"}
    done = python(*(places.get(str(word), word) for word in words), cwd=ROOT, path=tmp_path)
    assert done.returncode == ("nowhere" in words), done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == [[], 1]
    assert (tmp_path / "out.png").exists() == ("OUT" in words)
    assert ("error: not a bundle: nowhere" in done.stderr) == ("nowhere" in words)
    if words[-1] == "--help":  # what would be seen
        done = python("-c", "import runtime.errors, ddexport.runtime.errors", cwd=ROOT, path=tmp_path)
        files = [str(ROOT / "runtime" / name) for name in ("__init__.py", "errors.py")]
        assert json.loads(done.stderr) == [files, 2]


WITHOUT_BUILD_TIME = """
from ddexport import runtime
from ddexport.runtime.infer import command
with runtime.load(sys.argv[1]) as pipe:
    assert len(pipe(["zero", 2], steps=2).images) == 2
command([sys.argv[1], "--steps", "2", "--dump", "dump.npz"])
"""
NAMES = """
import sys, ddexport, ddexport.runtime.cli, ddexport.runtime.doctor, ddexport.runtime.registry
from ddexport import runtime
assert not {"numpy", "PIL", "msgspec", "onnxruntime", "torch"} & set(sys.modules)
from ddexport.runtime.errors import DDError
from ddexport.runtime.pipeline import Pipeline, load
for package in (ddexport, runtime):
    assert (package.load, package.Pipeline, package.DDError) == (load, Pipeline, DDError)
    assert package.__version__ and set(package.__all__) == {"load", "Pipeline", "DDError", "__version__"}
    assert not hasattr(package, "laod")
"""


@pytest.mark.parametrize("code", [BLOCKER + WITHOUT_BUILD_TIME, NAMES], ids=["works", "names"])
def test_the_runtime_alone(code: str, shared_bundle: Path, tmp_path: Path) -> None:
    """Everything works without the build-time packages; its names are there, and nothing heavy is imported
    before they are used."""
    done = python("-c", code, shared_bundle, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = [path.name for path in tmp_path.iterdir()]
    assert sorted(written) == (["dump.npz", "out.png"] if "command(" in code else [])


@pytest.mark.parametrize("words", [("-c", "import ddexport"), (ROOT / "runtime" / "infer.py", "--help")])
def test_import_and_help_take_less_than_half_a_second(words: tuple[object, ...], tmp_path: Path) -> None:
    """The best of several runs: the limit is for the code, not for a busy machine."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert python(*words, cwd=tmp_path).returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_the_script_runs_from_anywhere(shared_bundle: Path, tmp_path: Path) -> None:
    """A file of the working directory or of the script's own must not pass for another module."""
    for name in ("ddexport.py", "runtime.py", "labels.py", "click.py"):
        (tmp_path / name).write_text("raise RuntimeError('wrong module')")
    script = ROOT / "runtime" / "infer.py"
    done = python(script, shared_bundle, "--label", "one", cwd=tmp_path, path=None)
    assert (done.returncode, done.stdout[:26]) == (0, "out.png: 1 image in 1 step"), done.stderr
    code = f"""
import runpy, sys
sys.argv, sys.path[0] = ['infer.py', '--help'], {str(script.parent)!r}
try:
    runpy.run_path({str(script)!r}, run_name='__main__')
except SystemExit:
    assert {str(script.parent)!r} not in sys.path and {str(ROOT)!r} == sys.path[0], sys.path
"""
    assert python("-c", code, cwd=tmp_path, path=None).returncode == 0
