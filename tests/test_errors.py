"""What the machine cannot do is told as that, whichever library says it, and never as a bug of edgeship's."""

from __future__ import annotations

import pytest

from edgeship.errors import LimitError, MissingToolError, SourceError, UsageError, meaning_of


def raised_by(code: str) -> BaseException:
    try:
        exec(code, {})
    except BaseException as error:  # the errors under test
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        ("import torch; torch.full((10**7, 10**7), 1.0)", LimitError, "more memory than there is"),
        ("import numpy; numpy.ones((10**7, 10**7))", LimitError, "more memory than there is: "),
        ("bytearray(10**16)", LimitError, "more memory than there is"),
        ("raise MemoryError", LimitError, "more memory than there is"),
        ("f = lambda n: f(n + 1)\nf(0)", LimitError, "nested too deeply"),
        ("import json; json.loads('[' * 10**6)", LimitError, "nested too deeply"),
        (
            "try:\n  raise MemoryError\nexcept MemoryError as e:\n  raise RuntimeError('it broke') from e",
            LimitError,
            "memory",
        ),
        ("raise RuntimeError('std::bad_alloc')", LimitError, "memory"),
        ("import ctypes; ctypes.CDLL('libnothing.so')", MissingToolError, "libnothing.so"),
        ("raise ImportError('x.so: undefined symbol: y')", MissingToolError, "undefined symbol"),
        ("import no_such_package", MissingToolError, "no_such_package"),
        ("int('9' * 5000)", UsageError, "digits"),
        ("open('a' * 300)", SourceError, "File name too long"),
        ("open('/')", SourceError, "Is a directory"),
        ("import torch; torch.tensor([1]) // torch.tensor([0])", SourceError, "divides integers by zero"),
        ("open(chr(0))", UsageError, "zero byte"),
    ],
)
def test_what_a_failure_means(code, kind, says):
    found = meaning_of(raised_by(code))
    assert type(found) is kind
    assert says in str(found)
    assert found.fix


@pytest.mark.parametrize("code", ["1 / 0", "[][1]", "assert False", "import edgeship.nothing", "raise KeyError('x')"])
def test_bugs_stay_bugs(code):
    assert meaning_of(raised_by(code)) is None


def test_an_error_on_purpose_stays_as_it_is():
    assert meaning_of(SourceError("x", fix="y")) is None
    limit = LimitError("x", fix="y")
    assert meaning_of(limit) is limit


def test_the_command_line_answers_all_of_them(cli, tmp_path, monkeypatch):
    from edgeship.shipping import inspection

    for error, code in ((MemoryError(), 9), (RecursionError(), 9), (ImportError("no"), 6), (ZeroDivisionError(), 70)):

        def fails(path, error=error):
            raise error

        monkeypatch.setattr(inspection, "inspect_path", fails)
        ran = cli("inspect", tmp_path)
        assert ran.code == code
        assert len(ran.errors) == 1
