"""Docstrings name what is there: every name under ``Args:`` is a field of the record or a parameter of the function."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import edgeship

# ``name: text``, ``one, two: text``, at the start of a line or behind a full stop.
NAMES = re.compile(r"(?:^|(?<=\. ))([a-z_]\w*(?:, [a-z_]\w*)*): ", re.MULTILINE)


def modules() -> list[str]:
    return [item.name for item in pkgutil.walk_packages(edgeship.__path__, "edgeship.") if "worker" not in item.name]


def named(doc: str) -> list[str]:
    section = re.search(r"^(?: {4})*Args:\n((?: +.*\n)+)", doc + "\n", re.MULTILINE)
    text = textwrap.dedent(section[1]) if section else ""
    return [name for found in NAMES.findall(text) for name in found.split(", ")]


@pytest.mark.parametrize("name", modules())
def test_records_document_fields_that_exist(name):
    module = importlib.import_module(name)
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == name and dataclasses.is_dataclass(cls):
            missing = [
                word
                for word in named(cls.__doc__ or "")
                if word not in {field.name for field in dataclasses.fields(cls)} and not hasattr(cls, word)
            ]
            assert not missing, f"{cls.__name__} documents {missing}"


@pytest.mark.parametrize("name", modules())
def test_functions_document_parameters_that_exist(name):
    module = importlib.import_module(name)
    places = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    for function in (value for place in places for value in vars(place).values()):
        function = getattr(function, "__func__", function)
        if inspect.isfunction(function) and function.__module__ == name:
            known = inspect.signature(function).parameters
            missing = [word for word in named(function.__doc__ or "") if word not in known]
            assert not missing, f"{function.__qualname__} documents {missing}"


def test_the_names_are_found():
    doc = """A record.

    Args:
        first: one. second, third: two
            and more: of it.
        fourth: last.
    """
    assert named(doc) == ["first", "second", "third", "fourth"]
