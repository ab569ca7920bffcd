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
# Says at the end which files of ours are there twice, how many error classes there are, and what was imported.
HOOK = f"""
import atexit, collections, json, sys

@atexit.register
def tell():
    modules = [(n, m) for n, m in sys.modules.items() if str(getattr(m, "__file__", None)).startswith({str(ROOT)!r})]
    names = collections.defaultdict(list)
    for name, module in modules:
        if ".venv" not in module.__file__:
            names[module.__file__].append(name)
    errors = {{id(m.__dict__["DDError"]) for _, m in modules if "DDError" in m.__dict__}}
    twice = [both for both in names.values() if len(both) > 1]
    print(json.dumps([twice, len(errors), sorted({{n.partition(".")[0] for n in sys.modules}})]), file=sys.stderr)
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


@pytest.mark.parametrize(
    "words",
    [
        ("runtime/infer.py", "BUNDLE", "-o", "OUT"),
        ("-m", "ddexport.runtime.infer", "BUNDLE", "-o", "OUT"),
        ("-m", "validate", "--help"),
        ("-m", "validate", "parity", "nowhere"),
        (Path(sys.executable).with_name("ddexport"), "sample", "BUNDLE", "-o", "OUT"),
        (Path(sys.executable).with_name("ddexport"), "--help"),
    ],
    ids=lambda words: " ".join(map(str, words[:3])),
)
def test_no_entrance_brings_a_file_of_ours_in_twice(
    words: tuple[object, ...], shared_bundle: Path, tmp_path: Path
) -> None:
    """Else an error class caught under one name would not be the other's."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    places = {"BUNDLE": shared_bundle, "OUT": tmp_path / "out.png"}
    done = python(*(places.get(str(word), word) for word in words), cwd=ROOT, path=tmp_path)
    assert done.returncode == ("nowhere" in words), done.stderr
    twice, errors, _ = json.loads(done.stderr.splitlines()[-1])
    assert (twice, errors) == ([], 1)
    assert (tmp_path / "out.png").exists() == ("OUT" in words)
    assert ("error: not a bundle: nowhere" in done.stderr) == ("nowhere" in words)


def test_everything_works_without_the_build_time_packages(shared_bundle: Path, tmp_path: Path) -> None:
    code = (
        BLOCKER
        + """
from ddexport import runtime
from ddexport.runtime.infer import command
with runtime.load(sys.argv[1]) as pipe:
    assert len(pipe(["zero", 2], steps=2).images) == 2
command([sys.argv[1], "--steps", "2", "--dump", "dump.npz"])
"""
    )
    done = python("-c", code, shared_bundle, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").exists() and (tmp_path / "dump.npz").exists()


def test_the_names_of_the_package_and_nothing_heavy_before_they_are_used(tmp_path: Path) -> None:
    code = """
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
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words", [("-c", "import ddexport.runtime"), (ROOT / "runtime" / "infer.py", "--help")]
)
def test_import_and_help_take_less_than_half_a_second(words: tuple[object, ...], tmp_path: Path) -> None:
    """The best of several runs: the limit is for the code, not for a busy machine."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert python(*words, cwd=tmp_path).returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_the_script_runs_from_anywhere_without_an_installation(shared_bundle: Path, tmp_path: Path) -> None:
    """A file of the working directory or of the script's own must not pass for another module; without
    site-packages but for those that it needs."""
    for name in ("ddexport.py", "runtime.py", "labels.py", "click.py"):
        (tmp_path / name).write_text("raise RuntimeError('wrong module')")
    script = ROOT / "runtime" / "infer.py"
    done = python(script, shared_bundle, "--label", "one", cwd=tmp_path, path=None)
    assert done.returncode == 0, done.stderr
    assert "1 image in 1 step" in done.stdout
    code = f"""
import runpy, sys
sys.argv, sys.path[0] = ['infer.py', '--help'], {str(ROOT / "runtime")!r}
try:
    runpy.run_path({str(script)!r}, run_name='__main__')
except SystemExit:
    assert {str(ROOT / "runtime")!r} not in sys.path and {str(ROOT)!r} == sys.path[0], sys.path
"""
    done = python("-c", code, cwd=tmp_path, path=None)
    assert done.returncode == 0, done.stderr
