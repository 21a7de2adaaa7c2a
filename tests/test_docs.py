"""The code blocks of README, CONTRIBUTING and docs/ are what they say: run, compiled, parsed, or marked as prose.

The language of a block decides what is asked of it:

- ``python`` and ``bash`` are run, in a folder with ``samples/`` and the bundle ``digits_cnn.edgeship``; those under a comment
  ``<!-- heavy -->`` by ``make test-all`` only;
- ``py`` is compiled; commands of edgeship in ``sh`` and ``console`` are parsed; ``toml`` and ``json`` are read;
- ``text``, ``swift`` and ``kotlin`` are shown;
- under a line `` `tests/...`: `` a block is that file or a part of it. What ``docs/adding-*.md`` show is run by `tests/plugins`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgeship.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("python", "bash")
LANGUAGES = (*RUN, "py", "sh", "console", "toml", "json", "text", "swift", "kotlin")
BLOCK = re.compile(r"^(?P<before>[^\n]*\n)(?:\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    where: str
    language: str
    text: str
    heavy: bool
    file: str
    """The file that the block is, or nothing."""


def blocks_of(page: Path) -> list[Block]:
    found = []
    text = "\n\n" + page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text[: match.start("text")].count("\n") - 2
        heavy = match["before"].strip() == "<!-- heavy -->"
        named = re.fullmatch(r"`(tests/.*)`:", match["before"].strip())
        where = f"{page.relative_to(ROOT)}:{line}"
        found.append(Block(where, match["language"], match["text"], heavy, named[1] if named else ""))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(block: Block) -> list[list[str]]:
    """The commands of edgeship that a block shows, as lists of words."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        shown = line.removeprefix("$ ") if block.language == "console" else line
        if shown.startswith("edgeship ") and (shown != line or block.language == "sh"):
            found.append(shlex.split(shown, comments=True)[1:])
    return found


def runnable() -> list[object]:
    cases = []
    for block in BLOCKS:
        if block.language in RUN and not block.file and not block.where.startswith("docs/adding-"):
            marks = [pytest.mark.xdist_group("digits"), *([pytest.mark.heavy] if block.heavy else [])]
            cases.append(pytest.param(block, id=block.where, marks=marks))
    return cases


@pytest.mark.parametrize("block", BLOCKS, ids=[block.where for block in BLOCKS])
def test_a_block_says_what_it_is(block):
    assert block.language in LANGUAGES, f"{block.where}: say one of {', '.join(LANGUAGES)} behind the fence"
    if block.file:
        assert block.text in (ROOT / block.file).read_text(encoding="utf-8"), f"{block.where} is not in {block.file}"
    if block.language in ("py", "python"):
        # A method of a class that is shown in parts begins with its indentation.
        ast.parse(textwrap.dedent(block.text))
    if block.language == "toml":
        tomllib.loads(block.text)
    if block.language == "json":
        json.loads(block.text)


@pytest.mark.parametrize("block", [block for block in BLOCKS if commands_of(block)], ids=lambda block: block.where)
def test_commands_that_a_page_shows_exist(block):
    for command in commands_of(block):
        words = [word for word in command if word != "|"]
        if words[0].startswith("--") or len(words) == 1:
            continue
        parent = cli.make_context("edgeship", [], resilient_parsing=True)
        context = cli.commands[words[0]].make_context(words[0], list(words[1:]), parent=parent)
        assert context.params


@pytest.mark.parametrize("block", runnable())
def test_a_block_runs(block, digits_bundle, tmp_path):
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / "digits_cnn.edgeship").symlink_to(digits_bundle)
    shell = ["bash", "-euo", "pipefail", "-c", block.text]
    command = [sys.executable, "-c", block.text] if block.language == "python" else shell
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, f"{block.where}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}"


def test_every_page_is_read():
    assert len(BLOCKS) > 20
    assert {block.language for block in BLOCKS} >= {"bash", "sh", "toml"}
    assert not [block.where for block in BLOCKS if "```" in block.text]


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
    assert not broken
