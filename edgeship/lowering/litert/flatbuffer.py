"""Read and write ``.tflite`` flatbuffers: aligned constants, offset buffers, the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

# A flatbuffer addresses 2 GB; above this, constants lie behind it and are found by offset and size.
MAX_INLINE_BYTES = 1_500_000_000
INLINE_ALIGNMENT = 16
OFFSET_ALIGNMENT = 64
IDENTIFIER = b"TFL3"
_COPIED_BYTES = 1 << 22
# The number of an operand that is left out.
_LEFT_OUT = -1


def parse(content: bytes) -> schema.ModelT:
    """The object form of a ``.tflite`` file with inline constants."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for graph in model.subgraphs:
        for operator in graph.operators:
            operator.inputs = [] if operator.inputs is None else [int(index) for index in operator.inputs]
            operator.outputs = [] if operator.outputs is None else [int(index) for index in operator.outputs]
    return model


def main_graph(model: schema.ModelT) -> schema.SubGraphT:
    """The graph that the model's one signature runs; others are bodies of its operators."""
    return model.subgraphs[model.signatureDefs[0].subgraphIndex]


def signature_of(model: schema.ModelT, key: str) -> schema.SignatureDefT:
    """The signature of that name. Raises `StopIteration` when the model has none."""
    return next(item for item in model.signatureDefs if bytes(item.signatureKey).decode() == key)


def builtin_code(model: schema.ModelT, operator: Any) -> int:
    """The builtin operator number of one operator."""
    code = model.operatorCodes[operator.opcodeIndex]
    return int(max(code.builtinCode, code.deprecatedBuiltinCode))


def constant(model: schema.ModelT, tensor: Any, dtype: str) -> Any:
    """The values of a constant tensor as a flat array, or None when it has none."""
    import numpy as np

    data = model.buffers[tensor.buffer].data
    return None if data is None or len(data) == 0 else np.frombuffer(bytes(data), dtype=dtype)


def drop_unused(model: schema.ModelT) -> None:
    """Remove tensors of signatures' graphs that nothing reads or makes, and the data that no tensor holds any more."""
    for signature in model.signatureDefs:
        _drop_tensors(model.subgraphs[signature.subgraphIndex], signature)
    held = {tensor.buffer for item in model.subgraphs for tensor in item.tensors}
    for index, buffer in enumerate(model.buffers):
        if index not in held:
            buffer.data = None


def _drop_tensors(graph: schema.SubGraphT, signature: schema.SignatureDefT) -> None:
    """Drop the tensors that nothing reads or writes, and number the others anew wherever one is named."""
    used = {*graph.inputs, *graph.outputs}
    for operator in graph.operators:
        if operator.intermediates is not None:
            return  # Recurrent cells number tensors in a third way.
        used.update(operator.inputs)
        used.update(operator.outputs)
    blocks = [tensor.quantization.details for tensor in graph.tensors if _has_blocks(tensor)]
    used.update(block.scales for block in blocks)
    used.discard(_LEFT_OUT)
    kept = sorted(used)
    number = {old: new for new, old in enumerate(kept)}
    number[_LEFT_OUT] = _LEFT_OUT

    def moved(indices: Sequence[int]) -> list[int]:
        return [number[index] for index in indices]

    graph.tensors = [graph.tensors[index] for index in kept]
    for operator in graph.operators:
        operator.inputs = moved(operator.inputs)
        operator.outputs = moved(operator.outputs)
    for block in blocks:
        block.scales = number[block.scales]
    for entry in (*signature.inputs, *signature.outputs):
        entry.tensorIndex = number[entry.tensorIndex]
    graph.inputs = moved(graph.inputs)
    graph.outputs = moved(graph.outputs)


def _has_blocks(tensor: Any) -> bool:
    return tensor.quantization is not None and hasattr(tensor.quantization.details, "blockSize")


@dataclass(frozen=True)
class Aside:
    """Bytes of one constant that wait in a file: ``size`` of them from ``start`` on."""

    path: Path
    start: int
    size: int

    def __len__(self) -> int:
        return self.size


class AsideFile:
    """Constants of a model that is larger than memory, in a file until the model is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def add(self, pieces: Iterable[Any]) -> Aside:
        """Append one constant, given as arrays that follow each other."""
        start = self._file.tell()
        for piece in pieces:
            self._file.write(memoryview(piece).cast("B"))
        return Aside(self.path, start, self._file.tell() - start)

    def close(self) -> None:
        """End writing; the constants can be copied from then on."""
        self._file.close()


def write(model: schema.ModelT, path: Path, *, max_inline_bytes: int = MAX_INLINE_BYTES) -> None:
    """Write a model into a file of its own, see `write_to`."""
    with path.open("wb") as file:
        write_to(model, file, max_inline_bytes=max_inline_bytes)


def write_to(model: schema.ModelT, file: BinaryIO, *, max_inline_bytes: int = MAX_INLINE_BYTES) -> None:
    """Write a model at the file's position.

    Constants that lie aside go behind the flatbuffer, 64-byte aligned; so do all others when they are more than
    ``max_inline_bytes`` together. Offsets count from where the flatbuffer begins.
    """
    stored = [buffer.data for buffer in model.buffers]
    total = sum(len(data) for data in stored if data is not None and not isinstance(data, Aside))
    # Zero fields are left out of a flatbuffer, so the trial run must have non-zero ones to have the final length.
    places = [
        (1 << 40, len(data)) if _has_bytes(data) and (total > max_inline_bytes or isinstance(data, Aside)) else None
        for data in stored
    ]
    inline = 0 if total > max_inline_bytes else total
    length = len(_pack(model, _placed(model, places), inline))
    position = length
    for index, place in enumerate(places):
        if place is not None:
            position = -(-position // OFFSET_ALIGNMENT) * OFFSET_ALIGNMENT
            places[index] = (position, place[1])
            position += place[1]
    begin = file.tell()
    file.write(_pack(model, _placed(model, places), inline))
    for data, place in zip(stored, places, strict=True):
        if place is not None:
            file.write(b"\0" * (begin + place[0] - file.tell()))
            _copy(data, file)


def _has_bytes(data: Any) -> bool:
    return data is not None and len(data) > 0


def _copy(data: Any, file: BinaryIO) -> None:
    if not isinstance(data, Aside):
        file.write(memoryview(data).cast("B"))
        return
    with data.path.open("rb") as source:
        source.seek(data.start)
        left = data.size
        while left:
            piece = source.read(min(left, _COPIED_BYTES))
            if not piece:
                raise LoweringError(f"{data.path} ends before its constants do", fix="build again")
            file.write(piece)
            left -= len(piece)


def _placed(model: schema.ModelT, places: list[tuple[int, int] | None]) -> list[Any]:
    from ai_edge_litert import schema_py_generated as schema

    return [
        buffer if place is None else schema.BufferT(offset=place[0], size=place[1])
        for buffer, place in zip(model.buffers, places, strict=True)
    ]


def _pack(model: schema.ModelT, buffers: list[Any], payload_bytes: int) -> bytes:
    import flatbuffers

    kept = model.buffers
    model.buffers = [_AlignedBuffer(buffer) for buffer in buffers]
    try:
        builder = flatbuffers.Builder(payload_bytes + (1 << 20))
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())
    finally:
        model.buffers = kept


class _AlignedBuffer:
    """Packs one buffer with its data on 16 bytes, as the schema demands and the generated Python code does not do."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def Pack(self, builder: Any) -> int:
        # Named as the generated code calls it.
        from ai_edge_litert import schema_py_generated as schema

        data = self.buffer.data
        vector = None
        if data is not None and len(data):
            raw = bytes(memoryview(data).cast("B"))
            builder.StartVector(1, len(raw), INLINE_ALIGNMENT)
            builder.head -= len(raw)
            builder.Bytes[builder.head : builder.head + len(raw)] = raw
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        schema.BufferAddOffset(builder, self.buffer.offset)
        schema.BufferAddSize(builder, self.buffer.size)
        return int(schema.BufferEnd(builder))
