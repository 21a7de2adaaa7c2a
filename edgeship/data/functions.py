"""Load a Python function that the user named: ``path/to/file.py:function`` or ``package.module:function``."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgeship.errors import UsageError


def load_function(reference: str) -> Callable[..., Any]:
    """The function behind a reference. The file's own folder is importable while it loads.

    Raises:
        UsageError: no such file, module or function, or the file fails while it is imported.
    """
    head, _, name = reference.rpartition(":")
    if not head or not name.isidentifier():
        raise UsageError(f"{reference!r} names no function", fix="give path/to/file.py:function")
    try:
        module = _load_file(Path(head)) if head.endswith(".py") else importlib.import_module(head)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UsageError(f"{head} cannot be imported: {reason}", fix="run it with python to see where") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise _unknown(head, name, known)
    return function  # type: ignore[no-any-return]


def check_function(reference: str) -> None:
    """Read the file of ``file.py:function``, without running it, and refuse a function that it cannot have.

    Raises:
        UsageError: nothing at the top of the file has that name. What only running can tell (a ``*`` import, a syntax
            error, a package's module) is left to `load_function`.
    """
    head, _, name = reference.rpartition(":")
    if not head.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(head).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            named.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            named.add(node.id)
        elif isinstance(node, ast.alias):
            named.add((node.asname or node.name).partition(".")[0])
    dynamic = {"*", "globals", "setattr", "exec", "__getattr__"}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if name not in named and dynamic.isdisjoint(named | used):
        functions = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        raise _unknown(head, name, functions)


def _unknown(head: str, name: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    way_out = f"did you mean {head}:{near[0]}?" if near else f"it has {', '.join(known)[:300] or 'none'}"
    return UsageError(f"{head} has no function {name}", fix=way_out)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path} does not exist", fix="give path/to/file.py:function")
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(f"edgeship_source_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file", fix="give path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(spec.name)
    # It stays there, as any module that was imported: its classes and dataclasses look it up.
    sys.modules[spec.name] = module
    try:
        with _importable(str(path.parent)):
            spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            sys.modules.pop(spec.name, None)
        else:
            sys.modules[spec.name] = before
        raise
    return module


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Modules of a folder can be imported inside."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        # The module may have taken it out itself.
        with suppress(ValueError):
            sys.path.remove(folder)
