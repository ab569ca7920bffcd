"""`ddexport sample --shards`: every image once, whoever draws it, and whoever is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ddexport import runtime
from ddexport.runtime import cli
from ddexport.runtime.noise import uniform_labels
from ddexport.runtime.shards import local
from ddexport.runtime.shards.image_set import Reader, ShardError

INFER = Path(runtime.__file__).parent / "infer.py"
COUNT = 60


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.command, [str(argument) for argument in arguments])


def drawn(bundle: Path, folder: Path, *options: object) -> dict[str, Any]:
    """The report of a run that had to succeed."""
    result = invoke(bundle, "--shards", folder, "--json", *options)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def refused(*arguments: object, code: int = 1) -> str:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    return result.stderr


def members(folder: Path) -> dict[str, bytes]:
    """All files of all shards by their names, of which no two are the same."""
    contents: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                assert member.name not in contents
                contents[member.name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return contents


def wait_for(what: Callable[[], Any]) -> Any:
    """What it returns when that is true."""
    end = time.monotonic() + 60
    while not (value := what()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return value


def children(process: int) -> list[int]:
    """The processes that one has started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def workers(process: int) -> list[int]:
    """Those of them that draw; Python's own looks after what they share."""
    return [
        number
        for number in children(process)
        if b"resource_tracker" not in Path(f"/proc/{number}/cmdline").read_bytes()
    ]


def test_a_set_is_what_the_pipeline_draws(shared_bundle: Path, tmp_path: Path) -> None:
    """Labels at random by the seed; a PNG and a JSON an image; a report; a reader for programs."""
    report = drawn(shared_bundle, tmp_path / "set", "--count", COUNT, "--seed", 5, "--shard-size", 25)
    labels = uniform_labels(5, range(COUNT), 3)
    with runtime.load(shared_bundle) as pipe:
        images = np.stack([pipe(label, seed=5, first_image=i, output="numpy").images[0]
                           for i, label in enumerate(labels.tolist())])  # fmt: skip
    files = members(tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "00000000-00000024.tar", "00000025-00000049.tar", "00000050-00000059.tar", "set.json",
    ]  # fmt: skip
    assert len(files) == 2 * COUNT
    for index, (label, image) in enumerate(zip(labels.tolist(), images, strict=True)):
        facts = json.loads(files[f"{index:08d}.json"])
        name = ("zero", "one", "two")[label]
        assert facts | {"sha256": ""} == {
            "index": index,
            "label": label,
            "class": name,
            "seed": 5,
            "sha256": "",
        }
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(files[f"{index:08d}.png"]))), image)
    assert (report["images"], report["drawn"]) == (COUNT, COUNT)
    reader = Reader(tmp_path / "set")
    assert [facts["label"] for facts in reader.facts] == labels.tolist()
    assert np.array_equal(reader.images(range(20, 60)), images[20:])


def test_the_digest_depends_on_images_alone(shared_bundle: Path, tmp_path: Path) -> None:
    """Not on workers, threads, shards, batches, or on what was drawn before; on the seed and the labels."""
    (tmp_path / "labels.txt").write_text("two\n0\n\none\n")
    labels = ("--labels", tmp_path / "labels.txt", "--count", COUNT)
    one = drawn(shared_bundle, tmp_path / "a", *labels, "--workers", 1, "--batch-size", 7, "--threads", 2)
    two = drawn(shared_bundle, tmp_path / "b", *labels, "--workers", 2, "--shard-size", 11)
    (tmp_path / "b" / "00000011-00000021.tar").unlink()
    again = drawn(shared_bundle, tmp_path / "b", *labels, "--shard-size", 11)
    assert (again["drawn"], again["images"]) == (11, COUNT)
    assert one["sha256"] == two["sha256"] == again["sha256"]
    assert members(tmp_path / "a") == members(tmp_path / "b")
    named = drawn(
        shared_bundle, tmp_path / "c", "--label", 2, "--label", "zero", "--label", 1, "--count", COUNT
    )
    seeded = drawn(shared_bundle, tmp_path / "d", *labels, "--seed", 1)
    assert len({one["sha256"], named["sha256"], seeded["sha256"]}) == 2
    assert one["sha256"] == named["sha256"]


def test_a_teacher_draws_sets_too(shared_teacher_bundle: Path, tmp_path: Path) -> None:
    how = ("--count", 8, "--steps", "teacher", "--top-k", 3)
    drawn(shared_teacher_bundle, tmp_path / "set", *how)
    with runtime.load(shared_teacher_bundle) as pipe:
        given = uniform_labels(0, range(8), 3).tolist()
        images = pipe(given, "teacher", top_k=3, output="numpy").images
    assert np.array_equal(Reader(tmp_path / "set").images(range(8)), images)


KILLED_COUNT = 4000


@pytest.fixture(scope="module")
def whole(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a run in peace."""
    return drawn(shared_bundle, tmp_path_factory.mktemp("whole"), "--count", KILLED_COUNT)


class TestKills:
    def start(self, bundle: Path, folder: Path) -> subprocess.Popen[str]:
        words = [
            sys.executable,
            INFER,
            bundle,
            "--shards",
            folder,
            "--count",
            KILLED_COUNT,
            "--shard-size",
            1000,
        ]
        return subprocess.Popen(
            [*map(str, words), "--workers", "2", "--json"], stdout=subprocess.PIPE, text=True
        )

    def test_a_worker(self, shared_bundle: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
        """Another one takes its place."""
        with self.start(shared_bundle, tmp_path / "set") as process:
            wait_for(lambda: list((tmp_path / "set").glob(".ddexport-*.part")))
            os.kill(workers(process.pid)[0], signal.SIGKILL)
            report = json.loads(process.communicate()[0])
        assert process.returncode == 0
        assert report["sha256"] == whole["sha256"]
        assert len(members(tmp_path / "set")) == 2 * KILLED_COUNT
        assert not list((tmp_path / "set").glob(".*"))

    def test_the_whole_command(self, shared_bundle: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
        """Its processes end too; the same command goes on, and nothing half written is left."""
        folder = tmp_path / "set"
        with self.start(shared_bundle, folder) as process:
            wait_for(lambda: list(folder.glob("*.tar")))
            wait_for(lambda: list(folder.glob(".ddexport-*.part")))
            drawing = workers(process.pid)
            process.kill()
        wait_for(lambda: not any(Path(f"/proc/{number}/cmdline").exists() for number in drawing))
        kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
        assert 0 < len(kept) < 4
        report = drawn(shared_bundle, folder, "--count", KILLED_COUNT, "--shard-size", 1000)
        assert report["drawn"] == KILLED_COUNT - 1000 * len(kept)
        assert report["sha256"] == whole["sha256"]
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        assert not list(folder.glob(".*"))

    def test_an_interrupt(self, shared_bundle: Path, tmp_path: Path) -> None:
        with self.start(shared_bundle, tmp_path / "set") as process:
            wait_for(lambda: list((tmp_path / "set").glob(".ddexport-*.part")))
            drawing = workers(process.pid)
            process.send_signal(signal.SIGINT)
        assert process.returncode == 130
        assert not any(Path(f"/proc/{number}").exists() for number in drawing)
        assert not list((tmp_path / "set").glob(".*"))


def die(*_: Any) -> None:
    os._exit(9)


def test_workers_that_die_all_the_time_end_the_command(
    shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an endless loop."""
    monkeypatch.setattr(local, "_work", die)
    stderr = refused(shared_bundle, "--shards", tmp_path / "set", "--count", 4)
    assert f"{local.MAX_DEATHS} processes died one after another" in stderr


class TestWhatIsRefused:
    def test_another_set(self, shared_bundle: Path, tmp_path: Path) -> None:
        """What differs is said, and nothing is changed; so is a directory with something else."""
        folder = tmp_path / "set"
        drawn(shared_bundle, folder, "--count", 4)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        stderr = refused(shared_bundle, "--shards", folder, "--count", 5, "--steps", 2)
        assert "another set of images: steps 1, here 2; conditions " in stderr
        assert "count 4, here 5" in stderr
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "me.png").write_text("")
        assert "has files, but no set.json" in refused(
            shared_bundle, "--shards", tmp_path / "photos", "--count", 4
        )
        assert "cannot be written" in refused(
            shared_bundle, "--shards", tmp_path / "photos" / "me.png", "--count", 4
        )

    def test_two_commands_at_once(self, shared_bundle: Path, tmp_path: Path) -> None:
        with TestKills().start(shared_bundle, tmp_path / "set") as process:
            wait_for(lambda: list((tmp_path / "set").glob(".ddexport-*.part")))
            stderr = refused(shared_bundle, "--shards", tmp_path / "set", "--count", 4)
            assert "another process draws into" in stderr
            process.communicate()
        assert process.returncode == 0

    @pytest.mark.parametrize(
        ("words", "error"),
        [
            (["--top-k", 5], "top_k can only be given for steps that use the teacher"),
            (["--steps", 9], "schedule"),
            (["--decoder", "tiny"], "decoder"),
            (["--label", "nine"], "no class is called 'nine'"),
            (["--labels", "no-such-file"], "no-such-file cannot be read"),
            (["--prompt", "a fox"], "draws classes, not texts"),
        ],
    )
    def test_a_bad_request(
        self, shared_bundle: Path, tmp_path: Path, words: list[object], error: str
    ) -> None:
        """It leaves no set that a better request would be refused for."""
        assert error in refused(shared_bundle, "--shards", tmp_path / "set", "--count", 4, *words)
        assert drawn(shared_bundle, tmp_path / "set", "--count", 4)["drawn"] == 4

    @pytest.mark.parametrize(
        ("words", "error"),
        [
            (["--shards", "set"], "--labels uniform needs --count"),
            (["--shards", "set", "--count", 4, "-n", 2], "--num-images cannot be used with --shards"),
            (["--shards", "set", "--count", 4, "-o", "a.png"], "--output cannot be used with --shards"),
            (["--shards", "set", "--label", 1, "--labels", "uniform"], "--label and --labels"),
            (["--count", 4], "--count needs --shards"),
            (["--ray", "local"], "--ray needs --shards"),
        ],
    )
    def test_options_that_do_not_go_together(
        self,
        shared_bundle: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        words: list[object],
        error: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert error in refused(shared_bundle, *words, code=2)
        assert not list(tmp_path.iterdir())


def forge(shard: Path, files: dict[str, bytes]) -> None:
    """A tar file with these files."""
    with tarfile.open(shard, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_damaged_shards(shared_bundle: Path, tmp_path: Path) -> None:
    """What is not as it was drawn is told to who reads it, and drawn again by the same command."""
    folder = tmp_path / "set"
    words: tuple[object, ...] = ("--count", 30, "--shard-size", 10)
    whole = drawn(shared_bundle, folder, *words)
    shard = folder / "00000010-00000019.tar"
    content = shard.read_bytes()
    files = {name: data for name, data in members(folder).items() if name[:7] == "0000001"}
    png, text = "00000010.png", "00000010.json"
    label = json.loads(files[text])["label"]
    damages: list[tuple[dict[str, bytes] | None, str]] = [
        ({png: files["00000011.png"]}, "other pixels"),
        ({png: bytes(len(files[png]))}, "cannot identify"),
        ({text: b"{}"}, "sha256"),
        ({text: files[text].replace(f'"label": {label}'.encode(), b'"label": 9')}, ""),
        ({"00000010.txt": b""}, "it has 21 files in place of 20"),
        (None, "unexpected end of data"),
    ]
    for change, error in damages:
        shard.write_bytes(content[:9000])
        if change is not None:
            forge(shard, files | change)
        if error:
            with pytest.raises(ShardError, match=f"{shard.name} is .*damaged: .*{error}"):
                Reader(folder).images(range(30))
        again = drawn(shared_bundle, folder, *words)
        assert (again["drawn"], again["sha256"]) == (10, whole["sha256"]), change
        assert shard.read_bytes() == content
    shard.unlink()
    with pytest.raises(ShardError, match="is missing or damaged"):
        Reader(folder)
