"""The documentation keeps its promises: links lead somewhere, commands have the options that they are shown
with, and each page can be found. `make lint` checks that generated text and tables are current."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"^\s*(?:\.venv/bin/)?(ddexport|python -m (?:validate|runtime\.infer)|python runtime/infer\.py)\b(.*)$"
)
FENCE = re.compile(r"```\w*\n(.*?)```", re.S)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def links(page):
    """The relative links and pictures of a page, each as its file and the anchor in it."""
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", FENCE.sub("", page.read_text())):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield (page.parent / file).resolve() if file else page, anchor


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    """A relative link or picture names a file of the project, and an anchor a heading of it."""
    for file, anchor in links(page):
        assert file.exists() and (not anchor or anchor in anchors(file)), f"{file}#{anchor}"


def test_each_page_can_be_found():
    """The README and the quickstart link every page."""
    starts = (ROOT / "README.md", ROOT / "docs" / "quickstart.md")
    found = {file for page in starts for file, _ in links(page)}
    assert [page.name for page in PAGES[1:] if page not in found] == []


def test_sources_name_pages_that_exist():
    """A renamed or removed page must be renamed or removed in comments and messages too."""
    files = [ROOT / "Makefile", ROOT / "pyproject.toml"]
    for top in ("ddexport", "runtime", "validate", "recipes", "tests", "examples"):
        files += [file for file in (ROOT / top).rglob("*") if file.suffix in {".py", ".yaml", ".sh", ".j2"}]
    named = [(file, name) for file in files for name in re.findall(r"docs/[\w-]+\.\w+", file.read_text())]
    assert [f"{file}: {name}" for file, name in named if not (ROOT / name).exists()] == []


def commands(page):
    """The command lines in fenced code and in `...` spans of a page, without placeholders and what follows a
    pipe."""
    text = page.read_text()
    lines = [line for block in FENCE.findall(text) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for line in lines:
        match = COMMAND.match(line.split(" #")[0].split(" | ")[0].split(" > ")[0].rstrip("\\"))
        if match:
            program, rest = match.groups()
            yield program, rest.replace("[", " ").replace("]", " ")


def command_for(program, words):
    """The click command that a command line calls, and the words that are left for it."""
    found = {point.name: point for point in entry_points(group="ddexport.commands")}
    if program == "ddexport":
        if not words or words[0].startswith("-") or words[0] not in found:
            return None, words
        command, words = found[words[0]].load(), words[1:]
    else:
        command = found["validate" if "validate" in program else "sample"].load()
    while isinstance(command, click.Group) and words and words[0] not in ("-h", "--help"):
        command = command.get_command(click.Context(command), words[0])
        words = words[1:]
    return command, words


@each_page
def test_commands_have_the_options_they_are_shown_with(page):
    """A renamed or removed option must be renamed or removed in the documentation too."""
    wrong = []
    for program, rest in commands(page):
        try:
            words = shlex.split(rest)
        except ValueError:
            words = rest.split()
        command, words = command_for(program, words)
        if command is None:
            continue
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        used = {w.split("=")[0] for w in words if re.match(r"--?[a-z]", w)}
        wrong += [f"{program} {rest.strip()}: {option}" for option in sorted(used - known)]
    assert not wrong


def test_the_readme_gives_options_values_that_they_take():
    """`trt --batch 1,8` has a known option, and is refused."""
    for program, rest in commands(ROOT / "README.md"):
        command, words = command_for(program, shlex.split(rest))
        if command is not None and "--help" not in words and not isinstance(command, click.Group):
            context = click.Context(command)
            values, left, _ = command.make_parser(context).parse_args(words)
            assert left == []
            for option in (p for p in command.params if isinstance(p, click.Option)):
                option.handle_parse_result(context, values, [])


def test_the_readme_shows_commands():
    """The check above sees the README's commands, so that it cannot pass by seeing none."""
    assert len(list(commands(ROOT / "README.md"))) >= 3
