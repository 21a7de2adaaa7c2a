"""What a TorchScript archive holds: its object with attributes, constants, and its classes as syntax trees.

The source is Python's syntax in a small subset. It is parsed and never compiled; `edgeship.frontends.torchscript.run`
walks the trees.
"""

from __future__ import annotations

import ast
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeship.errors import SourceError
from edgeship.program.checkpoint import Checkpoint, storage_of
from edgeship.program.pickled import MAX_BYTES, read_pickle
from edgeship.program.pickled_values import Name, PlainObject, TensorRecord
from edgeship.program.zipped import Zipped

# Of all sources together; a network of a thousand layers has some 2 MB.
MAX_SOURCE_BYTES = 64 << 20
_WAY_OUT = "export the model it was made from with torch.export.save, or name its factory"


@dataclass
class Thing:
    """An object of a class of the archive.

    Args:
        kind: the class, ``__torch__.net.Net``. attributes: by name; a tensor is a `Slot`.
    """

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slot:
    """A tensor that the archive keeps. Args: path: its name in the module, ``layer.weight``."""

    path: str


@dataclass(frozen=True)
class Class:
    """A class of the archive.

    Args:
        methods: by name. parameters: attributes that are weights. fields: of a named tuple.
    """

    methods: Mapping[str, ast.FunctionDef]
    parameters: frozenset[str]
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Script:
    """An archive.

    Args:
        what: names the file in errors. root: the module that was saved. classes, functions: by full name.
        constants: ``CONSTANTS.c0`` ... in order. tensors: what each `Slot` holds. weights: slots that are parameters.
    """

    what: str
    root: Thing
    classes: Mapping[str, Class]
    functions: Mapping[str, ast.FunctionDef]
    constants: tuple[Any, ...]
    tensors: Mapping[str, Any]
    weights: frozenset[str]


def read_script(path: Path) -> Script:
    """Read an archive. Nothing in it runs.

    Raises:
        SourceError: damaged, or it keeps what is not read (quantized weights, custom classes).
    """
    what = path.name
    file = path.open("rb")
    entries = Zipped(file, what, "TorchScript archive", packed="code")
    classes, functions = _sources(entries, what)
    contents = {}
    for part in ("data", "constants"):
        listed = [name for name in entries.names() if name.startswith(f"{part}/")]
        places = {name.removeprefix(f"{part}/"): entries.place(name) for name in listed}
        content = read_pickle(
            io.BytesIO(entries.read(f"{part}.pkl", MAX_BYTES)), what, storage=lambda pid: storage_of(pid, what),
            fix=_WAY_OUT, inert=True,
        )  # fmt: skip
        contents[part] = Checkpoint(content, file, places, what)
    reader = _Reader(what, classes)
    root = reader.object_of(contents["data"], contents["data"].content, "")
    if not isinstance(root, Thing):
        raise SourceError(f"{what} holds no TorchScript module", fix=_WAY_OUT)
    held = contents["constants"]
    constants = tuple(reader.object_of(held, item, f"CONSTANTS.c{place}") for place, item in enumerate(held.content))
    return Script(what, root, classes, functions, constants, reader.tensors, frozenset(reader.weights))


class _Reader:
    """Turns plain records of pickles into `Thing`, `Slot` and containers."""

    def __init__(self, what: str, classes: Mapping[str, Class]) -> None:
        self.what, self.classes = what, classes
        self.tensors: dict[str, Any] = {}
        self.weights: set[str] = set()
        self._seen: dict[int, Any] = {}
        self._records: dict[tuple[int, TensorRecord], Slot] = {}

    def object_of(self, checkpoint: Checkpoint, value: Any, path: str) -> Any:
        """A value with everything in it; the same object of the pickle is the same object here."""
        if isinstance(value, TensorRecord):
            return self._tensor(checkpoint, value, path)
        if isinstance(value, (list, dict, PlainObject)) and id(value) in self._seen:
            return self._seen[id(value)]
        if isinstance(value, PlainObject):
            return self._thing(checkpoint, value, path)
        if isinstance(value, list):
            made: list[Any] = []
            self._seen[id(value)] = made
            made.extend(self.object_of(checkpoint, item, f"{path}.{place}") for place, item in enumerate(value))
            return made
        if isinstance(value, tuple):
            return tuple(self.object_of(checkpoint, item, f"{path}.{place}") for place, item in enumerate(value))
        if isinstance(value, dict):
            return {key: self.object_of(checkpoint, item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, Name):
            return value.path
        return value

    def _thing(self, checkpoint: Checkpoint, value: PlainObject, path: str) -> Thing:
        if value.kind not in self.classes:
            raise SourceError(f"{self.what} keeps an object of {value.kind[:100]}, which is not read", fix=_WAY_OUT)
        thing = Thing(value.kind)
        self._seen[id(value)] = thing
        weights = self.classes[value.kind].parameters
        for name, item in value.attributes.items():
            inner = f"{path}.{name}" if path else name
            made = self.object_of(checkpoint, item, inner)
            thing.attributes[name] = made
            if isinstance(made, Slot) and name in weights:
                self.weights.add(made.path)
        return thing

    def _tensor(self, checkpoint: Checkpoint, value: TensorRecord, path: str) -> Slot:
        # Two attributes may be one tensor.
        known = self._records.get((id(checkpoint), value))
        if known is not None:
            return known
        slot = Slot(path)
        # Numbers of the archive, whatever device they were on.
        self.tensors[path] = checkpoint.tensor(value).clone()
        self._records[id(checkpoint), value] = slot
        if path.startswith("CONSTANTS.") and self.tensors[path].dim() > 0:
            self.weights.add(path)
        return slot


def _sources(entries: Zipped, what: str) -> tuple[dict[str, Class], dict[str, ast.FunctionDef]]:
    """Classes and functions of every source, by full name."""
    classes: dict[str, Class] = {}
    functions: dict[str, ast.FunctionDef] = {}
    left = MAX_SOURCE_BYTES
    for name in entries.names():
        if not (name.startswith("code/") and name.endswith(".py")):
            continue
        content = entries.read(name, left)
        left -= len(content)
        module = name.removeprefix("code/").removesuffix(".py").replace("/", ".")
        for node in _parsed(content, f"{what} ({name})").body:
            if isinstance(node, ast.ClassDef):
                classes[f"{module}.{node.name}"] = _class_of(node)
            elif isinstance(node, ast.FunctionDef):
                functions[f"{module}.{node.name}"] = node
    return classes, functions


def _parsed(content: bytes, where: str) -> ast.Module:
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise SourceError(
            f"{where} is not readable: {reason}", fix="save the model again with torch.jit.save"
        ) from None


def _class_of(node: ast.ClassDef) -> Class:
    methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    parameters: frozenset[str] = frozenset()
    for item in node.body:
        if not (isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name)):
            continue
        if item.targets[0].id == "__parameters__" and isinstance(item.value, ast.List):
            parameters = frozenset(str(part.value) for part in item.value.elts if isinstance(part, ast.Constant))
    is_tuple = any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in node.bases)
    declared = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
    fields = tuple(target.id for target in declared if isinstance(target, ast.Name)) if is_tuple else ()
    return Class(methods, parameters, fields)
