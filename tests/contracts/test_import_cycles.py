"""No module of edgeship needs itself by a detour: imports for types alone and imports inside functions count as well."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "edgeship"


def sources() -> dict[str, str]:
    """Every module of edgeship by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def imports(text: str, known: Mapping[str, str]) -> Iterator[str]:
    """The modules that a text imports anywhere in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module or ""


def cycles(texts: Mapping[str, str]) -> list[list[str]]:
    """Modules that can be reached from themselves, one way round for each group of them."""
    graph = {
        name: {item for item in imports(text, texts) if item in texts and item != name} for name, text in texts.items()
    }
    # What imports nothing that is left can be in no cycle.
    while ends := {name for name, needs in graph.items() if not needs}:
        graph = {name: needs - ends for name, needs in graph.items() if name not in ends}
    found = []
    while graph:
        way = [next(iter(graph))]
        while (step := min(graph[way[-1]] & graph.keys(), default="")) and step not in way:
            way.append(step)
        found.append([*way[way.index(step) :], step] if step else [])
        graph = {name: needs for name, needs in graph.items() if name not in way}
    return [way for way in found if way]


def test_no_module_imports_itself_by_a_detour() -> None:
    assert [" -> ".join(way) for way in cycles(sources())] == []


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ({"a": "import b", "b": "import c", "c": ""}, []),
        ({"a": "import b", "b": "def f():\n    from a import x", "c": "import a"}, [["a", "b", "a"]]),
        (
            {
                "a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from b import B",
                "b": "from c import d",
                "c": "",
                "c.d": "import a",
            },
            [["a", "b", "c.d", "a"]],
        ),
        ({"a": "from c import d", "c": "", "c.d": "import a"}, [["a", "c.d", "a"]]),
    ],
)
def test_detours_are_found(texts, wanted) -> None:
    assert cycles(texts) == wanted
