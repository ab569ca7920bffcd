"""The command line: what it writes, what it says, and that a failure changes nothing on disk."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ddexport import runtime
from ddexport.runtime import files, infer
from ddexport.runtime.errors import OutputError
from ddexport.runtime.infer import command
from ddexport.runtime.machine import Package


def sample(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def failed(result: Result) -> str:
    """The message of a run that had to end with a user's error, and nothing else on stderr."""
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert result.stdout == ""
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
    """All classes of a small model in one picture, and one line about it."""
    result = sample(shared_bundle)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith("out.png: 3 images in 1 step; student ")
    assert ", decoder " in result.stdout
    assert listing(folder) == ["out.png"]
    assert Image.open("out.png").size == (3 * 128, 128)  # 8 x 8 pixels would not be seen


def test_the_picture_has_the_pipelines_images(shared_bundle: Path) -> None:
    """Rows are labels; numbers and names; every pixel of the image is one block of the picture."""
    options = ("--label", 2, "--label", "ZERO", "-n", 2, "--steps", 2, "--seed", 5, "--threads", 1)
    result = sample(shared_bundle, *options, "-o", "grid.png")
    assert "4 images in 2 steps" in result.stdout
    with runtime.load(shared_bundle) as pipe:
        images = pipe([2, 0], 2, seed=5, num_images=2, output="numpy").images
    picture = np.asarray(Image.open("grid.png"))[8::16, 8::16]
    assert isinstance(images, np.ndarray)
    expected = images.reshape(2, 2, 8, 8, 3).swapaxes(1, 2).reshape(16, 16, 3)
    assert abs(np.subtract(picture, expected, dtype=int)).max() <= 1  # another batch size may round otherwise


@pytest.mark.parametrize("output", ["many/", "no_suffix", "there.png"])
def test_a_directory_gets_one_file_an_image(shared_bundle: Path, folder: Path, output: str) -> None:
    """A name that ends in a slash or has no suffix, or a directory that exists, whatever its name."""
    (folder / "there.png").mkdir()
    assert sample(shared_bundle, "--label", 1, "-n", 2, "--label", 2, "-o", output).exit_code == 0
    assert listing(folder / output) == [
        "00000-class0001.png",
        "00001-class0001.png",
        "00002-class0002.png",
        "00003-class0002.png",
    ]
    assert Image.open(folder / output / "00003-class0002.png").size == (8, 8)


def test_json_reports_everything(random_bundle: Path) -> None:
    result = sample(random_bundle, "--json", "--label", 1, "-n", 2, "--backend", "onnxruntime", "-o", "a.jpg")
    report = json.loads(result.stdout)
    assert report.pop("seconds").keys() == {"load", "student", "decoder"}
    assert report == {
        "bundle": "toy",
        "output": "a.jpg",
        "images": 2,
        "labels": [1],
        "steps": 1,
        "seed": 0,
        "backend": "onnxruntime",
        "provider": "cpu",
        "precision": "fp32",
        "random_weights": True,
    }
    assert Image.open("a.jpg").format == "JPEG"


def test_random_weights_are_said_on_stderr(random_bundle: Path) -> None:
    assert sample(random_bundle).stderr.startswith("warning: toy holds random weights (seed 7)")


def test_list_labels(shared_bundle: Path, folder: Path) -> None:
    assert sample(shared_bundle, "--list-labels").stdout.split() == ["0", "zero", "1", "one", "2", "two"]
    assert json.loads(sample(shared_bundle, "--list-labels", "--json").stdout)["names"][2] == "two"
    assert listing(folder) == []


def test_a_large_model_shows_a_few_classes_by_default() -> None:
    pipe = type("Pipe", (), {"manifest": type("Manifest", (), {"classes": 1000})})()
    chosen = infer._chosen(infer.Request(Path("x")), None, pipe)  # type: ignore[arg-type]
    assert chosen == [0, 142, 285, 428, 570, 713, 856, 999]


# Dump and replay


def test_the_dump_has_the_promised_arrays(shared_bundle: Path) -> None:
    options = ("--label", 2, "--label", 0, "-n", 2, "--steps", 3, "--seed", 4, "--batch-size", 3)
    assert sample(shared_bundle, *options, "--dump", "dump.npz").exit_code == 0
    with runtime.load(shared_bundle) as pipe:
        result = pipe([2, 0], 3, seed=4, num_images=2, output="numpy")
    with np.load("dump.npz", allow_pickle=False) as dump:
        steps = [f"step{number}_{what}" for number in (1, 2, 3) for what in ("tokens", "sequence")]
        assert list(dump) == ["labels", "noise", *steps, "images"]
        assert dump["labels"].tolist() == [2, 2, 0, 0]
        np.testing.assert_array_equal(dump["noise"], result.noise)
        for number, step in enumerate(result.steps, 1):
            np.testing.assert_array_equal(dump[f"step{number}_tokens"], step.tokens)
            np.testing.assert_allclose(dump[f"step{number}_sequence"], step.sequence, atol=1e-5)
        assert dump["step1_tokens"].shape == (4, 2)
        assert dump["step1_sequence"].shape == (4, 6, 4)
        assert (dump["images"].dtype, dump["images"].shape) == (np.uint8, (4, 8, 8, 3))
        assert abs(np.subtract(dump["images"], result.images, dtype=int)).max() <= 1


def test_a_dump_can_be_replayed(shared_bundle: Path) -> None:
    """Its labels and noise give its tokens again, without a seed."""
    sample(shared_bundle, "--steps", 2, "--seed", 8, "-n", 2, "--dump", "one.npz")
    result = sample(shared_bundle, "--steps", 2, "--noise", "one.npz", "--dump", "two.npz", "--json")
    assert json.loads(result.stdout)["seed"] is None
    with np.load("one.npz") as one, np.load("two.npz") as two:
        for name in one:
            np.testing.assert_allclose(one[name], two[name], atol=1e-5)


def test_noise_without_labels_goes_with_the_labels_given(shared_bundle: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    save(Path("noise.npz"), noise=noise)
    assert (
        sample(shared_bundle, "--noise", "noise.npz", "--label", 1, "-n", 2, "--dump", "d.npz").exit_code == 0
    )
    with np.load("d.npz") as dump:
        assert dump["labels"].tolist() == [1, 1]
        np.testing.assert_array_equal(dump["noise"], noise)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def claims_too_much(path: Path) -> None:
    """A file of a few bytes whose header asks for terabytes."""
    header = io.BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 6, 4)}
    np.lib.format.write_array_header_1_0(header, description)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("noise.npy", header.getvalue())


def truncated(path: Path) -> None:
    save(path, noise=zeros(3, 6, 4))
    path.write_bytes(path.read_bytes()[:-40])


BAD_NOISE: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "the noise file noise.npz does not exist"),
    (lambda path: path.write_bytes(b"noise"), "noise.npz cannot be read as an npz"),
    (lambda path: path.mkdir(), "noise.npz cannot be read as an npz"),
    (lambda path: np.save(path.open("wb"), zeros(3, 6, 4)), "noise.npz cannot be read as an npz"),
    (truncated, "noise.npz cannot be read as an npz"),
    (lambda path: save(path, nose=zeros(3, 6, 4)), "has no array `noise`, but: nose"),
    (
        lambda path: save(path, noise=zeros(6, 4)),
        "`noise` must be float32 of 3 dimensions, but is float32 (6, 4)",
    ),
    (
        lambda path: save(path, noise=zeros(3, 6, 4, dtype=float)),
        "must be float32 of 3 dimensions, but is float64",
    ),
    (lambda path: save(path, noise=np.array([None])), "must be float32 of 3 dimensions, but is object"),
    (claims_too_much, "`noise` of shape (1099511627776, 6, 4) is too large"),
    (lambda path: save(path, noise=zeros(3, 5, 4)), "must have shape (3, 6, 4), but has (3, 5, 4)"),
    (lambda path: save(path, noise=zeros(4, 6, 4)), "must have shape (3, 6, 4), but has (4, 6, 4)"),
    (lambda path: save(path, noise=zeros(3, 6, 4) + np.inf), "the noise is not finite: inf at (0, 0, 0)"),
    (
        lambda path: save(path, noise=zeros(3, 6, 4), labels=zeros(3)),
        "`labels` must be integers of 1 dimensions",
    ),
    (lambda path: save(path, noise=zeros(3, 6, 4), labels=[1, 2]), "has 3 noises but 2 labels"),
    (lambda path: save(path, noise=zeros(1, 6, 4), labels=[3]), "label 3 is out of range"),
]


@pytest.mark.parametrize(("make", "message"), BAD_NOISE, ids=[message for _, message in BAD_NOISE])
def test_bad_noise_is_explained(
    make: Callable[[Path], object], message: str, shared_bundle: Path, folder: Path
) -> None:
    make(folder / "noise.npz")
    assert message in failed(sample(shared_bundle, "--noise", "noise.npz"))
    assert not (folder / "out.png").exists()


@pytest.mark.parametrize("options", [("--label", 1), ("-n", 2)])
def test_noise_that_brings_its_labels_takes_no_others(shared_bundle: Path, options: tuple[object]) -> None:
    save(Path("noise.npz"), noise=zeros(3, 6, 4), labels=[0, 1, 2])
    message = failed(sample(shared_bundle, "--noise", "noise.npz", *options))
    assert "brings its own labels, so neither --label nor -n" in message


def test_noise_and_seed_exclude_each_other(shared_bundle: Path) -> None:
    assert sample(shared_bundle, "--noise", "noise.npz", "--seed", 0).exit_code == 2


# Bad input loses nothing


BAD_OPTIONS: list[tuple[tuple[object, ...], str, str]] = [
    (("--label", 3), "label 3 is out of range: the model has classes 0 to 2", "--list-labels"),
    (("--label", "tow"), "no class is called 'tow'", "Did you mean 'two' (class 2)?"),
    (("--steps", 4), "toy has no schedule of 4 steps", "It can draw in: 1, 2, 3."),
    (("--backend", "onnx"), "no backend called 'onnx'", "There is: onnxruntime"),
    (("--precision", "int8"), "no student in precision int8", "It has: fp32."),
    (("-o", "out.tga"), "out.tga has no suffix of an image format", ".png"),
    (("-o", "missing/out.png"), "missing/out.png cannot be written: No such file", "Check the directory"),
    (("-o", "old.png/x/"), "cannot be written: Not a directory", "Check the directory"),
    (("--dump", "missing/d.npz"), "missing/d.npz cannot be written", "Check the directory"),
    (("--dump", "."), "it is a directory", ""),
]


@pytest.mark.parametrize(("options", "message", "hint"), BAD_OPTIONS)
def test_a_bad_option_is_explained_and_nothing_is_written(
    options: tuple[object, ...], message: str, hint: str, shared_bundle: Path, folder: Path
) -> None:
    (folder / "old.png").write_bytes(b"old")
    (folder / "out.png").write_bytes(b"old")
    text = failed(sample(shared_bundle, *options))
    assert message in text
    assert hint in text
    assert listing(folder) == ["old.png", "out.png"]
    assert (folder / "out.png").read_bytes() == b"old"


@pytest.mark.parametrize("option", ["--steps", "-n", "--threads", "--batch-size"])
def test_numbers_below_one_are_usage_errors(shared_bundle: Path, option: str) -> None:
    assert sample(shared_bundle, option, 0).exit_code == 2
    assert sample(shared_bundle, "--seed", -1).exit_code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_write_permission(shared_bundle: Path, folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o555)
    assert "Permission denied" in failed(sample(shared_bundle, "-o", "closed/out.png"))


def test_a_bundle_that_is_none(folder: Path) -> None:
    assert "not a bundle: nowhere not found" in failed(sample("nowhere"))


def test_an_engine_that_is_not_installed(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name or not, the message says what to install."""

    def missing(name: str, module: str) -> Package:
        return Package(name, None, f"{name} is not installed: pip install {name}")

    monkeypatch.setattr("ddexport.runtime.machine.package", missing)
    for backend, message in (("auto", "no engine here can run toy"), ("onnxruntime", "cannot run toy")):
        text = failed(sample(shared_bundle, "--backend", backend))
        assert message in text
        assert "pip install onnxruntime" in text


def test_a_damaged_bundle_is_found_unless_told_not_to_look(bundle: Path) -> None:
    """The changed byte is in the graph's name, so that it still runs."""
    path = bundle / "student.onnx"
    path.write_bytes(path.read_bytes().replace(b"student", b"STUDENT"))
    assert "the SHA-256 of student.onnx is not the one in bundle.json" in failed(sample(bundle))
    assert sample(bundle, "--no-verify").exit_code == 0


def test_a_write_that_fails_leaves_the_old_file(folder: Path) -> None:
    (folder / "x").write_bytes(b"old")
    with pytest.raises(OutputError, match="No space left"), files.atomic_write(folder / "x") as stream:
        stream.write(b"new")
        raise OSError(28, "No space left on device")
    assert listing(folder) == ["x"]
    assert (folder / "x").read_bytes() == b"old"


def test_the_file_appears_in_one_move(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the move fails, the complete new file has touched nothing."""
    (folder / "x").write_bytes(b"old")

    def replace(self: Path, target: Path) -> None:
        assert self.read_bytes() == b"new"
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError, match="Permission denied"), files.atomic_write(folder / "x") as stream:
        stream.write(b"new")
    assert listing(folder) == ["x"]
    assert (folder / "x").read_bytes() == b"old"


def test_an_interrupted_write_leaves_the_old_file(folder: Path) -> None:
    (folder / "x").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), files.atomic_write(folder / "x") as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert listing(folder) == ["x"]
    assert (folder / "x").read_bytes() == b"old"
