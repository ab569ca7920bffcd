"""`ddexport sample`: what it writes, what it says, and that a failure changes nothing on disk."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ddexport import runtime
from ddexport.runtime import cli, console, files
from ddexport.runtime.errors import OutputError
from tests.runtime import toy


def sample(*arguments: object) -> Result:
    return CliRunner().invoke(cli.command, [str(argument) for argument in arguments])


def failed(result: Result) -> str:
    """The message of a run that had to end with a user's error, and nothing else on stderr."""
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 2 and result.stdout == ""
    return result.stderr


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    path = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(path)
    return path


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_the_defaults_just_work(shared_bundle: Path, folder: Path) -> None:
    """All classes of a small model in one picture, a few of a large one, and one line about it."""
    pipe: Any = SimpleNamespace(manifest=SimpleNamespace(classes=1000))
    assert cli._labels(None, (), pipe) == [0, 142, 285, 428, 570, 713, 856, 999]
    result = sample(shared_bundle)
    assert (result.exit_code, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    assert result.stdout.startswith("out.png: 3 images in 1 step")
    assert sample(shared_bundle, "--list-labels").stdout.split() == ["0", "zero", "1", "one", "2", "two"]
    assert json.loads(sample(shared_bundle, "--list-labels", "--json").stdout)["names"][2] == "two"
    assert listing(folder) == ["out.png"]
    assert Image.open("out.png").size == (3 * 128, 128)  # 8 x 8 pixels would not be seen


def test_the_picture_and_the_dump_have_what_the_pipeline_gives(shared_bundle: Path) -> None:
    """Rows are labels; numbers and names; every pixel of the image is one block of the picture."""
    words = ("--label", 2, "--label", "ZERO", "-n", 2, "--steps", 3, "--seed", 5, "--batch-size", 3)
    assert sample(shared_bundle, *words, "-o", "grid.png", "--dump", "dump.npz").exit_code == 0
    with runtime.load(shared_bundle) as pipe:
        result = pipe([2, 0], 3, seed=5, num_images=2, output="numpy")
    picture = np.asarray(Image.open("grid.png"))[8::16, 8::16]
    expected = np.reshape(result.images, (2, 2, 8, 8, 3)).swapaxes(1, 2).reshape(16, 16, 3)
    assert abs(np.subtract(picture, expected, dtype=int)).max() <= 1  # another batch size may round otherwise
    with np.load("dump.npz", allow_pickle=False) as dump:
        steps = [f"step{number}_{what}" for number in (1, 2, 3) for what in ("tokens", "sequence")]
        assert list(dump) == ["labels", "noise", *steps, "images"]
        assert dump["labels"].tolist() == [2, 2, 0, 0]
        np.testing.assert_array_equal(dump["noise"], result.noise)
        for number, step in enumerate(result.steps, 1):
            np.testing.assert_array_equal(dump[f"step{number}_tokens"], step.tokens)
            np.testing.assert_allclose(dump[f"step{number}_sequence"], step.sequence, atol=1e-5)
        assert (dump["images"].dtype, dump["images"].shape) == (np.uint8, (4, 8, 8, 3))
        assert abs(np.subtract(dump["images"], result.images, dtype=int)).max() <= 1


def test_a_directory_gets_one_file_per_image(shared_bundle: Path, folder: Path) -> None:
    """A name that ends in a slash or has no suffix, or a directory that exists, whatever its name."""
    (folder / "there.png").mkdir()
    names = ["00000-class0001.png", "00001-class0001.png", "00002-class0002.png", "00003-class0002.png"]
    words = ("--label", 1, "-n", 2, "--label", 2, "--batch-size", 3)
    for output in ("many/", "no_suffix", "there.png"):
        assert sample(shared_bundle, *words, "-o", output).exit_code == 0
        assert listing(folder / output) == names
        assert Image.open(folder / output / names[3]).size == (8, 8)


def test_json_reports_everything(bundle: Path) -> None:
    toy.change(bundle, lambda content: content.update(weights={"kind": "random", "seed": 7}))
    result = sample(bundle, "--json", "--label", 1, "-n", 2, "--device", "cpu", "-o", "a.jpg")
    assert result.stderr.startswith("warning: ") and "seed 7" in result.stderr
    report = json.loads(result.stdout)
    assert report.pop("seconds").keys() == {"load", "student", "decoder"}
    assert report == {
        "bundle": "toy", "output": "a.jpg", "images": 2, "labels": [1], "steps": 1, "seed": 0,
        "backend": "onnxruntime", "device": "cpu", "precision": "fp32", "random_weights": True,
        "decoder": "full", "decoder_cost": None,
    }  # fmt: skip
    assert Image.open("a.jpg").format == "JPEG"


def test_steps_teacher_and_its_options(shared_teacher_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them arrive: the dump has the tokens that the Python interface gives for the same request."""
    options = ("--steps", 3, "--teacher-start", 1, "--guidance-scale", 1.5, "--top-k", 3, "--top-p", 0.9)
    words = (*options, "--temperature", 2, "--seed", 7, "--dump", "d.npz", "--json")
    report = json.loads(sample(shared_teacher_bundle, *words).stdout)
    assert report["steps"] == 4  # another start than the schedule's
    assert report["seconds"].keys() == {"load", "student", "decoder", "teacher"}
    given = {"guidance_scale": 1.5, "top_k": 3, "top_p": 0.9, "temperature": 2.0}
    with runtime.load(shared_teacher_bundle) as pipe:
        wanted = pipe([0, 1, 2], 3, seed=7, teacher_start=1, **given)
    with np.load("d.npz") as dump:
        assert list(dump) == [
            "labels", "noise", "uniforms", "step1_tokens", "step1_sequence",
            "teacher_tokens", "teacher_sequence", "step2_tokens", "step2_sequence", "images",
        ]  # fmt: skip
        np.testing.assert_array_equal(dump["teacher_tokens"], wanted.steps[1].tokens)
        np.testing.assert_array_equal(dump["uniforms"], wanted.uniforms)
    # The bar advances with every pass of the teacher, not only with every batch.
    passes: list[int] = []
    monkeypatch.setattr(console.Progress, "advance", lambda self, count=1: passes.append(count))
    line = sample(shared_teacher_bundle, "--steps", "teacher").stdout
    assert "3 images in 4 steps" in line and "student" not in line
    assert passes == [3] * 4


def test_a_dump_can_be_replayed(shared_bundle: Path, shared_teacher_bundle: Path) -> None:
    """Its labels, noise and uniform numbers give its arrays again, without a seed; steps without a teacher
    leave the uniform numbers alone, and noise without labels goes with those given."""
    for root, steps in ((shared_bundle, 2), (shared_teacher_bundle, "teacher")):
        sample(root, "--steps", steps, "--seed", 8, "-n", 2, "--dump", "one.npz")
        result = sample(root, "--steps", steps, "--noise", "one.npz", "--dump", "two.npz", "--json")
        assert json.loads(result.stdout)["seed"] is None
        with np.load("one.npz") as one, np.load("two.npz") as two:
            assert list(one) == list(two)
            for name in one:
                np.testing.assert_allclose(one[name], two[name], atol=1e-5)
    assert sample(shared_teacher_bundle, "--steps", 1, "--noise", "one.npz").exit_code == 0
    noise = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    words = ("--noise", save(Path("noise.npz"), noise=noise), "--label", 1, "-n", 2, "--dump", "d.npz")
    assert sample(shared_bundle, *words).exit_code == 0
    with np.load("d.npz") as dump:
        assert dump["labels"].tolist() == [1, 1]
        np.testing.assert_array_equal(dump["noise"], noise)


def claims_too_much(path: Path) -> None:
    """A file of a few bytes whose header asks for terabytes."""
    header = io.BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 6, 4)}
    np.lib.format.write_array_header_1_0(header, description)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("noise.npy", header.getvalue())


GOOD = np.zeros((3, 6, 4), np.float32)
BAD_NOISE: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "does not exist"),
    (lambda path: path.write_bytes(b"noise"), "cannot be read"),
    (lambda path: np.save(path.open("wb"), GOOD), "cannot be read"),
    (lambda path: save(path, nose=GOOD), "nose"),
    (lambda path: save(path, noise=GOOD[0]), "3 dimensions"),
    (lambda path: save(path, noise=GOOD.astype(float)), "float64"),
    (lambda path: save(path, noise=np.array([None])), "object"),
    (claims_too_much, "(1099511627776, 6, 4)"),
    (lambda path: save(path, noise=GOOD[:, :5]), "(3, 5, 4)"),
    (lambda path: save(path, noise=np.concatenate([GOOD, GOOD])), "(6, 6, 4)"),
    (lambda path: save(path, noise=GOOD + np.inf), "inf at (0, 0, 0)"),
    (lambda path: save(path, noise=GOOD, labels=np.zeros(3)), "`labels`"),
    (lambda path: save(path, noise=GOOD, labels=[1, 2]), "2 labels"),
    (lambda path: save(path, noise=GOOD[:1], labels=[3]), "label 3"),
    (lambda path: save(path, noise=GOOD, uniforms=GOOD[0]), "`uniforms`"),
]


def test_bad_noise_is_explained(shared_bundle: Path, folder: Path) -> None:
    for make, named in BAD_NOISE:
        (folder / "noise.npz").unlink(missing_ok=True)
        make(folder / "noise.npz")
        assert named in failed(sample(shared_bundle, "--noise", "noise.npz"))
    assert listing(folder) == ["noise.npz"]


# Bad input loses nothing


BAD_OPTIONS: list[tuple[tuple[object, ...], str]] = [
    (("--label", "tow"), "'two' (class 2)"),
    (("--steps", 2, "--cfg", 1), "guidance_scale"),
    (("-n", 10**9), "3,000,000,000"),
    (("-o", "out.tga"), ".png"),
    (("-o", "missing/out.png"), "missing/out.png"),
    (("-o", "old.png/x/"), "Not a directory"),
    (("--dump", "missing/d.npz"), "missing/d.npz"),
    (("--dump", "."), "is a directory"),
]


def test_a_bad_option_is_explained_and_nothing_is_written(shared_bundle: Path, folder: Path) -> None:
    for name in ("old.png", "out.png"):
        (folder / name).write_bytes(b"old")
    for options, named in BAD_OPTIONS:
        assert named in failed(sample(shared_bundle, *options))
    assert listing(folder) == ["old.png", "out.png"]
    assert (folder / "out.png").read_bytes() == b"old"


def test_what_is_wrong_with_the_rest(bundle: Path) -> None:
    """What excludes each other; numbers out of range, which are usage errors. A changed byte is seen unless
    told not to look; in the graph's name, so that it still runs."""
    save(Path("noise.npz"), noise=GOOD, labels=[0, 1, 2])
    for options in (("--label", 1), ("-n", 2)):
        assert "labels" in failed(sample(bundle, "--noise", "noise.npz", *options))
    assert sample(bundle, "--noise", "noise.npz", "--seed", 0).exit_code == 2
    for option in ("--steps", "-n", "--threads", "--batch-size", "--top-k", "--steps=all", "--seed=-1"):
        assert sample(bundle, option, 0).exit_code == 2
    assert "nowhere" in failed(sample("nowhere"))
    path = bundle / "student.onnx"
    path.write_bytes(path.read_bytes().replace(b"student", b"STUDENT"))
    assert "student.onnx" in failed(sample(bundle))
    assert sample(bundle, "--no-verify").exit_code == 0


def test_a_write_that_fails_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether writing fails, or is interrupted, or the last move of the complete new file fails."""
    path = folder / "x"
    path.write_bytes(b"old")

    def write(error: BaseException | None = None) -> None:
        with files.atomic_write(path) as stream:
            stream.write(b"new")
            if error:
                raise error

    def replace(self: Path, target: Path) -> None:
        assert (self.read_bytes(), target) == (b"new", path)
        raise PermissionError(13, "Permission denied")

    with pytest.raises(OutputError, match="No space left"):
        write(OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="Permission denied"):
        patch.setattr(Path, "replace", replace)
        write()
    assert (listing(folder), path.read_bytes()) == (["x"], b"old")
    write()
    assert (listing(folder), path.read_bytes()) == (["x"], b"new")
