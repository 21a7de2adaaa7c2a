"""Weights in a Core AI program as places without content, until the file is written.

A converter that is given gigabytes keeps them, and so does the writer. A large constant of a weight is zeros here,
which take no memory until somebody looks at them; `fill` then writes every weight into the saved file, one by one.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, assert_never

import numpy as np

from edgeship.compat.coreai import F16Type, F32Type, Float4E2M1FNType, Float8E8M0FNUType, IntegerType
from edgeship.compat.coreai import dialect as coreai
from edgeship.core.weights import AffineTensor, FloatTensor, MXFP4Tensor, PaletteTensor
from edgeship.errors import EncodingError, LoweringError
from edgeship.lowering.coreai.constants import (
    constant,
    container,
    first_axis,
    pack,
    refuse_beyond_float16,
    shifted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from typing import IO

    from edgeship.compat.coreai import Type, Value
    from edgeship.core.weights import Array, EncodedTensor

    # Name -> (first byte, bytes) of every constant in a file.
    Find = Callable[[Path], Mapping[str, tuple[int, int]]]

# What a place can be kept for.
Dense: TypeAlias = FloatTensor | PaletteTensor | AffineTensor | MXFP4Tensor
PROGRAM, DIGEST = "main.mlirb", "main.hash"
# Integers are packed and written this many at a time; a multiple of all that fill whole bytes.
PIECE = 24 << 18
# Bytes up to which a constant has its content from the start: small equal ones become one.
SMALL = 4096


@dataclass
class Places:
    """The constants that stand for weights.

    Args:
        half: floats are float16.
        names: weight -> role -> name of the constant in the program. The role of integers, indices and floats is "".
    """

    half: bool
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    _made: int = 0

    def hold(self, weight: str, tensor: EncodedTensor) -> Value:
        """The value of a weight in the graph that is being built.

        Raises `EncodingError` where a place cannot be kept for it.
        """
        held = self.names[weight] = {}
        contents = _contents(_placed(weight, tensor))
        float_type = F16Type.get() if self.half else F32Type.get()
        kind = np.dtype(np.float16 if self.half else np.float32)

        def place(role: str, shape: tuple[int, ...], element: Type, size: int) -> Value:
            if size <= SMALL:
                content = self._stored(weight, tensor, role, contents[role].reshape(-1))
            else:
                content = np.zeros(size, np.uint8)
                # Told apart, so that nothing takes two of them for one.
                self._made += 1
                content[:8] = np.frombuffer(self._made.to_bytes(8, "little"), np.uint8)
            value, held[role] = constant(f"{weight}{role}", content, element, shape)
            return value

        def floats(role: str, shape: tuple[int, ...]) -> Value:
            return place(role, shape, float_type, kind.itemsize * _count(shape))

        def integers(tensor: AffineTensor) -> Value:
            bits = container(tensor.encoding)
            integer = IntegerType.get_signed(bits) if tensor.encoding.symmetric else IntegerType.get_unsigned(bits)
            values = place("", tensor.shape, integer, _packed(tensor.shape, bits))
            blocks = tensor.scale.shape
            scale = floats(".scale", blocks)
            if tensor.zero_point is None:
                zero = coreai.constant(np.zeros(blocks, np.int8), dtype=integer)
            else:
                zero = place(".zero_point", blocks, integer, _packed(blocks, bits))
            return coreai.blockwise_shift_scale(values, scale, zero, coreai.constant(np.zeros(blocks, kind)))

        match _placed(weight, tensor):
            case FloatTensor():
                return floats("", tensor.shape)
            case PaletteTensor() as palette:
                bits = palette.encoding.bits
                indices = place("", tensor.shape, IntegerType.get_unsigned(bits), _packed(tensor.shape, bits))
                return coreai.lut_to_dense(indices, floats(".table", _table_shape(palette)), first_axis())
            case AffineTensor() as affine:
                return integers(affine)
            case MXFP4Tensor() as scaled:
                if self.half:
                    refuse_beyond_float16(weight, scaled)
                elements = place("", tensor.shape, Float4E2M1FNType.get(), _packed(tensor.shape, 4))
                blocks = scaled.exponents.shape
                scale = place(".scale", blocks, Float8E8M0FNUType.get(), _count(blocks))
                return shifted(elements, scale, blocks, self.half)
            case unreachable:
                assert_never(unreachable)

    def fill(self, asset: Path, read: Callable[[str], EncodedTensor], find: Find) -> None:
        """Write each weight into its constants of a saved asset, and the digest of the whole.

        Args:
            read: a weight by name. find: where the named constants of a program lie.

        Raises:
            LoweringError: the asset has no constant of that size for it.
            EncodingError: a scale or an entry of a palette is not a float16 number.
        """
        program = asset / PROGRAM
        found = find(program)
        with program.open("r+b") as file:
            for weight, held in self.names.items():
                tensor = _placed(weight, read(weight))
                for role, values in _contents(tensor).items():
                    flat = values.reshape(-1)
                    if held[role] not in found and values.nbytes <= 4 * SMALL:
                        held[role] = _same(file, found, self._stored(weight, tensor, role, flat).tobytes())
                    pieces = (
                        self._stored(weight, tensor, role, flat[i : i + PIECE]) for i in range(0, flat.size, PIECE)
                    )
                    if not _write(file, *found.get(held[role], (0, 0)), pieces):
                        raise LoweringError(
                            f"Core AI's file has no place of its size for {weight}{role}", fix="report this as a bug"
                        )
        with program.open("rb") as file:
            (asset / DIGEST).write_bytes(hashlib.file_digest(file, "sha256").digest())

    def _stored(self, weight: str, tensor: EncodedTensor, role: str, values: Array) -> Array:
        """Numbers as they lie in the file. [bytes] for packed integers, else the values' shape."""
        if values.dtype.kind != "f":
            return pack(values, _width(_placed(weight, tensor), role))
        stored = values.astype(np.float16 if self.half else np.float32)
        if role and not np.array_equal(stored.astype(np.float32), values):
            raise EncodingError(f"a number of {weight}{role} is not a float16 number", fix="lower in float32")
        return np.ascontiguousarray(stored).view(np.uint8)


def _write(file: IO[bytes], start: int, length: int, pieces: Iterable[Array]) -> bool:
    """Write content into its place; whether it fits it to the byte."""
    file.seek(start)
    left = length
    for piece in pieces:
        left -= piece.nbytes
        if left < 0:
            return False
        file.write(piece.data)
    return left == 0


def _same(file: IO[bytes], found: Mapping[str, tuple[int, int]], content: bytes) -> str:
    """The constant that a small one with the same content became."""
    for name, (start, length) in found.items():
        if length == len(content) <= SMALL:
            file.seek(start)
            if file.read(length) == content:
                return name
    return ""


def _placed(weight: str, tensor: EncodedTensor) -> Dense:
    """The tensor, where a place can be kept for it."""
    if not isinstance(tensor, Dense):
        raise EncodingError(
            f"a language model in Core AI has no place for {tensor.encoding} ({weight})", fix="store it dense"
        )
    return tensor


def _contents(tensor: Dense) -> dict[str, Array]:
    """The numbers of each constant, by role."""
    match tensor:
        case FloatTensor():
            return {"": tensor.values}
        case PaletteTensor():
            return {"": tensor.indices, ".table": tensor.table}
        case AffineTensor():
            found = {"": tensor.values, ".scale": tensor.scale}
            return found if tensor.zero_point is None else {**found, ".zero_point": tensor.zero_point}
        case MXFP4Tensor():
            return {"": tensor.elements, ".scale": tensor.exponents}
        case _:
            assert_never(tensor)


def _width(tensor: Dense, role: str) -> int:
    """Bits of one number of a role that holds no floats."""
    if isinstance(tensor, MXFP4Tensor):
        return 8 if role else 4
    return container(tensor.encoding) if isinstance(tensor, AffineTensor) else tensor.encoding.bits


def _table_shape(tensor: PaletteTensor) -> tuple[int, ...]:
    """[groups, 1, ..., entries, 1], as Core AI wants tables: rank of the weight and two more."""
    groups, entries = tensor.table.shape
    return (groups, *[1] * (len(tensor.shape) - 1), entries, 1)


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _packed(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of packed integers; those of 3 and 6 bits are filled up to whole bytes, as `pack` does."""
    whole = math.lcm(bits, 8) // bits
    return -(-_count(shape) // whole) * whole * bits // 8
