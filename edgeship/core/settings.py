"""Options of passes as a user gives them: ``--set PASS.FIELD=VALUE`` as text, or values of the field's own type.

Both end in one mapping, ``{"compress/quantize": {"bits": 8}}``, whose names and types are checked here, once.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec

from edgeship.core.passes import Pass
from edgeship.core.records import from_plain, suggest
from edgeship.core.registry import find, passes
from edgeship.errors import UsageError

P = ParamSpec("P")
Options = Mapping[str, Mapping[str, Any]]
# No option of a pass means a number above this; NaN means nothing.
MOST_OPTION = 2**53


@dataclass(frozen=True)
class Settings:
    """Options of one pass: only those that were given. ``task`` is the pass's name."""

    task: str
    values: Mapping[str, Any]


def settings_of(task: Callable[P, Pass]) -> Callable[P, Settings]:
    """A pass as something that takes its options and remembers which were given.

    ``Quantize = settings_of(QuantizeWeights)``, then ``Quantize(bits=4)``: an option that is not given stays the
    planner's, one that is given is the user's even where it is the default. Editors know the options of the pass.

    Raises:
        UsageError: an option that the pass has not, or that follows from the request.
    """
    assert isinstance(task, type)
    assert issubclass(task, Pass)
    cls: type[Pass] = task

    def settings(*args: P.args, **kwargs: P.kwargs) -> Settings:
        try:
            given = inspect.signature(cls).bind_partial(*args).arguments
        except TypeError as error:
            raise UsageError(f"{cls.name}: {error}", fix="name each option") from None
        values = {**given, **kwargs}
        return Settings(cls.name, {name: typed_value(cls, name, value) for name, value in values.items()})

    settings.__name__ = settings.__qualname__ = cls.__name__
    settings.__doc__ = f"Options of {cls.name}. {cls.__doc__}"
    # What help() and notebooks show: the options that a user may give.
    shown = [item for name, item in inspect.signature(cls).parameters.items() if name in cls.options()]
    settings.__signature__ = inspect.Signature(shown, return_annotation=Settings)  # type: ignore[attr-defined]
    return settings


def parse_settings(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Every ``--set``, by pass and field; a later one replaces an earlier one.

    Raises:
        UsageError: another form, a pass or an option nobody knows, or a value of another type.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        left, equals, value = text.partition("=")
        name, dot, field = left.rpartition(".")
        if not equals or not dot:
            raise UsageError(f"--set {text!r} is not pass.field=value", fix="write compress/quantize.bits=8")
        cls = find("pass", passes(), name)
        options.setdefault(name, {})[field] = typed_value(cls, field, value)
    return options


def collect(given: Iterable[Settings], options: Options) -> dict[str, dict[str, Any]]:
    """Settings of passes, and options by name, as one mapping of typed values.

    Raises:
        UsageError: a pass or an option nobody knows, a value of another type, or one option given twice.
    """
    found: dict[str, dict[str, Any]] = {}
    for item in (*given, *(Settings(str(name), values) for name, values in options.items())):
        if not isinstance(item, Settings):
            raise UsageError(f"{item!r} is not a setting of a pass", fix="write passes=[edgeship.Quantize(bits=4)]")
        cls = find("pass", passes(), item.task)
        if not isinstance(item.values, Mapping):
            raise UsageError(
                f"options of {item.task} are {item.values!r}, not a table",
                fix='write {"compress/quantize": {"bits": 4}}',
            )
        mine = found.setdefault(item.task, {})
        for name, value in item.values.items():
            if name in mine:
                raise UsageError(f"{item.task}.{name} is given twice", fix="give it once")
            mine[name] = typed_value(cls, name, value)
    return found


def typed_value(cls: type[Pass], name: str, value: Any) -> Any:
    """A value in the type of the field that it is for; text is read as the type says.

    Raises:
        UsageError: the pass has no such option, it follows from the request, or the value is of another type.
    """
    if name in cls.follows():
        raise UsageError(f"{cls.name}.{name} is set by the command line", fix=f"change {cls.follows()[name]} instead")
    if name not in cls.options():
        raise UsageError(f"{cls.name} has no option {name}", fix=suggest(name, cls.options()))
    hint = typing.get_type_hints(cls)[name]
    where = f"{cls.name}.{name}"
    if isinstance(value, str):
        value = _parsed(hint, value, where)
    elif isinstance(value, list):
        value = tuple(value)
    _refuse_huge(value, str(value), where)
    try:
        from_plain(hint, value, where)
    except UsageError as error:
        raise UsageError(error.what, fix=error.fix or "see its options in edgeship passes") from None
    return value


def _parsed(hint: Any, text: str, where: str) -> Any:
    """Text as the field's type; what does not parse stays text, and the check of the type names it."""
    types = set(typing.get_args(hint)) or {hint}
    if type(None) in types and text.lower() == "none":
        return None
    if bool in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    # A whole number stays one where a fraction may stand: it is shown as it was written.
    numbers = [number for number in (int, float) if float in types or number in types]
    for number in numbers:
        try:
            value = number(text)
        except ValueError:
            continue
        _refuse_huge(value, text, where)
        return value
    literals = [item for item in typing.get_args(hint) if not isinstance(item, (str, type)) and str(item) == text]
    if literals:
        return literals[0]
    if typing.get_origin(hint) is tuple:
        return tuple(_parsed(typing.get_args(hint)[0], item, where) for item in text.split(",") if item)
    return text


def _refuse_huge(value: Any, text: str, where: str) -> None:
    if isinstance(value, (int, float)) and not abs(value) <= MOST_OPTION:
        raise UsageError(f"{where} of {text[:40]} is not a usable number", fix="give a smaller one")
