"""The pages that say how something is added show what the packages beside this file are made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = {
    "adding-a-runtime": "zipgraph",
    "adding-a-device": "locker",
    "adding-a-pass": "clip",
    "adding-an-encoding": "nf4",
}
# A file's name in backquotes, alone on its line but for a colon, and the block behind it.
SHOWN = re.compile(r"^`(tests/plugins/\S+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(python|toml)$", re.MULTILINE)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_block_of_code_is_a_part_of_the_package(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    shown = SHOWN.findall(text)
    assert len(shown) == len(BLOCK.findall(text)), "a block does not say which file it is from"
    for name, block in shown:
        assert block in (ROOT / name).read_text(encoding="utf-8"), f"{page}: {name} is another"


@pytest.mark.parametrize(("page", "package"), PAGES.items())
def test_every_file_of_the_package_is_on_its_page(page, package):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    files = [path for path in (HERE / package).rglob("*") if path.suffix in (".py", ".toml")]
    missing = [
        path.name for path in files if path.name != "__init__.py" and path.relative_to(ROOT).as_posix() not in text
    ]
    assert not missing
