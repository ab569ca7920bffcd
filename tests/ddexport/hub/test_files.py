"""Files of the Hub arrive whole and right, or not at all, and an error says in two lines what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from ddexport.hub.errors import HubError, MissingFileError
from ddexport.hub.files import HubFile, fetch, parse
from tests.fake_hub import FakeHub

BIG, SMALL = HubFile("golden/student", "VAR-DD/student.pth"), HubFile("golden/student", "recipe.yaml")
FILES = {BIG.path: os.urandom(3 << 20), SMALL.path: b"name: golden\n"}


@pytest.fixture
def cache(hub: FakeHub, tmp_path: Path) -> Path:
    hub.add("golden/student", FILES)
    return tmp_path / "cache"


def partial_files(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


def test_a_file_is_fetched_once_and_its_commit_known(hub: FakeHub, cache: Path, capsys):
    commit = hub.add("golden/student", FILES)
    first = fetch([BIG, SMALL], remark="licence: MIT")
    assert "recipe.yaml of golden/student (3.0 MiB); licence: MIT" in capsys.readouterr().err
    assert [file.path.read_bytes() for file in first] == [*FILES.values()]
    assert {(file.repository, file.commit) for file in first} == {("golden/student", commit)}
    assert fetch([BIG, SMALL], remark="licence: MIT") == first
    assert len(hub.gets(".pth")) == len(hub.gets(".yaml")) == 1
    assert capsys.readouterr().err == ""


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub, cache: Path):
    old = hub.add("golden/student", {"a.json": b"1"}, "v1")
    hub.add("golden/student", {"a.json": b"2"})
    files = fetch([HubFile("golden/student", "a.json", name) for name in ("v1", old, None)])
    assert [file.path.read_bytes() for file in files] == [b"1", b"1", b"2"]


@pytest.mark.parametrize("file", [BIG, SMALL], ids=["LFS", "git"])
def test_wrong_bytes_are_refused_and_removed(file: HubFile, hub: FakeHub, cache: Path):
    hub.lies = {file.path}
    with pytest.raises(HubError, match=f"{file.path} of golden/student is damaged, and was removed"):
        fetch([file])
    assert not [path for path in cache.rglob("*") if path.is_symlink() or path.parent.name == "blobs"]
    hub.lies = set()
    path = fetch([file])[0].path
    path.resolve().write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(HubError, match="damaged"):  # also when the bytes changed in the cache
        fetch([file])
    assert fetch([file])[0].path.read_bytes() == FILES[file.path]


def test_a_cache_without_links_is_compared_too(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda directory: False)
    hub.lies = {BIG.path}
    with pytest.raises(HubError, match="damaged, and was removed"):
        fetch([BIG])
    hub.lies = set()
    [file] = fetch([BIG._replace(path=f"./{BIG.path}")])
    hub.status = 503  # away: what is there is taken, with a warning
    assert fetch([BIG])[0].path == file.path
    assert not file.path.is_symlink() and file.commit == hub.add("golden/student", FILES)


def test_a_cut_goes_on_where_it_was_and_leaves_nothing(hub: FakeHub, cache: Path):
    hub.cuts = {BIG.path: 1000}
    with pytest.raises(HubError):
        fetch([BIG])
    assert not partial_files(cache)
    hub.cuts = {BIG.path: 2}
    hub.asked.clear()
    assert fetch([BIG])[0].path.read_bytes() == FILES[BIG.path]
    assert len(hub.gets(".pth")) == 3


def test_what_a_killed_download_left_is_swept(hub: FakeHub, cache: Path):
    """But not what a download that still runs writes."""
    hub.slow = {BIG.path}
    code = f"from ddexport.hub.files import HubFile, fetch; fetch([{BIG!r}])"
    environment = os.environ | {"HF_HUB_CACHE": str(cache)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        while not partial_files(cache):
            assert process.poll() is None
            time.sleep(0.05)
        fetch([SMALL])
        assert partial_files(cache)
        process.send_signal(signal.SIGKILL)
    hub.slow = set()
    assert fetch([BIG])[0].path.read_bytes() == FILES[BIG.path]
    assert not partial_files(cache)


def test_offline_the_cache_alone_is_asked(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch):
    fetch([BIG])
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch([BIG])[0].path.read_bytes() == FILES[BIG.path]
    with pytest.raises(MissingFileError) as caught:
        fetch([BIG, SMALL, HubFile("golden/vae", "vae.pth", "v1")])
    commands = "hf download golden/student recipe.yaml && hf download golden/vae vae.pth --revision v1"
    assert commands in caught.value.hint and str(cache) in caught.value.message
    assert not hub.asked


def test_a_hub_that_is_away_is_the_cache(hub: FakeHub, cache: Path):
    fetch([BIG])
    hub.status = 503
    assert fetch([BIG])[0].path.read_bytes() == FILES[BIG.path]


@pytest.mark.parametrize(
    ("fault", "file", "message", "hint"),
    [
        ({"page": True}, BIG, "does not answer as the Hub does", "HTTPS_PROXY"),
        ({"status": 503}, BIG, "503 Service Unavailable", "later"),
        ({"status": 403}, BIG, "403 Forbidden", "HF_TOKEN"),
        ({"gated": {"golden/student"}}, BIG, "golden/student is gated", "Ask for access at"),
        ({"private": {"golden/student"}}, BIG, "no repository golden/student", "HF_TOKEN"),
        ({"repositories": {}}, BIG, "no repository golden/student", "Check the name"),
        ({"size": 1 << 60}, BIG, "free space, 1,099,511,627,776.0 MiB are needed", "HF_HOME"),
        ({}, BIG._replace(path="no.pth"), "golden/student has no file no.pth", "tree/main lists"),
        ({}, BIG._replace(revision="v9"), "golden/student has no revision v9", "commits shows"),
        ({}, BIG._replace(repository="golden student"), "of golden student: Repo id must", "the name"),
        ({}, BIG._replace(path="../x"), "../x of golden/student: Invalid filename", "the name"),
    ],
)
def test_what_cannot_be_had_is_said(fault, file, message, hint, hub: FakeHub, cache: Path):  # type: ignore[no-untyped-def]
    vars(hub).update(fault)
    with pytest.raises(HubError) as caught:
        fetch([file])
    assert message in caught.value.message and hint in caught.value.hint
    assert not hub.gets(".pth") and not list(cache.rglob("*.pth"))


def test_a_token_opens_a_private_repository(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch):
    hub.private = {"golden/student"}
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fetch([SMALL])[0].path.read_bytes() == FILES[SMALL.path]


def test_no_network_is_said(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch):
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(HubError, match="cannot be reached"):
        fetch([BIG])


def test_addresses():
    assert parse("hf://a/b") == HubFile("a/b", "")
    assert parse("hf://a/b@v1/c/d.pth", names_file=True) == HubFile("a/b", "c/d.pth", "v1")
    for wrong in (
        "hf://",
        "hf://a",
        "hf://datasets/a/b",
        "hf:/a/b",
        "a/b",
        "hf://a/b/c",
        "hf://a/b@feature/x",
    ):
        with pytest.raises(HubError):
            parse(wrong)
    with pytest.raises(HubError):
        parse("hf://a/b@v1", names_file=True)
