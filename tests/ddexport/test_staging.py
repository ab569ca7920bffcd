"""A directory appears whole or not at all, whatever ends the writer; nobody else's files are touched."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddexport.runtime.errors import OutputError
from ddexport.staging import staged_directory

MARKER = "bundle.json"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A complete directory from an earlier run, in a folder of its own."""
    path = tmp_path / "build" / "a[1]*"
    path.mkdir(parents=True)
    (path / MARKER).write_text("old")
    return path


def content(folder: Path) -> dict[str, str]:
    """Every file and empty directory below a folder, hidden ones included: nothing stray can hide."""
    paths = [path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "" for p in paths}


def export(target: Path, error: BaseException | None = None, **options: object) -> None:
    with staged_directory(target, **options) as folder:  # type: ignore[arg-type]
        assert folder.parent == target.resolve().parent, "another file system could not be renamed from"
        (folder / "sub").mkdir()
        (folder / MARKER).write_text("new")
        if error is not None:
            raise error


def test_a_new_one_with_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(Path("build/model"), needed_bytes=1)
    assert content(tmp_path) == {"build/model/bundle.json": "new", "build/model/sub": ""}


def test_replacing_behind_a_link(target: Path, tmp_path: Path) -> None:
    """All of the old one goes, the link stays; an empty directory may be replaced as well."""
    (target / "more").write_text("old")
    (tmp_path / "link").symlink_to(target)
    export(tmp_path / "link", replace=True, marker=MARKER)
    assert (tmp_path / "link").is_symlink()
    (target.parent / "empty").mkdir()
    export(target.parent / "empty", replace=True, marker=MARKER)
    whole = {"bundle.json": "new", "sub": ""}
    assert content(target.parent) == {
        f"{name}/{k}": v for name in ("a[1]*", "empty") for k, v in whole.items()
    }


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_error_leaves_the_old_one_or_none(target: Path, error: BaseException) -> None:
    for path in (target, target.with_name("new")):
        with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
            export(path, error, replace=True)
    assert content(target.parent) == {"a[1]*/bundle.json": "old"}


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("a[1]*", {"marker": MARKER}),
        ("a[1]*", {"replace": True, "marker": "another"}),  # `-o . --force` must not remove a home directory
        ("a[1]*/bundle.json", {"replace": True}),
        ("a[1]*/bundle.json/below", {"replace": True}),
        ("/proc/model", {}),  # not to be written, not even by root
        ("new", {"needed_bytes": 1 << 60}),
    ],
)
def test_refusals_come_before_the_work(target: Path, path: str, options: dict[str, object]) -> None:
    with pytest.raises(OutputError) as caught:
        export(target.parent / path, AssertionError("nothing may be written"), **options)
    assert "-o" in caught.value.hint
    assert content(target.parent) == {"a[1]*/bundle.json": "old"}


def test_a_rename_that_fails_puts_the_old_one_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Path, "rename", lambda path, to: 1 / 0 if path.suffix == ".part" else path.replace(to)
    )
    with pytest.raises(ZeroDivisionError):
        export(target, replace=True)
    assert content(target.parent) == {"a[1]*/bundle.json": "old"}


def test_two_exports_to_one_place(target: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither touches what the other writes, wherever it runs; its place is named, as after a kill."""
    with pytest.raises(OutputError), staged_directory(target.with_name("new")) as first:
        export(target.with_name("new"))
        assert str(first) in caplog.text
        assert first.is_dir()
        (first / MARKER).write_text("late")
    assert content(target.parent / "new") == {MARKER: "new", "sub": ""}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts: needs root")
def test_a_mount_point_is_filled_and_replaced(tmp_path: Path) -> None:
    """A container's volume cannot be renamed; an error leaves in it what was there."""
    script = f"""
import sys
from pathlib import Path
from ddexport.staging import staged_directory
target = Path("out")
for number in (1, 2, 3):
    try:
        with staged_directory(target, replace=number > 1, marker={MARKER!r}) as folder:
            (folder / {MARKER!r}).write_text(str(number))
            (folder / f"only-{{number}}").touch()
            assert folder.parent == target.resolve()
            if number == 3:
                raise ValueError
    except ValueError:
        pass
print(*sorted(path.name for path in target.iterdir()), (target / {MARKER!r}).read_text())
"""
    (tmp_path / "out").mkdir()
    (tmp_path / "vol" / "lost+found").mkdir(parents=True)
    words = ["unshare", "-m", "sh", "-c", 'mount --bind vol out && exec "$0" -c "$1"', sys.executable, script]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this container may not mount")
    assert done.stdout.split() == [MARKER, "lost+found", "only-2", "2"], done.stderr
