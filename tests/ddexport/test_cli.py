"""The command line: results on stdout, messages in two lines on stderr, exit codes 0, 1, 2 and 3."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from ddexport.cli import main
from ddexport.recipe import Recipe, recipe_names
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import BundleError, DDError

ROOT = Path(__file__).parents[2]
Run = Callable[..., Result]


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="ddexport")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def failure(result: Result, code: int = 1) -> str:
    """What a user reads: exactly what went wrong and what to do, in two lines after the stages."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-2].startswith("error: ")
    assert lines[-1].startswith("hint: ")
    assert "Traceback" not in result.stderr
    return "\n".join(lines[-2:])


@pytest.fixture
def onnx(golden_dir: Path, tmp_path: Path) -> Run:
    """onnx(...): `ddexport onnx` of the golden recipe into tmp_path/out/b; later options win."""

    def run(*arguments: object) -> Result:
        files = ("--checkpoint", golden_dir / "student.pth", "--vae", golden_dir / "vae.pth")
        return invoke("onnx", golden_dir / "recipe.yaml", *files, "-o", tmp_path / "out" / "b", *arguments)

    return run


def commands(group: click.Group = main, words: str = "") -> dict[str, click.Command]:
    """Every command by its words, `validate parity`; groups too, `ddexport` itself as an empty text."""
    context, found = click.Context(group), {words: group}
    for name in group.list_commands(context):
        command, path = group.get_command(context, name), f"{words} {name}".strip()
        found |= commands(command, path) if isinstance(command, click.Group) else {path: command}
    return found


COMMANDS = commands()


class TestHelp:
    @pytest.mark.parametrize("words", COMMANDS)
    def test_every_command_has_a_whole_help(self, words: str) -> None:
        """Nothing is cut, no type shows its Python side, every option and argument is explained, and examples
        that follow each other do not write to the same place."""
        text = invoke(*words.split(), "--help").stdout
        assert not re.search(r"\w[ ,]?\.\.\.$|INTEGER|FLOAT|TEXT|RANGE|DIRECTORY|x[<>]=", text, re.M)
        assert all(getattr(parameter, "help", None) for parameter in COMMANDS[words].params)
        examples = text.partition("Examples:\n")[2].replace("\\\n", "").splitlines()
        lines = [shlex.split(example) for example in examples]
        default = {"onnx": lambda line: f"build/{line[2]}", "sample": lambda line: "out.png"}.get(words)
        named = [[b for a, b in pairwise(line) if a in ("-o", "--shards")] for line in lines]
        places = [(place or [default(line)])[0] for line, place in zip(lines, named, strict=True) if default]
        assert lines and len(set(places)) == len(places)

    def test_version_and_order(self) -> None:
        """Commands are listed in the order in which a user meets them."""
        assert invoke("--version").stdout.startswith("ddexport, version ")
        names = [
            "models",
            "onnx",
            "trt",
            "inspect",
            "sample",
            "serve",
            "web",
            "triton",
            "doctor",
            "validate",
            "distill",
            "bench",
            "push",
        ]
        assert main.list_commands(click.Context(main)) == names


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A working directory with one bundle, what an export has not finished, and other directories."""
    monkeypatch.chdir(tmp_path)
    for place in ("build/one", "build/.two.part", "build/empty", "here", "build/here"):
        Path(place).mkdir(parents=True)
    for place in ("build/one", "build/.two.part"):
        Path(place, "bundle.json").touch()


class TestNames:
    """The words of a command line as a user would type them; `tests/test_wording.py` has the mistakes."""

    @pytest.mark.parametrize("words", ["digits-var", "--model digits-var", "DIGITS-VAR --model DIGITS-VAR"])
    def test_a_model(self, words: str, monkeypatch: pytest.MonkeyPatch, build: None) -> None:
        """As an argument or an option, in any case."""
        asked = []

        def export_bundle(recipe: Recipe, target: Path, *_: object, **__: object) -> None:
            asked.append((recipe.name, target))
            raise DDError("this is enough", "for a test")

        monkeypatch.setattr("ddexport.export.export_bundle", export_bundle)
        assert "this is enough" in failure(invoke("onnx", *words.split()))
        assert asked == [("digits-var", Path("build/digits-var"))]

    @pytest.mark.parametrize("words", [w for w, c in COMMANDS.items() if "bundle" in str(c.params[:1])])
    def test_a_bundle(self, words: str, build: None, capsys: pytest.CaptureFixture[str]) -> None:
        """Left out it is the only one under build/, which is named on stderr; doctor alone needs none. A name
        is found there, unless it is a bundle here."""

        def bundle(*given: str) -> object:
            parameters = COMMANDS[words].make_context(words, list(given)).params
            return parameters["bundle"] if "bundle" in parameters else parameters["bundles"][0]

        assert bundle() == (None if words == "doctor" else Path("build/one"))
        assert capsys.readouterr().err == ("" if words == "doctor" else "bundle: build/one\n")
        for given, found in (("one", "build/one"), ("build/one",) * 2, ("here",) * 2, ("a/b",) * 2):
            assert bundle(given) == Path(found)
        Path("one").mkdir()
        assert bundle("one") == Path("build/one")
        Path("one/bundle.json").touch()
        assert bundle("one") == Path("one")
        for absent in ("two", "build/two"):
            with pytest.raises(BundleError):
                bundle(absent)
        assert capsys.readouterr().err == ""

    def test_a_directory_that_is_no_bundle_gets_no_report(self, build: None) -> None:
        from ddexport.validate.options import report_directory

        assert report_directory(Path("here"), None) is None
        assert list(Path("here").iterdir()) == []
        assert report_directory(Path("build/one"), None) == Path("build/one/parity")

    def test_doctor_checks_the_only_bundle(self, build: None) -> None:
        assert "build/one has no parity/golden.npz" in failure(invoke("doctor", "--check"))


class TestModels:
    def test_torch_is_not_imported(self) -> None:
        code = "import sys; from ddexport.cli import main; main(['models'], standalone_mode=False)"
        subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)

    def test_table(self) -> None:
        """Family, parameters, image size, steps, published FID, and where the files come from."""
        result = invoke("models")
        for name in recipe_names():
            assert f"\n{name} " in result.stdout
        row = next(line for line in result.stdout.splitlines() if line.startswith("var-d16 "))
        for text in ("var_dd", "328.2 M", "256x256", "1, 2", "9.94 (1), 7.82 (2)"):
            assert text in row
        source = "student: microsoft/distilled_decoding VAR-DD/var-d16.pth (--checkpoint var-d16.pth)"
        assert source in result.stdout
        assert "student: ships with ddexport" in result.stdout


class TestInspect:
    def test_text(self, golden_bundle: Path) -> None:
        result = invoke("inspect", golden_bundle)
        assert result.exit_code == 0
        for text in (
            "var-dd-small: Golden VAR-DD checkpoint",
            "64x64, 10 classes",
            "30 positions of width 8; split 5: positions before it are entries of a codebook of 64",
            "2 steps    known 0, 5",
            "student: student.pth (checkpoint, ema)",
            "student.onnx",
            "in  latents   float32 [batch, 30, 8]",
            "out tokens    int64 [batch, 5]",
            "out image     float32 [batch, 3, 64, 64]",
            "hashes     all match",
        ):
            assert text in result.stdout, text

    def test_json_is_the_manifest(self, golden_bundle: Path) -> None:
        result = invoke("inspect", golden_bundle, "--json")
        assert json.loads(result.stdout) == json.loads(read_manifest(golden_bundle).to_json())

    def test_random_weights_and_published_figures(self, tiny) -> None:
        assert "random, seed 5: the images mean nothing" in invoke("inspect", tiny.bundle).stdout

    def test_damage(self, golden_bundle: Path, tmp_path: Path) -> None:
        """One bit of a graph; `--no-verify` says that it did not look."""
        shutil.copytree(golden_bundle, tmp_path, dirs_exist_ok=True)
        data = bytearray((tmp_path / "student.onnx").read_bytes())
        data[-1] ^= 1
        (tmp_path / "student.onnx").write_bytes(data)
        assert "SHA-256 of student.onnx" in failure(invoke("inspect", tmp_path))
        assert "hashes     not checked" in invoke("inspect", tmp_path, "--no-verify").stdout


class TestOnnx:
    def test_a_second_export(self, onnx: Run, replayed_trace: object) -> None:
        assert onnx().exit_code == 0
        assert "--force" in failure(onnx())
        assert onnx("--force").exit_code == 0

    def test_a_mismatch_is_exit_code_3(self, onnx: Run, replayed_trace: object, tmp_path: Path) -> None:
        """The replayed graphs hold the other copy of the weights."""
        assert "differs from the PyTorch module" in failure(onnx("--weights", "model"), code=3)
        assert list((tmp_path / "out").iterdir()) == []


# A shell's background jobs ignore Ctrl-C, and so do their children unless told otherwise.
COMMAND = """
import signal
from ddexport.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


class TestKilled:
    """The real command as its own process, stopped while it traces."""

    @pytest.mark.parametrize(
        ("number", "code"),
        [
            pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
            pytest.param(signal.SIGKILL, -signal.SIGKILL, id="kill -9", marks=pytest.mark.slow),
        ],
    )
    def test_while_tracing(self, golden_dir: Path, tmp_path: Path, number: int, code: int) -> None:
        options = ["--model", golden_dir / "recipe.yaml", "--checkpoint", golden_dir / "student.pth",
                   "--vae", golden_dir / "vae.pth", "-o", tmp_path / "b"]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "onnx", *map(str, options)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        try:
            assert process.stderr is not None
            while not process.stderr.readline().startswith("exporting"):
                assert process.poll() is None
            assert [(p.name[:3], p.suffix) for p in tmp_path.iterdir()] == [(".b.", ".part")]
            process.send_signal(number)
            text = process.stderr.read()
            assert process.wait(60) == code
        finally:
            process.kill()
            process.communicate()
        assert "Traceback" not in text
        assert ("interrupted" in text) == (number == signal.SIGINT)
        assert len(list(tmp_path.glob("*b*"))) == (number == signal.SIGKILL)  # the next export names it
