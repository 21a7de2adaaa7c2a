"""Open a ``.tflite`` file only after its structure was checked.

The interpreter trusts its input: an offset that points outside the file ends the process. Here every table, vector and
string that the interpreter will follow is checked against the file's bounds first (the checks of FlatBuffers'
verifier, https://flatbuffers.dev, for the tables of the LiteRT schema), in Python, in milliseconds.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeship.errors import ArtifactError

if TYPE_CHECKING:
    import numpy.typing as npt

# field slot -> what lies there: bytes of a scalar, "string", ("vector", bytes), ("tables", name) or ("table", name).
_Kind = int | Literal["string"] | tuple[str, int | str]
_TABLES: dict[str, dict[int, _Kind]] = {
    "Model": {
        0: 4, 1: ("tables", "OperatorCode"), 2: ("tables", "SubGraph"), 3: "string", 4: ("tables", "Buffer"),
        5: ("vector", 4), 6: ("tables", "Metadata"), 7: ("tables", "SignatureDef"),
    },
    "OperatorCode": {0: 1, 1: "string", 2: 4, 3: 4},
    "SubGraph": {
        0: ("tables", "Tensor"), 1: ("vector", 4), 2: ("vector", 4), 3: ("tables", "Operator"), 4: "string", 5: 4,
    },
    "Tensor": {
        0: ("vector", 4), 1: 1, 2: 4, 3: "string", 4: ("table", "Quantization"), 5: 1, 6: ("table", "Any"),
        7: ("vector", 4), 8: 1, 9: ("tables", "Any"),
    },
    "Quantization": {
        0: ("vector", 4), 1: ("vector", 4), 2: ("vector", 4), 3: ("vector", 8), 4: 1, 5: ("table", "Any"), 6: 4,
    },
    "Operator": {
        0: 4, 1: ("vector", 4), 2: ("vector", 4), 3: 1, 4: ("table", "Any"), 5: ("vector", 1), 6: 1, 7: ("vector", 1),
        8: ("vector", 4), 9: 8, 10: 8, 11: 1, 12: ("table", "Any"),
    },
    "Buffer": {0: ("vector", 1), 1: 8, 2: 8},
    "Metadata": {0: "string", 1: 4},
    "SignatureDef": {0: ("tables", "TensorMap"), 1: ("tables", "TensorMap"), 2: "string", 4: 4},
    "TensorMap": {0: "string", 1: 4},
    "Any": {},
}  # fmt: skip


# No tensor of a model that a phone runs is larger; a flipped bit in a size easily is.
MAX_ELEMENTS = 1 << 31


class _Damaged(Exception):
    pass


@dataclass(frozen=True)
class CheckedFile:
    """A ``.tflite`` whose structure holds.

    Args:
        root: the schema's ``Model``. content: the mapped model.
        path, start: the file, and where in it the model begins.
    """

    root: Any
    content: memoryview
    path: Path
    start: int = 0

    def data(self, buffer: int) -> npt.NDArray[Any]:
        """The bytes of one buffer, inside the flatbuffer or behind it. [bytes]."""
        import numpy as np

        entry = self.root.Buffers(buffer)
        if entry.Offset() > 1:
            # Read, not mapped: mapped pages count as memory of this process, and these may be gigabytes.
            return np.fromfile(self.path, np.uint8, entry.Size(), offset=self.start + entry.Offset())
        return np.empty(0, np.uint8) if entry.DataIsNone() else np.asarray(entry.DataAsNumpy())


def open_checked(path: Path, start: int = 0, size: int | None = None) -> CheckedFile:
    """Map a file and check it. Raises `ArtifactError` when it is missing, truncated or damaged.

    Args:
        start, size: where in the file the model lies, when it is one section of several.
    """
    from ai_edge_litert import schema_py_generated as schema

    try:
        with path.open("rb") as file:
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", fix="build again") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", fix="build again") from None
    content = whole[start:] if size is None else whole[start : start + size]
    try:
        if len(content) < 16 or bytes(content[4:8]) != b"TFL3":
            raise _Damaged("it is not a LiteRT flatbuffer")
        _Walk(content).table(_follow(content, 0), "Model")
        root = schema.Model.GetRootAs(content, 0)
        _check_numbers(root, len(content))
    except (
        _Damaged,
        struct.error,
        ValueError,
        IndexError,
        TypeError,
        KeyError,
        OverflowError,
        AttributeError,
    ) as error:
        raise ArtifactError(f"{path} is damaged: {error}", fix="build again") from None
    return CheckedFile(root, content, path, start)


def _follow(content: memoryview, position: int) -> int:
    return position + int(struct.unpack_from("<I", content, position)[0])


class _Walk:
    """Follows every offset once, each checked against the size of the file."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.size = content, len(content)

    def table(self, position: int, name: str) -> None:
        self._inside(position, 4)
        vtable = position - struct.unpack_from("<i", self.content, position)[0]
        self._inside(vtable, 4)
        vtable_bytes, table_bytes = struct.unpack_from("<HH", self.content, vtable)
        if vtable_bytes < 4 or vtable_bytes % 2 or table_bytes < 4:
            raise _Damaged(f"a {name} table has no valid layout")
        self._inside(vtable, vtable_bytes)
        self._inside(position, table_bytes)
        offsets = struct.unpack_from(f"<{vtable_bytes // 2 - 2}H", self.content, vtable + 4)
        for slot, offset in enumerate(offsets):
            if offset == 0:
                continue
            kind = _TABLES[name].get(slot)
            # The bytes of a number, or of a reference; of a field that the schema here does not know at least one.
            width = 1 if kind is None else 4
            if isinstance(kind, int):
                width = kind
            if offset + width > table_bytes:
                raise _Damaged(f"field {slot} of a {name} table lies outside it")
            if kind is not None and not isinstance(kind, int):
                self._reference(_follow(self.content, position + offset), kind)

    def _reference(self, position: int, kind: Literal["string"] | tuple[str, int | str]) -> None:
        if kind == "string":
            count = self._vector(position, 1)
            self._inside(position + 4 + count, 1)
            return
        shape, item = kind
        if shape == "table":
            self.table(position, str(item))
        elif shape == "vector":
            self._vector(position, int(item))
        else:
            count = self._vector(position, 4)
            for index in range(count):
                self.table(_follow(self.content, position + 4 + 4 * index), str(item))

    def _vector(self, position: int, width: int) -> int:
        self._inside(position, 4)
        count = int(struct.unpack_from("<I", self.content, position)[0])
        self._inside(position + 4, count * width)
        return count

    def _inside(self, position: int, length: int) -> None:
        if position < 0 or position + length > self.size:
            raise _Damaged("it ends before its data does, or points outside itself")


def _check_numbers(root: Any, size: int) -> None:
    """Numbers that index into other tables, and what no operator survives."""
    from ai_edge_litert import schema_py_generated as schema

    buffers, codes = root.BuffersLength(), root.OperatorCodesLength()
    if not root.SubgraphsLength() or not root.SignatureDefsLength() or not buffers:
        raise _Damaged("it has no graph, no signature or no buffers")
    for number in range(buffers):
        buffer = root.Buffers(number)
        if buffer.Offset() > 1 and buffer.Offset() + buffer.Size() > size:
            raise _Damaged("it ends before its weights do")
    for number in range(root.SignatureDefsLength()):
        if root.SignatureDefs(number).SubgraphIndex() >= root.SubgraphsLength():
            raise _Damaged("a signature names a graph that is not there")
    for number in range(root.SubgraphsLength()):
        graph = root.Subgraphs(number)
        tensors = graph.TensorsLength()
        for index in range(tensors):
            tensor = graph.Tensors(index)
            if tensor.Buffer() >= buffers:
                raise _Damaged(f"tensor {index} names a buffer that is not there")
            sizes = [tensor.Shape(axis) for axis in range(tensor.ShapeLength())]
            if any(size < 0 for size in sizes) or math.prod(sizes) > MAX_ELEMENTS:
                raise _Damaged(f"tensor {index} has an impossible shape {sizes}")
        for index in range(graph.OperatorsLength()):
            operator = graph.Operators(index)
            used = [operator.Inputs(i) for i in range(operator.InputsLength())]
            used += [operator.Outputs(i) for i in range(operator.OutputsLength())]
            if operator.OpcodeIndex() >= codes or any(not -1 <= i < tensors for i in used):
                raise _Damaged(f"operator {index} names what is not there")
            # Reading its options as the schema has them follows their offsets, with bounds checked by Python.
            schema.OperatorT.InitFromObj(operator)
