"""What a package stores of each weight, undecoded: to prove that the file holds exactly what compression decided."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeship.errors import ArtifactError
from edgeship.runtimes.coreml.program import Constant, Operation, Reference, load_program
from edgeship.runtimes.coreml.storage import BITS, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from edgeship.runtimes.coreml.program import Function


@dataclass(frozen=True)
class StoredConstant:
    """One weight as the file holds it.

    ``kind`` joins what was done to it with ``+``, outermost first: ``sparse``, ``affine``, ``palette``, or the plain
    type (``float16``, ``float32``, ``int32`` ...): ``sparse+affine`` is sparse, and its nonzero elements are affine.
    Integers of fewer than eight bits come as int8 or uint8; ``bits`` is what one of them takes in the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]  #: of the decoded weight
    dtype: str  #: of the decoded weight
    bits: int  #: of one stored element: integer, palette index or float
    values: npt.NDArray[Any] | None = None  #: stored integers of ``affine``, or the numbers of a plain constant
    scale: npt.NDArray[Any] | None = None
    zero_point: npt.NDArray[Any] | None = None  #: subtracted before scaling; None is 0
    axis: int | None = None  #: along which a scale vector lies (iOS 16 affine only)
    indices: npt.NDArray[Any] | None = None  #: palette indices
    lut: npt.NDArray[Any] | None = None  #: iOS 16: (entries,); iOS 18: (*groups, entries, vector)
    vector_axis: int | None = None  #: along which a palette's vectors lie
    mask: npt.NDArray[np.uint8] | None = None  #: 1 where an element is stored, in the shape of the weight
    nonzero: npt.NDArray[Any] | None = None  #: the stored elements: floats, integers or palette indices


def read_stored_weights(package: Path) -> dict[str, StoredConstant]:
    """The weights of every function of ``package``, by the name of the const or constexpr output variable.

    Plain constants are those of floats, and of integers that lie in a weight file. Where two functions give one name
    to different weights, the later one is listed as ``function/name``. Raises ArtifactError if the package is damaged.
    """
    return {name: read() for name, read in locate_stored_weights(package).items()}


def locate_stored_weights(package: Path) -> dict[str, Callable[[], StoredConstant]]:
    """As `read_stored_weights`, each weight read when it is asked for: those of a large model do not fit in memory."""
    program = load_program(package)
    found: dict[str, Callable[[], StoredConstant]] = {}
    origin: dict[str, object] = {}
    for function in program.functions.values():
        makers = {p.name: o for o in function.block.walk() for p in o.outputs if o.is_constant}
        for operation in _weights(function, makers):
            where = _origin(operation)
            name = operation.outputs[-1].name
            if name in found:
                if origin[name] == where and None not in where:
                    continue
                name = f"{function.name}/{name}"
            found[name], origin[name] = functools.partial(_read, makers, operation, name), where
    return found


def _read(makers: dict[str, Operation], operation: Operation, name: str) -> StoredConstant:
    return replace(_Reader(makers).read(operation), name=name)


def _weights(function: Function, makers: dict[str, Operation]) -> Iterator[Operation]:
    """The operations that make a weight, but those that only serve another."""
    consumed = {
        operand.name
        for operation in makers.values()
        for operands in operation.inputs.values()
        for operand in operands
        if isinstance(operand, Reference)
    }
    for operation in function.block.walk():
        if not operation.is_constant or {p.name for p in operation.outputs} & consumed:
            continue
        if operation.kind == "const":
            stored = operation.inputs["val"][0]
            if not isinstance(stored, Constant) or stored.type.kind != "tensor" or stored.type.dtype not in BITS:
                continue
            if stored.location is None and not stored.type.dtype.startswith("float"):
                continue
        yield operation


def _origin(operation: Operation) -> tuple[tuple[str, int] | None, ...]:
    operands = (operand for operands in operation.inputs.values() for operand in operands)
    return tuple(operand.location for operand in operands if isinstance(operand, Constant))


class _Reader:
    """Reads the constexpr operation that makes a weight, and those that make its operands."""

    def __init__(self, makers: dict[str, Operation]) -> None:
        self._makers = makers

    def read(self, operation: Operation) -> StoredConstant:
        readers = {
            "const": self._plain,
            "constexpr_cast": self._cast,
            "constexpr_affine_dequantize": self._affine_ios16,
            "constexpr_blockwise_shift_scale": self._affine,
            "constexpr_lut_to_dense": self._palette,
            "constexpr_sparse_to_dense": self._sparse,
            "constexpr_sparse_blockwise_shift_scale": self._sparse_affine,
            "constexpr_lut_to_sparse": self._sparse_palette,
        }
        if operation.kind not in readers:
            raise ArtifactError(f"{operation.label} is not known", fix="build the package for iOS 18 or earlier")
        port = operation.outputs[-1]
        shape = tuple(size for size in port.type.shape if size is not None)
        return replace(readers[operation.kind](operation), name=port.name, shape=shape, dtype=port.type.dtype)

    def _constant(self, operation: Operation, name: str) -> Constant | None:
        operands = operation.inputs.get(name, ())
        return operands[0] if operands and isinstance(operands[0], Constant) else None

    def _array(self, operation: Operation, name: str) -> npt.NDArray[Any] | None:
        """An argument as an array of its own shape; None where it is not given."""
        constant = self._constant(operation, name)
        if constant is None:
            return None
        value = constant.read()
        if not isinstance(value, np.ndarray):
            raise ArtifactError(f"{operation.label}: {name} is not a tensor", fix="build the package again")
        return value

    def _required(self, operation: Operation, name: str) -> npt.NDArray[Any]:
        """An argument as an array of its own shape; refused where it is not given."""
        value = self._array(operation, name)
        if value is None:
            raise ArtifactError(f"{operation.label} lacks {name}", fix="build the package again")
        return value

    def _scalar(self, operation: Operation, name: str) -> int | None:
        value = self._array(operation, name)
        return None if value is None else int(value)

    def _bits(self, operation: Operation, name: str) -> int:
        constant = self._constant(operation, name)
        return BITS[constant.type.dtype] if constant is not None else 0

    def _inner(self, operation: Operation, *names: str) -> StoredConstant | None:
        """The operand that another constexpr operation makes, read."""
        for name in names:
            for operand in operation.inputs.get(name, ()):
                if isinstance(operand, Reference):
                    return self.read(self._makers[operand.name])
        return None

    def _plain(self, operation: Operation, name: str = "val") -> StoredConstant:
        constant = self._constant(operation, name)
        dtype = constant.type.dtype if constant is not None else ""
        return StoredConstant("", dtype, (), "", self._bits(operation, name), values=self._required(operation, name))

    def _cast(self, operation: Operation) -> StoredConstant:
        return self._plain(operation, "source_val")

    def _affine_ios16(self, operation: Operation) -> StoredConstant:
        return StoredConstant(
            "", "affine", (), "", self._bits(operation, "quantized_data"),
            values=self._required(operation, "quantized_data"), scale=self._required(operation, "scale"),
            zero_point=self._array(operation, "zero_point"), axis=self._scalar(operation, "axis"),
        )  # fmt: skip

    def _affine(self, operation: Operation) -> StoredConstant:
        inner = self._inner(operation, "data")
        base = StoredConstant(
            "", "affine", (), "", self._bits(operation, "data"), values=self._array(operation, "data")
        )
        if inner is not None:
            base = replace(inner, kind=f"affine+{inner.kind}")
        return replace(base, scale=self._required(operation, "scale"), zero_point=self._array(operation, "offset"))

    def _palette(self, operation: Operation) -> StoredConstant:
        indices, lut = self._required(operation, "indices"), self._array(operation, "lut")
        bits = self._bits(operation, "indices")
        inner = self._inner(operation, "lut")
        if lut is None and inner is None:
            raise ArtifactError(f"{operation.label} lacks lut", fix="build the package again")
        shape = self._array(operation, "shape")
        if shape is not None and lut is not None:
            bits = max(1, int(lut.size - 1).bit_length())
            indices = _unpacked(indices, bits, shape)
        kind = "palette" if inner is None else f"palette+{inner.kind}"
        base = StoredConstant("", kind, (), "", bits) if inner is None else replace(inner, kind=kind, bits=bits)
        return replace(base, indices=indices, lut=lut, vector_axis=self._scalar(operation, "vector_axis"))

    def _sparse(self, operation: Operation) -> StoredConstant:
        inner = self._inner(operation, "nonzero_data", "mask")
        if inner is not None:
            return replace(inner, kind=inner.kind if inner.kind.startswith("sparse") else f"sparse+{inner.kind}")
        mask, shape = self._required(operation, "mask"), self._array(operation, "shape")
        if shape is not None:
            mask = _unpacked(mask, 1, shape)
        nonzero = self._required(operation, "nonzero_data")
        return StoredConstant("", "sparse", (), "", self._bits(operation, "nonzero_data"), mask=mask, nonzero=nonzero)

    def _sparse_affine(self, operation: Operation) -> StoredConstant:
        inner = self._inner(operation, "nonzero_data", "data_mask")
        base = StoredConstant(
            "", "sparse+affine", (), "", self._bits(operation, "nonzero_data"),
            mask=self._array(operation, "data_mask"), nonzero=self._array(operation, "nonzero_data"),
        )  # fmt: skip
        if inner is not None:
            base = replace(inner, kind="sparse+affine+" + inner.kind.removeprefix("sparse+"))
        return replace(base, scale=self._required(operation, "scale"), zero_point=self._array(operation, "offset"))

    def _sparse_palette(self, operation: Operation) -> StoredConstant:
        return StoredConstant(
            "", "sparse+palette", (), "", self._bits(operation, "indices_nonzero_data"),
            mask=self._required(operation, "indices_mask"), nonzero=self._required(operation, "indices_nonzero_data"),
            lut=self._required(operation, "lut"), vector_axis=self._scalar(operation, "vector_axis"),
        )  # fmt: skip


def _unpacked(packed: npt.NDArray[Any], bits: int, shape: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[bytes] -> ``shape``."""
    sizes = [int(size) for size in shape]
    return unpack(packed.reshape(-1).view(np.uint8), f"uint{bits}", int(np.prod(sizes))).reshape(sizes)
