"""The arrow between the packages, and what an import or a `--help` may cost."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
BESIDE = ("runtime", "validate", "recipes")  # folders that lie beside ddexport/, and are imported from it
Lint = Callable[[Path], subprocess.CompletedProcess[str]]
HEAVY = {
    "PIL", "matplotlib", "mlxtend", "numpy", "onnx", "onnxruntime", "onnxscript", "pandas", "safetensors",
    "scipy", "sklearn", "torch", "yaml",
}  # fmt: skip
BUILD_TIME = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "yaml", "mlxtend", "scipy")


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def lint_imports(tmp_path_factory: pytest.TempPathFactory) -> Lint:
    """lint_imports(config): in a tree of links as `make lint` has it, for it does not follow `__path__`."""
    program = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert program, "lint-imports is in the dev extra"
    tree = tmp_path_factory.mktemp("lint")
    (tree / "ddexport").mkdir()
    for path in (*(ROOT / "ddexport").iterdir(), *(ROOT / name for name in BESIDE)):
        (tree / "ddexport" / path.name).symlink_to(path)

    def run(config: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, "--no-logo", "--no-cache", "--config", str(config)],
            capture_output=True, text=True, cwd=tree, timeout=120, check=False,
        )  # fmt: skip

    return run


class TestArrow:
    def test_the_contracts_of_the_project_hold(self, lint_imports: Lint) -> None:
        """`runtime` <- `ddexport` <- `validate`, and a runtime without torch."""
        done = lint_imports(ROOT / "pyproject.toml")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "3 kept, 0 broken" in done.stdout

    def test_they_would_break(self, lint_imports: Lint, tmp_path: Path) -> None:
        """The checker sees the project's imports: the arrow turned round is refused."""
        config = tmp_path / "reversed.toml"
        config.write_text(
            '[tool.importlinter]\nroot_packages = ["ddexport"]\n'
            '[[tool.importlinter.contracts]]\nname = "reversed"\ntype = "layers"\n'
            'containers = ["ddexport"]\nlayers = ["runtime", "graph", "validate"]\n'
        )
        done = lint_imports(config)
        assert done.returncode == 1
        assert "reversed BROKEN" in done.stdout
        for importer, imported in (("validate", "graph"), ("validate", "runtime"), ("graph", "runtime")):
            assert f"ddexport.{importer} is not allowed to import ddexport.{imported}" in done.stdout


class TestOneName:
    """In site-packages there is `ddexport` alone: others have a `runtime` and a `validate` of their own."""

    def test_the_wheel_has_every_package(self) -> None:
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

    def test_nothing_is_imported_by_a_short_name(self) -> None:
        """It would be a second copy: an error that is caught under one name is not the other's."""
        short = re.compile(rf"^\s*(?:from|import)\s+(?:{'|'.join(BESIDE)})\b.*", re.M)
        assert short.search("    from runtime.errors import DDError") and short.search("import validate")
        assert not short.search("from ddexport.runtime import load") and not short.search("import runtimes")
        lines = {
            f"{path.relative_to(ROOT)}: {line.strip()}"
            for top in ("ddexport", "tests", *BESIDE) for path in (ROOT / top).rglob("*.py")
            for line in short.findall(path.read_text(encoding="utf-8"))
        }  # fmt: skip
        assert lines == set()


def command_modules() -> list[str]:
    return sorted({point.value.partition(":")[0] for point in entry_points(group="ddexport.commands")})


def command_lines() -> list[tuple[str, ...]]:
    """Every command and sub-command, as words behind `ddexport`."""
    from ddexport.cli import main

    def walk(command: click.Command, words: tuple[str, ...]) -> list[tuple[str, ...]]:
        if not isinstance(command, click.Group):
            return [words]
        context = click.Context(command)
        names = command.list_commands(context)
        below = [(name, command.get_command(context, name)) for name in names]
        return [words, *(line for name, sub in below if sub for line in walk(sub, (*words, name)))]

    return walk(main, ())


SHOW_HEAVY = "\nimport sys; print(sorted({name.partition('.')[0] for name in sys.modules}))"


class TestImports:
    @pytest.mark.parametrize(
        "module",
        ["ddexport", "ddexport.runtime", "ddexport.validate", "ddexport.cli", *command_modules()],
    )
    def test_nothing_heavy(self, module: str) -> None:
        done = python(f"import {module}{SHOW_HEAVY}")
        assert done.returncode == 0, done.stderr
        assert HEAVY & set(eval(done.stdout)) == set()

    @pytest.mark.parametrize("words", command_lines(), ids=lambda words: " ".join(words) or "ddexport")
    def test_nothing_heavy_for_help(self, words: tuple[str, ...]) -> None:
        """What keeps `--help` under half a second: torch alone takes two."""
        code = (
            "import sys; from ddexport.cli import main\n"
            "main(sys.argv[1:], prog_name='ddexport', standalone_mode=False)" + SHOW_HEAVY
        )
        done = python(code, *words, "--help")
        assert done.returncode == 0, done.stderr
        text, _, modules = done.stdout.rstrip().rpartition("\n")
        assert text.startswith("Usage: ddexport")
        assert HEAVY & set(eval(modules)) == set()


WITHOUT = (
    f"import sys; sys.modules.update(dict.fromkeys({BUILD_TIME!r}))\n"
    "from ddexport.cli import main; main(sys.argv[1:], prog_name='ddexport')"
)


class TestBaseInstall:
    """Without the extras, as `pip install ddexport` leaves it: bundles draw, the rest says what it needs."""

    @pytest.mark.parametrize("words", [["--help"], ["onnx", "--help"], ["--version"]])
    def test_help_and_version(self, words: list[str]) -> None:
        assert python(WITHOUT, *words).returncode == 0

    def test_a_bundle_is_inspected_and_drawn_from(self, golden_bundle: Path, tmp_path: Path) -> None:
        done = python(WITHOUT, "inspect", golden_bundle)
        assert done.returncode == 0, done.stderr
        done = python(WITHOUT, "sample", golden_bundle, "--label", "3", "-o", tmp_path / "out.png")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out.png").stat().st_size > 0

    @pytest.mark.parametrize(
        ("words", "extra"),
        [
            ("onnx --model digits-var", "export"),
            ("models", "export"),
            ("distill digits-var", "distill"),
            ("bench BUNDLE", "validate"),
            ("validate parity BUNDLE", "validate"),
            ("validate fid BUNDLE", "validate"),
            ("validate limits BUNDLE", "validate"),
            ("validate distilled digits-var", "distill"),
        ],
    )
    def test_what_needs_an_extra_names_it(self, words: str, extra: str, golden_bundle: Path) -> None:
        done = python(WITHOUT, *words.replace("BUNDLE", str(golden_bundle)).split())
        assert done.returncode == 1
        assert "needs" in done.stderr.splitlines()[-2]
        extras = (extra, "export")  # one of several is missing first
        assert any(f'pip install "ddexport[{name}]"' in done.stderr.splitlines()[-1] for name in extras)
        assert "Traceback" not in done.stderr
