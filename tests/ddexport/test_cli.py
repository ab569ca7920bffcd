"""The command line: results on stdout, messages in two lines on stderr, exit codes 0, 1, 2 and 3."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from ddexport.cli import main
from ddexport.recipe import recipe_names
from ddexport.runtime.bundle import read_manifest

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

    def run(*arguments: object, student: Path | None = None) -> Result:
        files = ("--checkpoint", student or golden_dir / "student.pth", "--vae", golden_dir / "vae.pth")
        return invoke(
            "onnx", "--model", golden_dir / "recipe.yaml", *files, "-o", tmp_path / "out" / "b", *arguments
        )

    return run


class TestGroup:
    def test_every_command_is_listed_and_has_help(self) -> None:
        """In the order in which a user meets them, each with one line."""
        result = invoke("--help")
        assert result.exit_code == 0
        names = [line.split()[0] for line in result.stdout.split("Commands:")[1].splitlines() if line.strip()]
        names = names[: names.index("Examples:")] if "Examples:" in names else names
        assert names[:5] == ["models", "onnx", "trt", "inspect", "sample"]
        assert {"validate", "distill", "doctor"} <= set(names)
        for name in names:
            assert invoke(name, "--help").exit_code == 0, name

    def test_version(self) -> None:
        result = invoke("--version")
        assert result.exit_code == 0
        assert result.stdout.startswith("ddexport, version ")

    def test_an_unknown_command(self) -> None:
        result = invoke("onxn")
        assert result.exit_code == 2
        assert "No such command" in result.stderr


class TestModels:
    def test_table(self) -> None:
        """Family, parameters, image size, steps, published FID, and where the files come from."""
        result = invoke("models")
        assert result.exit_code == 0
        for name in recipe_names():
            assert f"\n{name} " in result.stdout
        row = next(line for line in result.stdout.splitlines() if line.startswith("var-d16 "))
        for text in ("var_dd", "328.2 M", "256x256", "1, 2", "9.94 (1), 7.82 (2)"):
            assert text in row
        source = "student: microsoft/distilled_decoding VAR-DD/var-d16.pth (--checkpoint var-d16.pth)"
        assert source in result.stdout
        assert "student: ships with ddexport" in result.stdout

    def test_json(self) -> None:
        rows = {row["name"]: row for row in json.loads(invoke("models", "--json").stdout)}
        assert sorted(rows) == recipe_names()
        assert rows["var-d24"]["parameters"] == 1_092_478_560
        assert rows["var-d20"]["published_fid"] == {"1": 9.55, "2": 7.33}
        assert rows["var-d16"]["steps"] == [1, 2, 3, 4, 6]


class TestInspect:
    def test_text(self, golden_bundle: Path) -> None:
        result = invoke("inspect", golden_bundle)
        assert result.exit_code == 0
        for text in (
            "var-dd-small: Golden VAR-DD checkpoint",
            "64x64, 10 classes",
            "30 positions of width 8; split 5: those before it are from a codebook of 64",
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

    def test_no_bundle(self, tmp_path: Path) -> None:
        assert "not a bundle" in failure(invoke("inspect", tmp_path))


class TestOnnx:
    def test_success(self, onnx: Run, replayed_trace: object, tmp_path: Path) -> None:
        """A summary on stdout, the stages by name on stderr."""
        result = onnx()
        assert result.exit_code == 0
        for text in ("student.onnx", "decoder.onnx", "MiB", "largest error against PyTorch"):
            assert text in result.stdout
        for text in ("loading weights", "exporting student.onnx", "comparing decoder.onnx with PyTorch"):
            assert text in result.stderr
        assert read_manifest(tmp_path / "out" / "b").weights.kind == "checkpoint"

    def test_json(self, onnx: Run, replayed_trace: object, tmp_path: Path) -> None:
        data = json.loads(onnx("--json").stdout)
        assert data["bundle"] == str(tmp_path / "out" / "b")
        assert [g["role"] for g in data["graphs"]] == ["student", "decoder"]
        assert all(e["relative"] <= 1e-4 for one in data["accuracy"].values() for e in one["errors"])

    def test_a_second_export(self, onnx: Run, replayed_trace: object) -> None:
        assert onnx().exit_code == 0
        assert "--force" in failure(onnx())
        assert onnx("--force").exit_code == 0

    def test_a_mismatch_is_exit_code_3(self, onnx: Run, replayed_trace: object, tmp_path: Path) -> None:
        """The replayed graphs hold the other copy of the weights."""
        assert "differs from the PyTorch module" in failure(onnx("--weights", "model"), code=3)
        assert list((tmp_path / "out").iterdir()) == []

    def test_random_weights_are_announced(
        self, tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def replay(module, spec, recipe, path, opset, metadata, weights=None):  # type: ignore[no-untyped-def]
            path.write_bytes((tiny.bundle / path.name).read_bytes())
            return [path]

        monkeypatch.setattr("ddexport.export.onnx_from_module", replay)
        recipe = tmp_path / "tiny.yaml"
        recipe.write_text(json.dumps(tiny.recipe.to_dict()))  # JSON is YAML
        result = invoke("onnx", "--model", recipe, "--random-weights", tiny.seed, "-o", tmp_path / "b")
        assert result.exit_code == 0
        assert f"random weights, seed {tiny.seed}: the images mean nothing" in result.stdout


class TestMistakes:
    """Each ends in two lines, with the right exit code, and leaves nothing."""

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path: Path) -> object:
        yield
        assert not (tmp_path / "out" / "b").exists()
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_missing_weights(self, tmp_path: Path) -> None:
        text = failure(invoke("onnx", "--model", "var-d16", "-o", tmp_path / "out" / "b"))
        for part in ("var-d16.pth", "microsoft/distilled_decoding", "--checkpoint", "--vae"):
            assert part in text

    def test_unknown_model(self) -> None:
        assert "did you mean var-d16?" in failure(invoke("onnx", "--model", "var-d61"))

    def test_unknown_key_in_a_recipe(self, golden_dir: Path, tmp_path: Path) -> None:
        path = tmp_path / "my.yaml"
        path.write_text((golden_dir / "recipe.yaml").read_text().replace("classes:", "clases:"))
        assert "unknown field `clases`" in failure(invoke("onnx", "--model", path, "--random-weights", 0))

    def test_both_files_and_random_weights(self, onnx: Run) -> None:
        result = onnx("--random-weights", 0)
        assert result.exit_code == 2
        assert "give one or the other" in result.stderr

    @pytest.mark.parametrize("opset", [0, 17, 24])
    def test_opset(self, onnx: Run, opset: int) -> None:
        assert "use 18 to 23" in failure(onnx("--opset", opset))

    def test_damaged_checkpoints(self, onnx: Run, golden_dir: Path, tmp_path: Path) -> None:
        """`families/test_checkpoint.py` has every way in which a file can be wrong."""
        assert "there is no file" in failure(onnx(student=tmp_path / "absent.pth"))
        path = tmp_path / "cut.pth"
        path.write_bytes((golden_dir / "student.pth").read_bytes()[:50_000])
        text = failure(onnx(student=path))
        assert "damaged or not a checkpoint (50,000 bytes)" in text and "download it again" in text

    def test_another_part(self, onnx: Run, golden_dir: Path) -> None:
        text = failure(onnx(student=golden_dir / "teacher.pth"))
        assert "this looks like the teacher of var-dd-small" in text

    def test_a_place_that_cannot_be_written(self, onnx: Run, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "cannot write" in failure(onnx("-o", tmp_path / "file" / "b"))

    def test_a_place_with_other_files(self, onnx: Run, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "holds other files" in failure(onnx("-o", tmp_path, "--force"))
        assert (tmp_path / "file").exists()


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


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: {k: (v * 20).round().int() for k, v in state.items()}, "int32"),
        (lambda state: {k: v > 0 for k, v in state.items()}, "bool"),
        (lambda state: {k: v.double() * 1e300 for k, v in state.items()}, "finite"),
        (lambda state: {k: v for k, v in state.items() if "blocks.1." not in k}, "blocks"),
        (lambda state: {"a": state, "b": {k: v + 1 for k, v in state.items()}}, "a, b"),
        (lambda state: LFS, "LFS"),
        (lambda state: b"<!DOCTYPE html><html></html>", "web page"),
    ],
    ids=["integers", "booleans", "float64", "a block less", "two copies", "LFS pointer", "web page"],
)
def test_a_checkpoint_that_cannot_be_used_is_refused_by_name(damage, words, golden_dir, tmp_path):
    """Before anything is traced; with exit code 0 a bundle of rubbish was written."""
    state = torch.load(golden_dir / "student.pth", weights_only=True)["trainer"]["ema_parameters"]
    damaged, path = damage(state), tmp_path / "x.pth"
    path.write_bytes(damaged) if isinstance(damaged, bytes) else torch.save(damaged, path)
    options = ("--vae", golden_dir / "vae.pth", "-o", tmp_path / "out")
    result = invoke("onnx", "--model", golden_dir / "recipe.yaml", "--checkpoint", path, *options)
    assert words in failure(result)
    assert not (tmp_path / "out").exists()
