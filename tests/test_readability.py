"""What a stranger cannot take in one glance is refused; what is counted is counted right."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    place = ROOT / "benchmarks" / "readability.py"
    spec = importlib.util.spec_from_file_location("readability", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules["readability"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures(script):
    return script.read_tree(ROOT / "edgeship")


def test_no_comprehension_stands_in_another(figures):
    assert not figures.nested


def test_no_conditional_expression_stands_in_another(figures):
    assert not figures.nested_conditionals


def test_no_function_is_above_a_complexity_of_15(figures):
    assert [where for count, where in figures.complexity if count > 15] == []


def test_four_of_five_tensor_functions_name_a_shape(figures):
    assert figures.shape_share >= 0.8, figures.shapeless


def test_modules_import_each_other_in_no_circle(figures):
    assert figures.cycles == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[out, in] -> [out, in / group, group]", True),
        ("``(N, K)``, rounded", True),
        ("Along ``axis``.", True),
        ("Any shape.", True),
        ("One number a channel.", True),
        ("Raises `WeightsError` when a value does not fit.", False),
        ("items[0] and (magnitude, wanda)", False),
    ],
)
def test_a_shape_is_told_from_other_brackets(script, text, says):
    assert bool(script.SHAPE.search(text)) == says


def test_a_circle_of_imports_is_found_and_a_line_is_none(script):
    line = {"a": {"b"}, "b": {"c"}, "c": set()}
    assert script.cycles_of(line) == []
    assert script.cycles_of({**line, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_types_alone_make_a_circle_too(script):
    text = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B\ndef f():\n    from p.c import C\n"
    )
    assert script.imports_of(ast.parse(text), "p.a", {"p.a", "p.b", "p.c"}) == {"p.b"}


@pytest.mark.parametrize(
    ("text", "nested"),
    [("[[a for a in b] for b in c]", 1), ("[a for b in c for a in b]", 0), ("[f(a) for a in sorted(b for b in c)]", 1)],
)
def test_what_is_nested(script, text, nested):
    assert sum(map(script.nested_comprehension, ast.walk(ast.parse(text)))) == nested


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("class GemmaNorm", "Gemma"),
        ('"llama-2"', "llama"),
        ("llama2.c", None),
        ("prompt", None),
        ("emphasis", None),
        ("phi3", "phi"),
    ],
)
def test_families_are_known_by_their_names(script, text, word):
    match = script.FAMILIES.search(text)
    assert (match and match.group()) == word
