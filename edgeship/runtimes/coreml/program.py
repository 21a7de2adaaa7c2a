"""Reads a saved mlprogram into plain records: functions, blocks, operations and constants that are not yet decoded.

The protobuf is read directly rather than through coremltools' loader: no type inference runs, so a check that uses
this file does not repeat the converter's own opinion; every ``constexpr_*`` stays visible; and it starts in
a tenth of a second. The schema is coremltools' ``proto`` folder (Model.proto, MIL.proto).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeship.errors import ArtifactError, MissingToolError
from edgeship.runtimes.coreml.storage import BITS, BlobFile, numpy_dtype, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt

MODEL_AUTHOR = "com.apple.CoreML"


@dataclass(frozen=True)
class ValueType:
    """What a value is: ``tensor``, ``list`` (of tensors of this shape), ``state`` or ``dictionary``."""

    kind: str
    dtype: str
    shape: tuple[int | None, ...]  #: None where the size is only known when the program runs
    any_rank: bool = False  #: even the number of axes is only known then


@dataclass(frozen=True)
class Port:
    """A named value: an input of a function or block, or an output of an operation."""

    name: str
    type: ValueType


@dataclass(frozen=True)
class Reference:
    """An argument that names a value computed before."""

    name: str


@dataclass(frozen=True)
class Constant:
    """An argument or attribute that is written in the file; decoded when ``read`` is called."""

    type: ValueType
    _proto: Any = field(repr=False, compare=False)
    _files: _WeightFiles = field(repr=False, compare=False)

    @property
    def location(self) -> tuple[str, int] | None:
        """(file, byte offset) of a constant in a weight file; None for one written in the program itself."""
        if self._proto.WhichOneof("value") != "blobFileValue":
            return None
        blob = self._proto.blobFileValue
        return blob.fileName, blob.offset

    def read(self) -> npt.NDArray[Any] | str | list[Any]:
        """The value: an array of the declared shape, a string, or a list of those."""
        where = self.location
        if where is not None:
            shape = _static(self.type)
            return self._files.open(where[0]).read(where[1], self.type.dtype, math.prod(shape)).reshape(shape)
        immediate = self._proto.immediateValue
        held = immediate.WhichOneof("value")
        if held == "tensor":
            return _immediate_tensor(immediate.tensor, self.type)
        if held == "list":
            return [Constant(_value_type(v.type), v, self._files).read() for v in immediate.list.values]
        raise ArtifactError(f"a constant holds a {held or 'nothing'}", fix="only tensors, strings and lists are read")

    def read_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Some rows along the first axis of a constant in a weight file, whose rows are whole bytes."""
        where, shape = self.location, _static(self.type)
        if where is None:
            raise ArtifactError("a constant is not in a weight file", fix="build the package again")
        width = math.prod(shape[1:])
        array = self._files.open(where[0]).read(
            where[1], self.type.dtype, math.prod(shape), (start * width, stop * width)
        )
        return array.reshape(stop - start, *shape[1:])


Operand = Reference | Constant


@dataclass(frozen=True)
class Operation:
    """One operation: its type, arguments by parameter name, outputs, and nested blocks of control flow."""

    kind: str
    inputs: Mapping[str, tuple[Operand, ...]]
    outputs: tuple[Port, ...]
    blocks: tuple[Block, ...] = ()

    @property
    def label(self) -> str:
        """The operation in a message: type and first output."""
        return f"{self.kind} ({self.outputs[0].name})" if self.outputs else self.kind

    def names_used(self) -> set[str]:
        """Names of the values that it takes, those of nested blocks included."""
        names = {o.name for operands in self.inputs.values() for o in operands if isinstance(o, Reference)}
        for block in self.blocks:
            names |= set(block.outputs)
            for nested in block.operations:
                names |= nested.names_used()
        return names

    @property
    def is_constant(self) -> bool:
        """Whether it is a constant, plain or compressed."""
        return self.kind == "const" or self.kind.startswith("constexpr_")


@dataclass(frozen=True)
class Block:
    """A sequence of operations that gives the values named in ``outputs``."""

    inputs: tuple[Port, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]

    def walk(self) -> Iterator[Operation]:
        """Every operation, those of nested blocks included."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass(frozen=True)
class Function:
    """One entry point; ``opset`` is 5 for iOS 15, 6 for iOS 16, 7 for iOS 17, 8 for iOS 18 ..."""

    name: str
    opset: int
    inputs: tuple[Port, ...]
    block: Block
    #: Default shapes of the inputs, from the model's description: what a flexible size is when nobody says otherwise.
    default_shapes: Mapping[str, tuple[int, ...]]

    @property
    def states(self) -> tuple[Port, ...]:
        """The inputs that are states."""
        return tuple(port for port in self.inputs if port.type.kind == "state")


@dataclass(frozen=True)
class Program:
    """A whole package: functions by name, and the one that runs when none is named."""

    path: Path
    functions: Mapping[str, Function]
    default_function: str


class _WeightFiles:
    """The weight files beside the model, each mapped at its first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, BlobFile] = {}

    def open(self, name: str) -> BlobFile:
        if name not in self._open:
            relative = Path(name.removeprefix("@model_path/"))
            if relative.is_absolute() or ".." in relative.parts:
                raise ArtifactError(f"weight file {name} lies outside the package", fix="do not trust this package")
            self._open[name] = BlobFile(self._folder / relative)
        return self._open[name]


def load_program(package: Path) -> Program:
    """Reads ``package`` (an ``.mlpackage`` folder, or the ``.mlmodel`` inside); ArtifactError if it is damaged."""
    model_file = _model_file(Path(package))
    messages = _schema()
    spec = messages.Model()
    try:
        spec.ParseFromString(model_file.read_bytes())
    except messages.DecodeError as error:
        raise ArtifactError(f"{model_file} is damaged: {error}", fix="build the package again") from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise ArtifactError(
            f"{package} holds a {spec.WhichOneof('Type') or 'model of no type'}, not an mlprogram",
            fix='convert with convert_to="mlprogram"',
        )
    files = _WeightFiles(model_file.parent)
    described = {f.name: f for f in spec.description.functions}
    functions = {
        name: _function(name, proto, described.get(name, spec.description), files)
        for name, proto in spec.mlProgram.functions.items()
    }
    if not functions:
        raise ArtifactError(f"{package} has no function", fix="build the package again")
    default = spec.description.defaultFunctionName or ("main" if "main" in functions else next(iter(functions)))
    return Program(Path(package), functions, default)


def _model_file(package: Path) -> Path:
    if package.is_file():
        return package
    manifest = package / "Manifest.json"
    if not manifest.is_file():
        raise ArtifactError(f"{package} is not an mlpackage: no Manifest.json", fix="give the .mlpackage folder")
    try:
        listing = json.loads(manifest.read_text())
        relative = Path(listing["itemInfoEntries"][listing["rootModelIdentifier"]]["path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{manifest} is damaged: {error!r}", fix="build the package again") from error
    model_file = package / "Data" / relative
    if relative.is_absolute() or ".." in relative.parts or not model_file.is_file():
        raise ArtifactError(f"{package} lacks its model file {relative}", fix="copy or build the package again")
    return model_file


def _schema() -> types.SimpleNamespace:
    """The message classes of Model.proto."""
    try:
        decode_error = importlib.import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise MissingToolError("Core ML files need coremltools", fix='pip install "edgeship[coreml]"') from error
    # Importing coremltools takes seconds and logs about macOS parts that are missing; its schema modules need
    # nothing of it, so they are loaded from its folder under another name.
    alias = "edgeship_coreml_schema"
    if alias not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or not found.submodule_search_locations:
            raise MissingToolError("Core ML files need coremltools", fix='pip install "edgeship[coreml]"')
        package = types.ModuleType(alias)
        package.__path__ = [str(Path(found.submodule_search_locations[0]) / "proto")]
        sys.modules[alias] = package
    model = importlib.import_module(f"{alias}.Model_pb2")
    return types.SimpleNamespace(Model=model.Model, DecodeError=decode_error)


def _dtype_names() -> dict[int, str]:
    enum = importlib.import_module("edgeship_coreml_schema.MIL_pb2").DataType
    return {number: name.lower() for name, number in enum.items()}


def _function(name: str, proto: Any, description: Any, files: _WeightFiles) -> Function:
    specialization = proto.block_specializations.get(proto.opset)
    if specialization is None:
        raise ArtifactError(f"function {name} has no block for its opset {proto.opset!r}", fix="build it again")
    digits = proto.opset.removeprefix("CoreML")
    if not digits.isdigit():
        raise ArtifactError(f"function {name} declares the unknown opset {proto.opset!r}", fix="build it again")
    inputs = tuple(Port(i.name, _value_type(i.type)) for i in proto.inputs)
    shapes = {f.name: tuple(f.type.multiArrayType.shape) for f in description.input}
    return Function(name, int(digits), inputs, _block(specialization, files), shapes)


def _block(proto: Any, files: _WeightFiles) -> Block:
    return Block(
        tuple(Port(i.name, _value_type(i.type)) for i in proto.inputs),
        tuple(_operation(o, files) for o in proto.operations),
        tuple(proto.outputs),
    )


def _operation(proto: Any, files: _WeightFiles) -> Operation:
    # iOS 16 constexpr ops keep their operands as attributes; later ones, and all others, as inputs.
    operands: dict[str, tuple[Operand, ...]] = {
        key: (Constant(_value_type(value.type), value, files),)
        for key, value in proto.attributes.items()
        if key != "name"
    }
    for key, argument in proto.inputs.items():
        operands[key] = tuple(
            Reference(binding.name)
            if binding.WhichOneof("binding") == "name"
            else Constant(_value_type(binding.value.type), binding.value, files)
            for binding in argument.arguments
        )
    return Operation(
        proto.type,
        operands,
        tuple(Port(o.name, _value_type(o.type)) for o in proto.outputs),
        tuple(_block(b, files) for b in proto.blocks),
    )


def _value_type(proto: Any) -> ValueType:
    kind = proto.WhichOneof("type")
    if kind == "tensorType":
        tensor = proto.tensorType
        shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
        return ValueType(
            "tensor", _dtype_names()[tensor.dataType], shape, any(d.unknown.variadic for d in tensor.dimensions)
        )
    if kind == "stateType":
        inner = _value_type(proto.stateType.wrappedType)
        return ValueType("state", inner.dtype, inner.shape)
    if kind == "listType":
        inner = _value_type(proto.listType.type)
        return ValueType("list", inner.dtype, inner.shape)
    if kind == "dictionaryType":
        inner = _value_type(proto.dictionaryType.valueType)
        return ValueType("dictionary", inner.dtype, ())
    raise ArtifactError(f"a value has the type {kind}, which is not known", fix="build the package again")


def _static(value_type: ValueType) -> tuple[int, ...]:
    sizes = tuple(size for size in value_type.shape if size is not None)
    if len(sizes) != len(value_type.shape):
        raise ArtifactError("a constant has an open shape", fix="build the package again")
    return sizes


def _immediate_tensor(proto: Any, value_type: ValueType) -> npt.NDArray[Any] | str | list[Any]:
    """A constant that stands in the program itself, in its declared shape."""
    shape = _static(value_type)
    held = proto.WhichOneof("value")
    if held is None:
        return np.zeros(shape, numpy_dtype(value_type.dtype))
    values = getattr(proto, held).values
    if held == "strings":
        return list(values) if shape else str(values[0])
    if value_type.dtype not in BITS:
        raise ArtifactError(f"a constant has the type {value_type.dtype}, which is not known", fix="build it again")
    count = math.prod(shape)
    if held == "bytes":
        array = unpack(np.frombuffer(values, np.uint8), value_type.dtype, count).copy()
    else:
        array = np.array(values, dtype=numpy_dtype(value_type.dtype))
    if array.size != count:
        raise ArtifactError(f"a constant of shape {shape} holds {array.size} values", fix="build the package again")
    return array.reshape(shape)
