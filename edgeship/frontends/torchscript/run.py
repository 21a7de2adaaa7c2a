"""Walks the syntax trees of a TorchScript archive: a small interpreter for the subset that ``torch.jit.save`` writes.

Tensors are torch's, so that ``torch.export`` sees the operators; numbers, lists and branches are worked out here. A
branch on a value that only the data tell is an error of the export.
"""

from __future__ import annotations

import ast
import math
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from edgeship.errors import LimitError, SourceError, UnsupportedOpError
from edgeship.frontends.torchscript.calls import find_call
from edgeship.frontends.torchscript.script import Script, Slot, Thing

# Statements and calls of one run, loops counted each time round.
MAX_STEPS = 2_000_000
_FIX = "export the model it was made from with torch.export.save, or name its factory"
_UNSET = object()


class _Returned(Exception):
    """Ends a function with its value."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class Run:
    """One call of an archive's module.

    Args:
        tensor: the tensor in a slot, as it is now.
    """

    def __init__(self, script: Script, tensor: Callable[[str], torch.Tensor]) -> None:
        self.script, self._tensor = script, tensor
        self._left = MAX_STEPS
        self._depth = 0
        self._changes: dict[int, tuple[Thing, dict[str, Any]]] = {}
        #: Attributes that the call assigned, by name.
        self.assigned: dict[str, None] = {}

    def forward(self, arguments: Sequence[Any]) -> Any:
        """What ``forward`` answers. Attributes are afterwards what they were before."""
        with self._restoring():
            return self._method(self.script.root, "forward", arguments, {})

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        try:
            yield
        finally:
            for thing, attributes in self._changes.values():
                thing.attributes = attributes

    def _refuse(self, node: ast.AST, what: str) -> UnsupportedOpError:
        line = getattr(node, "lineno", 0)
        return UnsupportedOpError(f"{self.script.what}: {what} (line {line} of its code) is not read", fix=_FIX)

    # Functions

    def _method(self, thing: Any, name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        if not isinstance(thing, Thing):
            raise SourceError(f"{self.script.what} calls {name[:60]} of what has no methods", fix=_FIX)
        method = self.script.classes[thing.kind].methods.get(name)
        if method is None:
            if name in ("__init__", "__enter__", "__exit__"):
                return None
            raise SourceError(f"{self.script.what}: {thing.kind[:80]} has no method {name[:60]}", fix=_FIX)
        return self._function(method, [thing, *arguments], named)

    def _function(self, function: ast.FunctionDef, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        names = [item.arg for item in function.args.args]
        scope: dict[str, Any] = dict(zip(names, arguments, strict=False))
        scope.update(named)
        first = len(names) - len(function.args.defaults)
        for name, default in zip(names[first:], function.args.defaults, strict=True):
            if name not in scope:
                scope[name] = self._value(default, {})
        if len(arguments) > len(names) or any(name not in scope for name in names):
            raise SourceError(f"{self.script.what}: a call of {function.name[:60]} does not fit", fix=_FIX)
        self._depth += 1
        if self._depth > 200:
            raise LimitError(f"{self.script.what} calls itself more than 200 deep", fix=_FIX)
        try:
            self._block(function.body, scope)
        except _Returned as done:
            return done.value
        finally:
            self._depth -= 1
        return None

    # Statements

    def _block(self, body: Sequence[ast.stmt], scope: dict[str, Any]) -> None:
        for statement in body:
            self._left -= 1
            if self._left < 0:
                raise LimitError(f"{self.script.what} takes more than {MAX_STEPS} steps", fix=_FIX)
            self._statement(statement, scope)

    def _statement(self, node: ast.stmt, scope: dict[str, Any]) -> None:
        match node:
            case ast.Assign():
                value = self._value(node.value, scope)
                for target in node.targets:
                    self._assign(target, value, scope)
            case ast.AnnAssign() if node.value is not None:
                self._assign(node.target, self._value(node.value, scope), scope)
            case ast.Expr():
                self._value(node.value, scope)
            case ast.Return():
                raise _Returned(None if node.value is None else self._value(node.value, scope))
            case ast.If():
                self._block(node.body if self._value(node.test, scope) else node.orelse, scope)
            case ast.For():
                for item in self._value(node.iter, scope):
                    self._assign(node.target, item, scope)
                    self._block(node.body, scope)
            case ast.While():
                while self._value(node.test, scope):
                    self._block(node.body, scope)
            case ast.With():
                # Of gradients; what else there is in TorchScript has methods that are run where they are written.
                self._block(node.body, scope)
            case ast.Pass() | ast.AnnAssign():
                pass
            case _:
                raise self._refuse(node, f"a statement of the kind {type(node).__name__}")

    def _assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        match target:
            case ast.Name():
                scope[target.id] = value
            case ast.Tuple() | ast.List():
                parts = list(value)
                if len(parts) != len(target.elts):
                    raise SourceError(f"{self.script.what} takes {len(parts)} values for another number", fix=_FIX)
                for part, item in zip(target.elts, parts, strict=True):
                    self._assign(part, item, scope)
            case ast.Attribute():
                thing = self._value(target.value, scope)
                if not isinstance(thing, Thing):
                    raise self._refuse(target, "an attribute of what is no object")
                self._changes.setdefault(id(thing), (thing, dict(thing.attributes)))
                thing.attributes[target.attr] = value
                self.assigned[target.attr] = None
            case ast.Subscript():
                self._value(target.value, scope)[self._value(target.slice, scope)] = value
            case _:
                raise self._refuse(target, f"an assignment to {type(target).__name__}")

    # Expressions

    def _value(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self._named(node, scope)
            case ast.Tuple():
                return tuple(self._value(item, scope) for item in node.elts)
            case ast.List():
                return [self._value(item, scope) for item in node.elts]
            case ast.Dict():
                pairs = zip(node.keys, node.values, strict=True)
                return {self._value(key, scope): self._value(item, scope) for key, item in pairs if key is not None}
            case ast.Attribute():
                return self._attribute(node, scope)
            case ast.Subscript():
                return self._value(node.value, scope)[self._value(node.slice, scope)]
            case ast.UnaryOp(op=ast.USub()):
                return -self._value(node.operand, scope)
            case ast.IfExp():
                return self._value(node.body if self._value(node.test, scope) else node.orelse, scope)
            case ast.Call():
                self._left -= 1
                return self._call(node, scope)
            case _:
                raise self._refuse(node, f"an expression of the kind {type(node).__name__}")

    def _named(self, node: ast.Name, scope: dict[str, Any]) -> Any:
        found = scope.get(node.id, _UNSET)
        if found is _UNSET:
            known = {"inf": math.inf, "nan": math.nan, "None": None}
            if node.id not in known:
                raise SourceError(f"{self.script.what} reads {node.id[:60]}, which nothing sets", fix=_FIX)
            return known[node.id]
        return found

    def _attribute(self, node: ast.Attribute, scope: dict[str, Any]) -> Any:
        path = _path(node)
        if path.startswith("CONSTANTS.c") and "CONSTANTS" not in scope and path[11:].isdigit():
            return self._held(self.script.constants[int(path[11:])])
        if path in self.script.functions and "__torch__" not in scope:
            return self.script.functions[path]
        value = self._value(node.value, scope)
        return self._member(node, value, node.attr)

    def _member(self, node: ast.expr, value: Any, name: str) -> Any:
        if isinstance(value, Thing):
            if name not in value.attributes:
                raise SourceError(f"{self.script.what}: {value.kind[:80]} has no {name[:60]}", fix=_FIX)
            return self._held(value.attributes[name])
        fields = getattr(type(value), "_fields", ())
        if isinstance(value, tuple) and name in fields:
            return value[fields.index(name)]
        raise self._refuse(node, f"{name[:60]} of what is no object of the archive")

    def _held(self, value: Any) -> Any:
        """An attribute's value: tensors of the archive as they are in the module now, in their own shapes."""
        if isinstance(value, Slot):
            return self._tensor(value.path)
        if isinstance(value, list) and any(isinstance(item, Slot) for item in value):
            return [self._held(item) for item in value]
        if isinstance(value, tuple):
            return tuple(self._held(item) for item in value)
        return value

    def _call(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        path = _path(node.func)
        if path in _FORMS:
            return self._form(path, node, scope)
        arguments = [self._value(item, scope) for item in node.args]
        named = {item.arg: self._value(item.value, scope) for item in node.keywords if item.arg is not None}
        root, _, rest = path.partition(".")
        if root in scope or not root:
            if not isinstance(node.func, ast.Attribute):
                function = self._value(node.func, scope)
                if not isinstance(function, ast.FunctionDef):
                    raise self._refuse(node, "a call of a value")
                return self._function(function, arguments, named)
            return self._method(self._value(node.func.value, scope), node.func.attr, arguments, named)
        if root == "torch":
            return self._operator(node, "aten", rest, arguments, named)
        if root == "ops":
            space, _, name = rest.partition(".")
            return self._operator(node, space, name, arguments, named)
        if root == "__torch__":
            return self._of_archive(node, path, arguments, named)
        if path in _PLAIN:
            return _PLAIN[path](*arguments)
        raise self._refuse(node, f"a call of {path[:80] or 'an expression'}")

    def _operator(self, node: ast.Call, space: str, name: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        # A trace remembers where it ran; here is one device.
        arguments = [torch.device("cpu") if isinstance(item, torch.device) else item for item in arguments]
        if name in _OF_SIZES and not named:
            arguments = self._of_numbers(node.args, arguments)
        try:
            return find_call(f"{space}.{name}")(*arguments, **named)
        except (TypeError, IndexError, KeyError, ValueError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:160]
            raise SourceError(f"{self.script.what}: {name[:60]} cannot be called so: {reason}", fix=_FIX) from error

    def _of_numbers(self, nodes: Sequence[ast.expr], arguments: list[Any]) -> list[Any]:
        """Arguments with numbers for the whole constants that a trace keeps as tensors ``[]``, where no other tensor is
        among them: sizes are computed so."""
        held: list[Any] = [
            self.script.tensors.get(_path(node)) if _path(node).startswith("CONSTANTS.") else None for node in nodes
        ]
        whole = [value is not None and value.dim() == 0 and value.dtype == torch.int64 for value in held]
        found = [
            int(value) if is_whole else given for value, is_whole, given in zip(held, whole, arguments, strict=True)
        ]
        return found if all(isinstance(item, int) for item in found) else arguments

    def _of_archive(self, node: ast.Call, path: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        if path in self.script.functions:
            return self._function(self.script.functions[path], arguments, named)
        if path.endswith(".__new__") and path.removesuffix(".__new__") in self.script.classes:
            return Thing(path.removesuffix(".__new__"))
        found = self.script.classes.get(path)
        if found is not None and found.fields:
            # Names of the archive are words of Python here and nothing else.
            plain = all(name.isidentifier() and not name.startswith("_") for name in found.fields)
            if plain and len(arguments) == len(found.fields):
                return namedtuple("Answer", found.fields, rename=True)(*arguments)
        raise self._refuse(node, f"a call of {path[:80]}")

    def _form(self, path: str, node: ast.Call, scope: dict[str, Any]) -> Any:
        """Calls whose first argument is a type, or a name."""
        if path == "uninitialized":
            return None
        if path == "getattr":
            value, name = self._value(node.args[0], scope), self._value(node.args[1], scope)
            return self._member(node, value, str(name))
        return self._value(node.args[1], scope)


# By which traces compute sizes.
_OF_SIZES = frozenset({"add", "sub", "mul", "floor_divide", "remainder"})
_FORMS = frozenset({"annotate", "unchecked_cast", "uninitialized", "getattr", "ops.prim.unchecked_cast"})
_PLAIN: Mapping[str, Callable[..., Any]] = {
    "int": find_call("aten.Int"), "float": find_call("aten.Float"), "bool": find_call("aten.Bool"),
    "str": str, "range": range, "list": list, "len": len,
}  # fmt: skip


def _path(node: ast.expr) -> str:
    """``torch.add`` of an attribute chain; empty where it hangs on anything but a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""
