"""A TorchScript archive for export: a module with its weights by the archive's names, and what calls it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.core.names import quoted
from edgeship.data.specs import Fixed, in_command
from edgeship.errors import SourceError, UsageError
from edgeship.frontends.torchscript.run import Run
from edgeship.frontends.torchscript.script import Script


@dataclass(frozen=True)
class Argument:
    """What ``forward`` takes.

    Args:
        kind: its type as it is written, ``Tensor`` where nothing is. has_default: it may be left out.
    """

    name: str
    kind: str
    has_default: bool

    @property
    def inner(self) -> str:
        """Its type where it is there at all."""
        return self.kind.removeprefix("Optional[").removesuffix("]") if self.kind.startswith("Optional[") else self.kind


class Scripted:
    """An archive's ``forward`` for export: a module that holds its tensors by their names, and how it is called.

    Args:
        taken: names of the inputs that calls give, in order. fixed: values of inputs that are constants.
    """

    def __init__(self, script: Script, taken: Sequence[str], fixed: Mapping[str, Any]) -> None:
        self.script = script
        self._taken, self._fixed = list(taken), dict(fixed)
        self._names = [item.name for item in arguments_of(script)]
        #: Attributes that a call assigned: each call begins with the values of the archive.
        self.assigned: dict[str, None] = {}
        self.module = nn.Module()
        # Of each slot: where the module keeps it.
        self._places: dict[str, tuple[str, str]] = {}
        for path, value in script.tensors.items():
            self._keep(path, value)

    def call(self, module: nn.Module, *tensors: torch.Tensor) -> Any:
        """What the archive's module answers to the inputs that are not fixed, with the tensors of ``module``."""
        given = {**self._fixed, **dict(zip(self._taken, tensors, strict=True))}

        def tensor(path: str) -> torch.Tensor:
            """The tensor in a slot, in its own shape."""
            home, leaf = self._places[path]
            found: torch.Tensor = getattr(module.get_submodule(home), leaf)
            return found

        run = Run(self.script, tensor)
        # Defaults stand at the end: what comes before the last that is given must be given.
        last = max((place for place, name in enumerate(self._names) if name in given), default=-1)
        answer = run.forward([given[name] for name in self._names[: last + 1]])
        self.assigned.update(run.assigned)
        return answer

    def _keep(self, path: str, value: torch.Tensor) -> None:
        parts = [f"{part}_" if not part or hasattr(nn.Module(), part) else part for part in path.split(".")]
        home = self.module
        for part in parts[:-1]:
            if part not in dict(home.named_children()):
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
        leaf = parts[-1]
        while hasattr(home, leaf):
            leaf += "_"
        if path in self.script.weights and value.is_floating_point():
            home.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        else:
            home.register_buffer(leaf, value)
        self._places[path] = (".".join(parts[:-1]), leaf)


def arguments_of(script: Script) -> list[Argument]:
    """What ``forward`` takes besides the module. Raises `SourceError` where there is no forward."""
    forward = script.classes[script.root.kind].methods.get("forward")
    if forward is None:
        raise SourceError(f"{script.what} has no forward", fix="save a module with forward")
    listed = forward.args.args[1:]
    first = len(listed) - len(forward.args.defaults)
    return [
        Argument(item.arg, "Tensor" if item.annotation is None else ast.unparse(item.annotation), place >= first)
        for place, item in enumerate(listed)
    ]


def split_arguments(
    script: Script, specs: Sequence[TensorSpec], fixed: Sequence[Fixed]
) -> tuple[list[TensorSpec], dict[str, Any]]:
    """The inputs of a call in the order of ``forward``, and the values of those that are constants.

    Raises:
        UsageError: a name that forward does not have, a value of another type, or an input that nothing is said of.
    """
    arguments = arguments_of(script)
    names = [item.name for item in arguments]
    by_name = {spec.name: spec for spec in specs}
    values = {item.name: item.values for item in fixed}
    for name in (*by_name, *values):
        if name not in names:
            raise UsageError(
                f"forward of {script.what} has no input {quoted(name)}", fix=f"it takes {', '.join(names) or 'nothing'}"
            )
    chosen: dict[str, Any] = {}
    taken: list[TensorSpec] = []
    for place, item in enumerate(arguments):
        if item.name in by_name:
            if item.inner != "Tensor":
                raise UsageError(
                    f"input {item.name} of {script.what} is of type {item.kind[:60]}, no tensor",
                    fix=f"fix its value: {in_command(item.name, '=VALUE')}",
                )
            taken.append(by_name[item.name])
        elif item.name in values:
            chosen[item.name] = _typed(item, values[item.name], script.what)
        elif not item.has_default or any(later in by_name or later in values for later in names[place:]):
            example = ":f32[1,3,224,224]" if item.inner == "Tensor" else "=VALUE"
            raise UsageError(
                f"{script.what} does not say the size or value of its input {item.name} ({item.kind[:60]})",
                fix=f"add {in_command(item.name, example)}",
            )
    return taken, chosen


def _typed(item: Argument, value: Any, what: str) -> Any:
    """A fixed value as forward's type wants it: a tensor of its own shape, or a number."""
    inner = item.inner
    if inner == "Tensor":
        return torch.tensor(value)
    fits = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, (int, float)) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
        "List[int]": isinstance(value, list) and all(isinstance(part, int) for part in value),
        "List[float]": isinstance(value, list) and all(isinstance(part, (int, float)) for part in value),
    }
    if not fits.get(inner, False):
        raise UsageError(
            f"input {item.name} of {what} is of type {item.kind[:60]}, its value {value!r} is not",
            fix=f"give a value of that type: {in_command(item.name, '=VALUE')}",
        )
    return float(value) if inner == "float" else value
