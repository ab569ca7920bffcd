"""What is in the wheel, and what an import or a `--help` may cost.

`make lint` checks the arrow, and finds an import by a short name, as `runtime.errors`: mypy does not know it.
`.ci/run` tries the wheel in an environment of its own.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

from tests.runtime import toy

ROOT = Path(__file__).parents[1]
BESIDE = ("runtime", "validate", "recipes")  # folders that lie beside ddexport/, and are imported from it
HEAVY = (
    "PIL", "fastapi", "matplotlib", "mlxtend", "numpy", "onnx", "onnxruntime", "onnxscript", "pandas",
    "prometheus_client", "safetensors", "scipy", "sklearn", "torch", "uvicorn", "yaml",
)  # fmt: skip
BUILD_TIME = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "yaml", "mlxtend", "scipy")


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip


def test_the_wheel_has_every_package() -> None:
    """A folder that is not listed would be missing in the wheel, though a checkout has it."""
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^\[tool\.setuptools\]\npackages = (\[.*?\])", config, re.M | re.S)
    assert listed
    folders = [
        path.parent.relative_to(ROOT).parts
        for top in ("ddexport", *BESIDE) for path in (ROOT / top).rglob("__init__.py")
    ]  # fmt: skip
    names = [".".join(parts if parts[0] == "ddexport" else ("ddexport", *parts)) for parts in folders]
    assert sorted(ast.literal_eval(listed[1])) == sorted(names)
    for name in BESIDE:
        assert f'"ddexport.{name}" = "{name}"' in config


LIGHT = f"""
import importlib, json, sys
import click

def heavy():
    return sorted(set({HEAVY!r}) & {{name.partition(".")[0] for name in sys.modules}})

for module in ["ddexport", "ddexport.runtime", "ddexport.validate", "ddexport.cli", *sys.argv[1:]]:
    importlib.import_module(module)
    assert not heavy(), (module, heavy())

from ddexport.cli import main

def walk(command, words):
    yield words
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from walk(command.get_command(context, name), [*words, name])

lines = list(walk(main, []))
for words in lines:
    main([*words, "--help"], prog_name="ddexport", standalone_mode=False)
    assert not heavy(), (words, heavy())
print(json.dumps(lines))
"""


def test_nothing_heavy_is_imported_for_a_command_and_its_help() -> None:
    """What keeps `--help` under half a second: torch alone takes two."""
    modules = {point.value.partition(":")[0] for point in entry_points(group="ddexport.commands")}
    done = python(LIGHT, *sorted(modules))
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout.splitlines()[-1])
    assert len(lines) > 10 and ["validate", "parity"] in lines and done.stdout.count("Usage: ") == len(lines)
    assert "'numpy'" in python("import numpy" + LIGHT).stderr  # it would be seen


def test_what_needs_an_extra_names_it(tmp_path: Path) -> None:
    """Without the extras, as `pip install ddexport` leaves it: what to install, and no traceback."""
    bundle = toy.write_bundle(tmp_path / "bundle")
    without = (
        f"import sys; sys.modules.update(dict.fromkeys({BUILD_TIME!r}))\n"
        "from ddexport.cli import main; main(sys.argv[1:], prog_name='ddexport')"
    )
    assert python(without, "--version").returncode == 0
    for words, extra in (
        ("onnx --model digits-var", "export"),
        ("distill digits-var", "distill"),
        (f"bench {bundle}", "validate"),
        (f"validate parity {bundle}", "validate"),
        (f"validate fid {bundle}", "validate"),
        (f"validate limits {bundle}", "validate"),
        ("validate distilled digits-var", "distill"),
        (f"triton {bundle}", "export"),
    ):
        done = python(without, *words.split())
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        extras = (extra, "export")  # one of several is missing first
        hint = done.stderr.splitlines()[-1]
        assert any(f'pip install "ddexport[{name}]"' in hint for name in extras), (words, done.stderr)
