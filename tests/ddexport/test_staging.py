"""A directory appears whole or not at all, whatever ends the writer: errors, Ctrl-C, a kill, a full disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ddexport.runtime.errors import OutputError

import ddexport.staging as staging
from ddexport.staging import staged_directory

MARKER = "bundle.json"


def write_old(target: Path) -> Path:
    """A complete directory from an earlier run."""
    target.mkdir(parents=True)
    (target / MARKER).write_text("old")
    return target


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones included: nothing stray can hide."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def directories(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_dir()}


class TestEndings:
    def test_success(self, tmp_path: Path) -> None:
        """Parents are made, nothing is visible before the end, and nothing else remains."""
        target = tmp_path / "build" / "model"
        with staged_directory(target, needed_bytes=1) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text("new")
            assert not target.exists()
            assert folder.parent == target.parent, "another file system could not be renamed from"
        assert content(tmp_path) == {"build/model/sub/file": "new"}
        assert directories(tmp_path) == {"build", "build/model", "build/model/sub"}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, PermissionError])
    @pytest.mark.parametrize("old", [True, False])
    def test_an_error_leaves_the_old_one_or_none(
        self, tmp_path: Path, error: type[BaseException], old: bool
    ) -> None:
        target = tmp_path / "model"
        if old:
            write_old(target)
        with pytest.raises(error), staged_directory(target, replace=True, marker=MARKER) as folder:
            (folder / MARKER).write_text("new")
            raise error
        assert content(tmp_path) == ({"model/bundle.json": "old"} if old else {})
        assert directories(tmp_path) == ({"model"} if old else set())

    def test_replacing(self, tmp_path: Path) -> None:
        """The old directory stays whole until the new one is, and all of it goes."""
        target = write_old(tmp_path / "model")
        (target / "parity").mkdir()
        (target / "parity" / "report.json").write_text("old")
        with staged_directory(target, replace=True, marker=MARKER) as folder:
            (folder / MARKER).write_text("new")
            assert content(target) == {MARKER: "old", "parity/report.json": "old"}
        assert content(tmp_path) == {"model/bundle.json": "new"}
        assert directories(tmp_path) == {"model"}

    def test_a_target_behind_a_link(self, tmp_path: Path) -> None:
        """The link stays a link; what it points at is replaced."""
        write_old(tmp_path / "disk" / "model")
        (tmp_path / "link").symlink_to("disk/model")
        with staged_directory(tmp_path / "link", replace=True, marker=MARKER) as folder:
            (folder / MARKER).write_text("new")
        assert (tmp_path / "link").is_symlink()
        assert content(tmp_path / "disk") == {"model/bundle.json": "new"}

    def test_a_relative_target(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with staged_directory(Path("model")) as folder:
            (folder / MARKER).write_text("new")
        assert content(tmp_path) == {"model/bundle.json": "new"}


class TestRefusals:
    def refused(self, target: Path, message: str, **options: object) -> OutputError:
        before = content(target.parent) if target.parent.is_dir() else None
        with pytest.raises(OutputError, match=message) as caught, staged_directory(target, **options):  # type: ignore[arg-type]
            raise AssertionError("nothing may be written")
        assert before is None or content(target.parent) == before
        assert caught.value.exit_code == 1
        return caught.value

    def test_an_existing_target(self, tmp_path: Path) -> None:
        error = self.refused(write_old(tmp_path / "model"), "exists already")
        assert "--force" in error.hint

    def test_other_peoples_files(self, tmp_path: Path) -> None:
        """`-o . --force` must not remove a home directory: only what was written here is replaced."""
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.txt").write_text("years of work")
        self.refused(tmp_path / "home", f"holds other files and no {MARKER}", replace=True, marker=MARKER)

    def test_an_empty_directory_may_be_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        self.refused(tmp_path / "model", "exists already", marker=MARKER)
        with staged_directory(tmp_path / "model", replace=True, marker=MARKER) as folder:
            (folder / MARKER).write_text("new")
        assert content(tmp_path) == {"model/bundle.json": "new"}

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "model").write_text("a file")
        self.refused(tmp_path / "model", "is a file, not a directory", replace=True)
        self.refused(
            tmp_path / "model" / "below", f"cannot write .*: {tmp_path}/model: File exists", replace=True
        )

    def test_a_file_system_that_cannot_be_written(self) -> None:
        """/proc refuses new directories even to root."""
        with (
            pytest.raises(OutputError, match="cannot write /proc/model: ") as caught,
            staged_directory(Path("/proc/model")),
        ):
            raise AssertionError("nothing can be written")
        assert "-o" in caught.value.hint

    def test_too_little_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Said before the work, not after minutes of it."""
        usage = namedtuple("usage", "total used free")(10 << 30, 9 << 30, 1 << 30)
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
        self.refused(tmp_path / "model", "1.0 GiB of room, about 2.0 GiB are needed", needed_bytes=2 << 30)
        assert directories(tmp_path) == set()

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_disk_that_fills_up(self, tmp_path: Path, code: int) -> None:
        target = write_old(tmp_path / "model")
        with (
            pytest.raises(OutputError, match="no space left while writing") as caught,
            staged_directory(target, replace=True) as folder,
        ):
            (folder / "half").write_text("half")
            raise OSError(code, os.strerror(code))
        assert caught.value.hint
        assert content(tmp_path) == {"model/bundle.json": "old"}
        assert directories(tmp_path) == {"model"}

    def test_somebody_else_was_faster(self, tmp_path: Path) -> None:
        """Two exports to one place without --force: the first to finish is kept."""
        target = tmp_path / "model"
        with pytest.raises(OutputError, match="exists already"), staged_directory(target) as folder:
            (folder / MARKER).write_text("late")
            write_old(target)
        assert content(tmp_path) == {"model/bundle.json": "old"}
        assert directories(tmp_path) == {"model"}

    def test_a_rename_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The old directory, already out of the way, is put back."""
        target = write_old(tmp_path / "model")
        rename = Path.rename

        def fail_second(path: Path, to: Path) -> Path:
            if ".partial-" in path.name:
                raise PermissionError(errno.EPERM, "no")
            return rename(path, to)

        monkeypatch.setattr(Path, "rename", fail_second)
        with pytest.raises(PermissionError), staged_directory(target, replace=True) as folder:
            (folder / MARKER).write_text("new")
        assert content(tmp_path) == {"model/bundle.json": "old"}
        assert directories(tmp_path) == {"model"}


WRITER = """
import signal, sys, time
from pathlib import Path
import ddexport.staging as staging

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C

target, stop = Path(sys.argv[1]), sys.argv[2]

def wait():
    print("here", flush=True)
    time.sleep(60)

if stop == "between the renames":
    rename = Path.rename
    Path.rename = lambda path, to: wait() if ".partial-" in path.name else rename(path, to)
with staging.staged_directory(target, replace=True) as folder:
    (folder / "bundle.json").write_text("new")
    (folder / "student.onnx").write_text("half")
    if stop == "in the middle":
        wait()
"""


@contextmanager
def writer(target: Path, stop: str) -> Iterator[subprocess.Popen[str]]:
    """A process that waits at `stop` while it writes `target`."""
    command = [sys.executable, "-c", WRITER, str(target), stop]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_gone(folder: Path, name: str) -> None:
    """The helper process works after its parent has died; give it time on a busy machine."""
    deadline = time.monotonic() + 30
    while any(p.name.startswith(name) for p in folder.iterdir()):
        assert time.monotonic() < deadline, f"left behind: {list(folder.iterdir())}"
        time.sleep(0.02)


class TestDeath:
    @pytest.mark.parametrize("old", [True, False])
    @pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_in_the_middle(self, tmp_path: Path, old: bool, signal_number: int) -> None:
        """Killed, even without a chance to react: the old directory or none, and no stray gigabytes."""
        target = tmp_path / "model"
        if old:
            write_old(target)
        with writer(target, "in the middle") as process:
            assert any(".partial-" in name for name in directories(tmp_path))
            process.send_signal(signal_number)
            process.wait()
        wait_until_gone(tmp_path, ".model")
        assert content(tmp_path) == ({"model/bundle.json": "old"} if old else {})
        assert directories(tmp_path) == ({"model"} if old else set())

    def test_between_the_renames(self, tmp_path: Path) -> None:
        """The one moment in which neither is in place: the old one comes back."""
        target = write_old(tmp_path / "model")
        with writer(target, "between the renames") as process:
            assert not target.exists()
            process.kill()
            process.wait()
        wait_until_gone(tmp_path, ".model")
        assert content(tmp_path) == {"model/bundle.json": "old"}
        assert directories(tmp_path) == {"model"}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class TestLeftovers:
    """After a power cut no helper process runs: the next export to the same place tidies up."""

    def leftover(self, parent: Path, kind: str, pid: int, name: str = "model") -> Path:
        path = parent / f".{name}.{kind}-{pid}-0123abcd"
        path.mkdir()
        (path / MARKER).write_text(kind)
        return path

    @pytest.mark.parametrize("name", ["model", "var-d16", "a[1]*"])
    def test_partial_and_replaced_ones_are_removed(self, tmp_path: Path, name: str) -> None:
        pid = dead_pid()
        self.leftover(tmp_path, "partial", pid, name)
        self.leftover(tmp_path, "replaced", pid, name)
        write_old(tmp_path / name)
        with staged_directory(tmp_path / name, replace=True) as folder:
            assert directories(tmp_path) == {name, folder.name}
            (folder / MARKER).write_text("new")
        assert content(tmp_path) == {f"{name}/bundle.json": "new"}

    def test_a_replaced_one_is_put_back(self, tmp_path: Path) -> None:
        """Where the target is missing, the machine went down between the renames."""
        self.leftover(tmp_path, "replaced", dead_pid())
        with pytest.raises(OutputError, match="exists already"), staged_directory(tmp_path / "model"):
            raise AssertionError("it was put back, and --force was not given")
        assert content(tmp_path) == {"model/bundle.json": "replaced"}

    def test_what_is_not_ours_stays(self, tmp_path: Path) -> None:
        """Running exports, other targets, and names that only look alike."""
        self.leftover(tmp_path, "partial", os.getpid())
        self.leftover(tmp_path, "partial", dead_pid(), "other")
        (tmp_path / ".model.partial-mine").mkdir()
        before = directories(tmp_path)
        with staged_directory(tmp_path / "model") as folder:
            assert directories(tmp_path) == before | {folder.name}
        assert directories(tmp_path) == before | {"model"}
