"""Whose code an error is from."""

import sys
import types
from types import SimpleNamespace

import pytest

from edgeship.core import plugins

SOURCE = """
import json

def fails(): return 1 / 0
def passes_on(call): return call()
def in_a_library(): return json.loads("{")
"""


@pytest.fixture
def stranger(monkeypatch):
    """A module of a package that an entry point names."""
    module = types.ModuleType("stranger.inner")
    exec(compile(SOURCE, "stranger/inner.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "stranger.inner", module)
    point = SimpleNamespace(name="stranger", load=lambda: module.fails)
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [point])
    monkeypatch.setattr(plugins, "_packages", set())
    assert [name for name, _ in plugins.loaded("edgeship.anything")] == ["stranger"]
    return module


def error_of(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return error
    raise AssertionError


def test_an_error_is_of_the_code_that_called_last(stranger):
    from edgeship.core.units import parse_bytes

    assert plugins.author_of(error_of(stranger.fails)) == "stranger"
    assert plugins.author_of(error_of(stranger.in_a_library)) == "stranger"
    # A function of ours, called by the plug-in with what it cannot take, is ours to answer for.
    assert plugins.author_of(error_of(stranger.passes_on, lambda: parse_bytes(None))) == ""
    assert plugins.author_of(error_of(lambda: 1 / 0)) == ""
    assert plugins.author_of(ValueError("never raised")) == ""
