"""Read a torch.export archive (``.pt2``) without running anything that is in it.

``torch.export.load`` unpickles sample inputs, weights and opaque objects, gives size expressions to ``eval`` (sympy),
loads compiled libraries, resolves operators by any path below ``torch`` (``torch.os.system`` is one), imports modules
that tree specs name, and pastes names into the Python source that it makes of a graph. So none of it sees the file.
Here the graph's JSON is checked against torch's own schema, field by field, and

- names are names: identifiers for values, no quotes or line ends in the names of weights;
- operators are those of `_NAMESPACES`, `_SCALAR_OPERATORS` and `_HIGHER`; without those that touch files;
- sizes are numbers: a file with size expressions is dynamic, which is refused, so no expression is ever parsed;
- tree specs are lists, tuples and dicts;
- weights are raw bytes, or pickles read by `edgeship.program.pickled`; sizes are compared with what is there;

then torch's deserializer gets the checked records and tensors, and no file. What does not fit is refused; the user may
say ``--trust``, and torch loads the file as it is.
"""

from __future__ import annotations

import enum
import io
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin

from edgeship.errors import LimitError, SourceError, UnsafeSourceError
from edgeship.program.checkpoint import MAX_EXPANDED_BYTES, check_window, read_bytes, read_checkpoint
from edgeship.program.pickled import named_in
from edgeship.program.pickled_values import TensorRecord
from edgeship.program.zipped import Zipped

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

# Of the graph as JSON: a model of 10,000 operators has some 20 MB.
MAX_GRAPH_BYTES = 512 << 20
MAX_DEPTH = 64
# Tracing and the passes take milliseconds an operator.
MAX_NODES = 50_000
MAX_PICKLE = 64 << 20
MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
TRUST = "read what it holds, and add --trust to let torch load it all the same"

_NAMESPACES = ("aten", "prims", "quantized_decomposed", "torchvision")
# They open files, and print.
_NOT_ATEN = ("from_file", "_print")
_HIGHER = (
    "wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "while_loop", "scan", "associative_scan", "map_impl",
    "invoke_subgraph", "hints_wrapper",
)  # fmt: skip
_SCALAR_OPERATORS = {
    *(f"_operator.{name}" for name in (
        "eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod", "pow", "truediv",
        "and_", "or_", "lshift", "rshift", "getitem", "abs", "not_",
    )),
    *(f"math.{name}" for name in ("trunc", "ceil", "floor", "sqrt")),
    *(f"torch.{name}" for name in (
        "sym_not", "sym_int", "sym_float", "sym_ite", "sym_max", "sym_min", "sym_sqrt", "_sym_sqrt", "sym_sum",
    )),
}  # fmt: skip
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)(\.\w+)?", re.ASCII)
_WEIGHT_NAME = re.compile(r"[\w .:/+\-]*")
_TEXTS = ("nn_module_stack",)
_ALL_TEXTS = ("nn_module_stack", "stack_trace", "torch_fn", "custom", "source_fn_stack", "from_node")
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def read_archive(path: Path, *, own: bool = False) -> ExportedProgram:
    """The program of a ``.pt2``. Nothing in the file is run.

    Args:
        path: may have any suffix. own: edgeship wrote it: notes of where operators come from are kept, and weights may
            be placeholders of any size.

    Raises:
        UnsafeSourceError: loading it would run code. SourceError: damaged, dynamic, or of another form.
    """
    with path.open("rb") as file:
        try:
            return _read(Zipped(file, str(path), ".pt2"), own=own)
        except RecursionError:
            raise SourceError(f"{path} is nested too deeply", fix="export it again") from None


def code_in_archive(path: Path) -> list[str]:
    """What ``torch.export.load`` would let a file run, as far as it can be told without loading it."""
    try:
        read_archive(path)
    except UnsafeSourceError as error:
        with path.open("rb") as file:
            entries = Zipped(file, str(path))
            pickles = [
                name for name in entries.names() if name.startswith("data/") and entries.place(name)[1] < MAX_PICKLE
            ]
            names = [named for place in pickles for named in _names_in(entries, place)]
        return [error.what, *dict.fromkeys(names)][:20]
    except SourceError:
        pass  # torch is not asked to load it
    return []


def _names_in(entries: Zipped, place: str) -> list[str]:
    """The functions that an entry names, when it is a pickle or what torch saves."""
    content = entries.read(place, MAX_PICKLE)
    if content.startswith(b"PK"):
        inner = Zipped(io.BytesIO(content), entries.what)
        content = inner.read("data.pkl", MAX_PICKLE) if "data.pkl" in inner else b""
    return named_in(content) if content.startswith(b"\x80") else []


def _read(entries: Zipped, *, own: bool) -> ExportedProgram:
    from edgeship.compat.torch import archive_schema, deserialized

    what = entries.what
    if "archive_format" not in entries or entries.read("archive_format", 16) != b"pt2":
        old = "serialized_exported_program.json" in entries
        reason = "it is of the form that torch wrote until 2.7" if old else "it holds no archive_format"
        raise SourceError(f"{what} is not a readable .pt2: {reason}", fix="export it again with this torch")
    reader = _Records(what, keep=_ALL_TEXTS if own else _TEXTS)
    program = reader.read(archive_schema().ExportedProgram, _json(entries, MODEL))
    dialects = [name for name in program.verifiers if name in ("ATEN", "TRAINING")]
    # Ranges are left over from sizes that tracing settled: no expression is in the graph.
    program = replace(program, guards_code=[], range_constraints={}, verifiers=dialects)
    weights = _payload(entries, reader, "weights", own=own)
    constants = _payload(entries, reader, "constants", own=own)
    samples = _samples(entries)
    try:
        return deserialized(program, weights, constants, samples)
    except RecursionError:
        raise
    except Exception as error:  # records that contradict each other break torch in many ways
        reason = _cause(error)
        raise SourceError(f"{what} is not a readable .pt2: {reason}", fix="export it again") from error


def _cause(error: Exception) -> str:
    """The last line of what torch says: it wraps whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]


def _json(entries: Zipped, name: str) -> Any:
    try:
        return json.loads(entries.read(name, MAX_GRAPH_BYTES))
    except ValueError as error:
        raise SourceError(
            f"{entries.what} is not a readable .pt2: {name}: {error!s:.80}", fix="export it again"
        ) from None


class _Records:
    """JSON to torch's schema, with every leaf of the type that the schema says and every text checked."""

    def __init__(self, what: str, keep: tuple[str, ...]) -> None:
        from edgeship.compat.torch import archive_schema

        schema = archive_schema()
        self.what, self.keep, self.nodes = what, keep, 0
        self.checks: Mapping[type, Callable[[Any], Any]] = {
            schema.SymExpr: lambda item: self.dynamic(item.expr_str),
            schema.Node: self._node,
            schema.Graph: self._graph,
            schema.GraphArgument: lambda item: self._named(item, item.name),
            schema.TensorArgument: lambda item: self._named(item, item.name),
            schema.TokenArgument: lambda item: self._named(item, item.name),
            schema.CustomObjArgument: lambda item: self.unsafe(f"an object of the class {item.class_fqn[:60]}"),
            schema.SymIntArgument: self._symbol,
            schema.SymFloatArgument: self._symbol,
            schema.SymBoolArgument: self._symbol,
            schema.InputToParameterSpec: lambda item: self._weight(item, item.parameter_name),
            schema.InputToBufferSpec: lambda item: self._weight(item, item.buffer_name),
            schema.InputToTensorConstantSpec: lambda item: self._weight(item, item.tensor_constant_name),
            schema.InputToConstantInputSpec: lambda item: self._named(item, item.name),
            schema.BufferMutationSpec: lambda item: self._weight(item, item.buffer_name),
            schema.ParameterMutationSpec: lambda item: self._weight(item, item.parameter_name),
            schema.GradientToParameterSpec: lambda item: self._weight(item, item.parameter_name),
            schema.UserInputMutationSpec: lambda item: self._named(item, item.user_input_name),
            schema.GradientToUserInputSpec: lambda item: self._named(item, item.user_input_name),
            schema.Argument: self._argument,
            schema.ConstantValue: self._constant,
            schema.Device: lambda item: schema.Device(type="cpu"),
            schema.GraphModule: lambda item: replace(item, metadata={}, treespec_namedtuple_fields={}),
            schema.ModuleCallEntry: self._call,
            schema.TensorMeta: self._tensor,
        }

    def read(self, kind: Any, data: Any, depth: int = 0) -> Any:
        """``data`` as ``kind``. Raises `SourceError` where a type is not the schema's, `UnsafeSourceError` for code."""
        if depth > MAX_DEPTH * 8:
            raise SourceError(f"{self.what} is nested too deeply", fix="export it again")
        if is_dataclass(kind):
            return self._record(typing.cast(type, kind), data, depth)
        origin, args = get_origin(kind), get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return None if data is None else self.read(args[0], data, depth)
        if origin is list and isinstance(data, list):
            return [self.read(args[0], item, depth + 1) for item in data]
        if origin is dict and isinstance(data, dict):
            return {key: self.read(args[1], item, depth + 1) for key, item in data.items()}
        if isinstance(kind, type) and issubclass(kind, enum.IntEnum) and type(data) is int:
            return self._member(kind, data)
        if kind is float and type(data) in (int, float, str):
            return self._number(data)
        if kind in (str, bool) and type(data) is kind:
            return data
        if kind is int and type(data) is int and abs(data) < 2**64:
            return data
        self.damaged(f"{str(data)[:40]!r} is no {getattr(kind, '__name__', kind)}")

    def _record(self, kind: type, data: Any, depth: int) -> Any:
        from edgeship.compat.torch import is_union

        if not isinstance(data, dict):
            self.damaged(f"{str(data)[:40]!r} is no {kind.__name__}")
        hints = _hints(kind)
        if is_union(kind):
            key = next(iter(data), "")
            if len(data) != 1 or key not in hints:
                self.damaged(f"{key[:40]!r} is no form of {kind.__name__}")
            value = self.read(hints[key], data[key], depth + 1)
            form: Any = kind
            made = form.create(**{key: value})
        else:
            # As torch does, for files of newer versions: what the schema has not is left out.
            values = {key: self.read(hints[key], data[key], depth + 1) for key in hints if key in data}
            lacking = [
                item.name
                for item in fields(kind)  # type: ignore[arg-type]
                if item.name not in values and item.default is MISSING and item.default_factory is MISSING
            ]
            if lacking:
                self.damaged(f"{kind.__name__} lacks {lacking[0]}")
            made = kind(**values)
        check = self.checks.get(kind)
        return made if check is None else check(made)

    def _member(self, kind: Any, data: int) -> Any:
        try:
            # Plain numbers, as torch leaves them.
            kind(data)
        except ValueError:
            self.damaged(f"{data} is no {kind.__name__}")
        return data

    def _number(self, data: Any) -> float:
        try:
            return float(data)
        except (ValueError, OverflowError):
            self.damaged(f"{str(data)[:40]!r} is no number")

    def damaged(self, reason: str) -> NoReturn:
        """Refuse a file that torch did not write so."""
        raise SourceError(f"{self.what} is not a readable .pt2: {reason}", fix="export it again")

    def unsafe(self, holds: str) -> NoReturn:
        """Refuse what would run."""
        raise UnsafeSourceError(f"{self.what} holds {holds}, which would run code", fix=TRUST)

    def dynamic(self, expression: str) -> NoReturn:
        """Refuse a size that is an expression."""
        named = re.search(r"Symbol\('(\w{1,40})'", expression) or re.match(r"(\w{1,40})$", expression)
        name = f" {named[1]}" if named else ""
        raise SourceError(f"{self.what} was exported with the dynamic size{name}", fix="export it with fixed shapes")

    def _named(self, item: Any, name: str) -> Any:
        """Names become Python source."""
        if not (name.isascii() and name.isidentifier()):
            self.unsafe(f"a value called {name[:60]!r}")
        return item

    def _symbol(self, item: Any) -> Any:
        return self._named(item, item.as_name) if item.type == "as_name" else item

    def _weight(self, item: Any, name: str) -> Any:
        if _WEIGHT_NAME.fullmatch(name) is None or len(name) > 1000:
            self.unsafe(f"a weight called {name[:60]!r}")
        return item

    def _operator(self, target: str) -> None:
        if target in _SCALAR_OPERATORS:
            return
        match = _OPERATOR.fullmatch(target)
        if match is None:
            self.unsafe(f"a call of {target[:80]!r}")
        namespace, name, overload = match.groups()
        if namespace == "higher_order":
            known = name in _HIGHER and not overload
        elif namespace == "aten":
            # The dispatcher's are operators on tensors; TorchScript adds others, such as aten::save.
            full = f"aten::{name}" if overload == ".default" else f"aten::{name}{overload}"
            known = full in _operators() and name not in _NOT_ATEN
        else:
            known = namespace in _NAMESPACES and bool(overload)
        if not known:
            raise UnsafeSourceError(
                f"{self.what} calls {target[:80]}, which is not a tensor operator of torch", fix=TRUST
            )

    def _node(self, node: Any) -> Any:
        from edgeship.compat.torch import name_of_node

        self._operator(node.target)
        for given in node.inputs:
            if given.name and not given.name.isidentifier():
                self.unsafe(f"an argument called {given.name[:60]!r}")
        name = name_of_node(node)
        if name is not None:
            self._named(node, name)
        return replace(node, metadata={key: value for key, value in node.metadata.items() if key in self.keep})

    def _graph(self, graph: Any) -> Any:
        self.nodes += len(graph.nodes)
        if self.nodes > MAX_NODES:
            raise LimitError(f"{self.what} has more than {MAX_NODES} operators", fix="export a smaller model")
        for given in graph.inputs:
            if given.type == "as_string":
                self._constant(given)
        for name in (*graph.tensor_values, *graph.sym_int_values, *graph.sym_bool_values, *graph.sym_float_values):
            self._named(graph, name)
        return graph

    def _argument(self, argument: Any) -> Any:
        if argument.type == "as_operator":
            self._operator(argument.value)
        return argument

    def _tensor(self, meta: Any) -> Any:
        sizes = [size.value for size in (*meta.sizes, *meta.strides, meta.storage_offset)]
        if len(meta.sizes) != len(meta.strides) or any(not 0 <= size < 2**63 for size in sizes):
            self.damaged("a tensor of no shape")
        return meta

    def _call(self, entry: Any) -> Any:
        """Only the whole model's signature is of use; what it returns is flattened anyway."""
        self._weight(entry, entry.fqn)
        if entry.fqn or entry.signature is None:
            return replace(entry, signature=None)
        signature = entry.signature
        for name in signature.forward_arg_names or ():
            self._named(entry, name)
        inputs = self._tree(signature.in_spec, exact=True)
        outputs = self._tree(signature.out_spec, exact=False)
        return replace(entry, signature=replace(signature, in_spec=inputs, out_spec=outputs))

    def _tree(self, text: str, *, exact: bool) -> str:
        """A tree spec of plain containers. Of outputs, others become tuples; of inputs they are refused."""
        try:
            protocol, tree = json.loads(text)
        except (ValueError, TypeError):
            self.damaged("a tree spec is not readable")
        if protocol != 1:
            self.damaged(f"a tree spec of version {str(protocol)[:20]}")
        return json.dumps([1, self._branch(tree, exact, 0)])

    def _branch(self, tree: Any, exact: bool, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise SourceError(f"{self.what} is nested too deeply", fix="export it again")
        if not isinstance(tree, dict) or not isinstance(tree.get("children_spec"), list):
            self.damaged("a tree spec is not readable")
        kind, context = tree.get("type"), tree.get("context")
        children = [self._branch(child, exact, depth + 1) for child in tree["children_spec"]]
        if kind is None and not children:
            return {"type": None, "context": None, "children_spec": []}
        if kind in _CONTAINERS[:2] and context == "null":
            return {"type": kind, "context": "null", "children_spec": children}
        if kind in _CONTAINERS[2:]:
            return {"type": kind, "context": self._keys(context, len(children), exact), "children_spec": children}
        if exact:
            self.unsafe(f"inputs of the class {str(kind)[:60]}")
        return {"type": "builtins.tuple", "context": "null", "children_spec": children}

    def _keys(self, context: Any, count: int, exact: bool) -> str:
        try:
            keys = json.loads(context)
        except (ValueError, TypeError):
            self.damaged("a tree spec is not readable")
        if not isinstance(keys, list) or len(keys) != count or not all(type(key) in (str, int) for key in keys):
            self.damaged("a tree spec is not readable")
        for key in keys if exact else ():
            # They become the names of arguments.
            self._named(None, str(key) if type(key) is str else "number")
        return json.dumps(keys)

    def _constant(self, value: Any) -> Any:
        if value.type == "as_string" and _WEIGHT_NAME.fullmatch(value.value) is None:
            self.unsafe(f"an input that must be {value.value[:60]!r}")
        return value


@lru_cache(maxsize=1)
def _operators() -> frozenset[str]:
    from edgeship.compat.torch import operator_names, pair_operators

    pair_operators()
    return operator_names()


@lru_cache(maxsize=256)
def _hints(kind: type) -> dict[str, Any]:
    """Types of a record's fields, without the numbers that the schema gives them."""
    from edgeship.compat.torch import archive_schema

    hints = typing.get_type_hints(kind, globalns=vars(archive_schema()))
    return {item.name: hints[item.name] for item in fields(kind)}  # type: ignore[arg-type]


def _payload(entries: Zipped, reader: _Records, part: str, *, own: bool) -> dict[str, Any]:
    """Weights or constants by name. Those of one file share its memory, as they did when they were saved."""
    import torch

    from edgeship.compat.torch import archive_schema

    legacy = f"data/{part}/model.pt"
    if legacy in entries:
        raise SourceError(f"{entries.what} keeps its {part} in the form of an older torch", fix="export it again")
    table = reader.read(archive_schema().PayloadConfig, _json(entries, f"data/{part}/model_{part}_config.json")).config
    stored: dict[str, torch.Tensor] = {}
    found: dict[str, Any] = {}
    expanded = 0
    for name, meta in table.items():
        reader._weight(None, name)
        place = f"data/{part}/{meta.path_name}"
        if not meta.path_name.startswith(("weight_", "tensor_")):
            reader.unsafe(f"{meta.path_name[:40]!r}, {_pickled(entries, place)}")
        if meta.use_pickle:
            found[name] = _pickled_tensor(entries, place, parameter=meta.is_param)
            continue
        if meta.tensor_meta is None:
            reader.damaged(f"{name[:60]} has no shape")
        dtype = _dtype(meta.tensor_meta.dtype)
        shape, strides, offset = (
            tuple(size.value for size in meta.tensor_meta.sizes),
            tuple(step.value for step in meta.tensor_meta.strides),
            meta.tensor_meta.storage_offset.value,
        )
        count = math.prod(shape)
        begin, size = entries.place(place)
        if count == 0:
            value = torch.empty(shape, dtype=dtype)
        else:
            check_window(entries.what, shape, strides, offset, size // dtype.itemsize)
            expanded += count * dtype.itemsize if count * dtype.itemsize > size else 0
            if expanded > MAX_EXPANDED_BYTES and not own:
                raise SourceError(f"{entries.what} declares more numbers than it holds", fix="export it again")
            if place not in stored:
                stored[place] = read_bytes(entries.file, begin, size)
            numbers = stored[place][: size // dtype.itemsize * dtype.itemsize].view(dtype)
            value = torch.as_strided(numbers, shape, strides, offset)
        found[name] = torch.nn.Parameter(value, requires_grad=False) if meta.is_param else value
    return found


def _dtype(code: int) -> torch.dtype:
    from edgeship.compat.torch import dtype_of_code

    return dtype_of_code(code)


def _pickled(entries: Zipped, place: str) -> str:
    """What a pickle in the archive names, for messages."""
    names = _names_in(entries, place) if place in entries else []
    return f"a pickle that names {', '.join(names)[:120]}" if names else "a pickle"


def _pickled_tensor(entries: Zipped, place: str, *, parameter: bool) -> torch.Tensor:
    """The tensor that an entry holds, in its recorded shape."""
    import torch

    checkpoint = read_checkpoint(_slice(entries, place), entries.what)
    if not isinstance(checkpoint.content, TensorRecord):
        raise SourceError(f"{entries.what} holds a weight that is not a tensor", fix="export it again")
    value = checkpoint.tensor(checkpoint.content)
    return torch.nn.Parameter(value, requires_grad=False) if parameter else value


def _slice(entries: Zipped, place: str) -> io.BytesIO:
    return io.BytesIO(entries.read(place, entries.size))


def _samples(entries: Zipped) -> tuple[Any, ...] | None:
    """The example inputs as (positional, keywords); None when there are none."""
    if SAMPLES not in entries or entries.place(SAMPLES)[1] == 0:
        return None
    try:
        checkpoint = read_checkpoint(_slice(entries, SAMPLES), f"{entries.what} (its sample inputs)")
    except UnsafeSourceError as error:
        raise UnsafeSourceError(error.what, fix=TRUST) from None
    if not isinstance(checkpoint.content, tuple) or len(checkpoint.content) != 2:
        return None

    def made(value: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise SourceError(f"{entries.what} is nested too deeply", fix="export it again")
        if isinstance(value, TensorRecord):
            return checkpoint.tensor(value)
        if isinstance(value, (list, tuple)):
            return type(value)(made(item, depth + 1) for item in value)
        if isinstance(value, dict):
            return {key: made(item, depth + 1) for key, item in value.items()}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise UnsafeSourceError(f"{entries.what} holds sample inputs that are not tensors", fix=TRUST)

    return made(checkpoint.content)  # type: ignore[no-any-return]
