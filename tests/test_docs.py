"""The documentation keeps its promises: links lead somewhere, and commands have the options that they are
shown with."""

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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    """A relative link or picture names a file of the project."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    lost = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not lost


def commands(page):
    """The command lines in fenced code and in `...` spans of a page, without placeholders and what follows a
    pipe."""
    text = page.read_text()
    lines = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
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
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        command = command.get_command(click.Context(command), words[0])
        words = words[1:]
    return command, words


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
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


def test_the_readme_shows_commands():
    """The check above sees the README's commands, so that it cannot pass by seeing none."""
    assert len(list(commands(ROOT / "README.md"))) >= 3
