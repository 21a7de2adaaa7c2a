"""Weights in an mlprogram as places without content, until the program is written.

A converter that is given gigabytes carries them through some eighty passes. It is given instead, for each weight, the
``constexpr`` operation that will hold it, on arrays of the right shape that are one number seen from everywhere.
`edgeship.lowering.coreml.stream` writes the real ones into the file, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass

from edgeship.compat.coremltools import add_pass
from edgeship.core.weights import AffineTensor, DenseTensor, FloatTensor, PaletteTensor
from edgeship.errors import EncodingError, LoweringError

if TYPE_CHECKING:
    from edgeship.core.weights import Array, EncodedTensor

# Between a weight and the part of it in the identifier that says what a constant will hold.
PART = "::"


@dataclass(frozen=True)
class Piece:
    """Rows of a weight that a package stores as one constant.

    Args:
        stop: None for all rows to the end. rank: axes that the constant has; those beyond the weight's own are 1.
    """

    weight: str
    start: int = 0
    stop: int | None = None
    rank: int | None = None

    @property
    def stored(self) -> str:
        """What a package calls it."""
        name = "".join(letter if letter.isalnum() else "_" for letter in self.weight)
        return name if self.stop is None else f"{name}_rows_{self.start}"


@dataclass(frozen=True)
class Shape:
    """What is known of a weight before it is read.

    Args:
        kind: ``float``, or the integer type of one element. shape: of the weight.
        others: parameter of the operation -> shape, of scales, zero points and tables.
    """

    kind: str
    shape: tuple[int, ...]
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def of(self, piece: Piece) -> Shape:
        """The shape of some rows, with the axes of the piece."""
        total = self.shape[0] if self.shape else 1
        rows = (total if piece.stop is None else piece.stop) - piece.start
        extra = 0 if piece.rank is None else piece.rank - len(self.shape)

        def cut(sizes: tuple[int, ...]) -> tuple[int, ...]:
            first = sizes[0] if sizes[0] == 1 else sizes[0] * rows // total
            own, table = (sizes[1:], ()) if len(sizes) == len(self.shape) else (sizes[1:-2], sizes[-2:])
            return (first, *own, *[1] * extra, *table)

        if not self.shape:
            return self
        return Shape(self.kind, cut(self.shape), {name: cut(sizes) for name, sizes in self.others.items()})

    def stored_bytes(self, half: bool) -> int:
        """Bytes in the file."""
        float_bytes = 2 if half else 4
        bits = 8 * float_bytes if self.kind == "float" else int(self.kind.strip("uint"))
        total = math.prod(self.shape) * bits // 8
        for shape in self.others.values():
            total += math.prod(shape) * float_bytes
        return total


@dataclass
class Places:
    """Which constants stand for weights.

    Args:
        constants: name of a constant in the program -> what it stands for. shapes: of those.
        half: floats are float16.
    """

    constants: Mapping[str, Piece]
    shapes: Mapping[Piece, Shape]
    half: bool = True
    held: dict[str, Piece] = field(default_factory=dict)


def shape_of(weight: str, tensor: EncodedTensor) -> Shape:
    """The shape of an encoded weight. Raises `EncodingError` where a place cannot be kept for it."""
    placed = _placed(weight, tensor)
    match placed:
        case FloatTensor():
            return Shape("float", placed.shape)
        case PaletteTensor():
            groups, entries = placed.table.shape
            table = (groups, *[1] * (len(placed.shape) - 1), entries, 1)
            return Shape(f"uint{placed.encoding.bits}", placed.shape, {"lut": table})
        case AffineTensor():
            kind = f"{'' if placed.encoding.symmetric else 'u'}int{max(placed.encoding.bits, 4)}"
            others = {"scale": placed.scale.shape}
            if placed.zero_point is not None:
                others["offset"] = placed.zero_point.shape
            return Shape(kind, placed.shape, others)
        case _:
            assert_never(placed)


def _placed(weight: str, tensor: EncodedTensor) -> DenseTensor:
    """The tensor, where a place can be kept for it."""
    if not isinstance(tensor, DenseTensor):
        raise EncodingError(
            f"a language model in Core ML has no place for {tensor.encoding} ({weight})", fix="store it dense"
        )
    return tensor


def parts(tensor: EncodedTensor, piece: Piece) -> dict[str, Array]:
    """The content of a place, by parameter of its operation; the shapes are the weight's own."""
    total = tensor.shape[0] if tensor.shape else 1
    stop = total if piece.stop is None else piece.stop

    def cut(array: Array) -> Array:
        if not array.ndim or array.shape[0] == 1 or stop - piece.start == total:
            return array
        first, last = piece.start * array.shape[0], stop * array.shape[0]
        if first % total or last % total:
            raise EncodingError(f"{piece.weight}: rows {piece.start} to {stop} cut a group", fix="use smaller groups")
        return array[first // total : last // total]

    return {name: cut(array) for name, array in _whole(_placed(piece.weight, tensor)).items()}


def _whole(tensor: DenseTensor) -> dict[str, Array]:
    """The arrays that a weight is stored as, by the name of Core ML's argument, each in its own shape."""
    match tensor:
        case FloatTensor():
            return {"val": tensor.values}
        case PaletteTensor():
            return {"indices": tensor.indices, "lut": tensor.table}
        case AffineTensor():
            found = {"data": tensor.values, "scale": tensor.scale}
            return found if tensor.zero_point is None else {**found, "offset": tensor.zero_point}
        case _:
            assert_never(tensor)


class _HoldPlaces(AbstractGraphPass):  # type: ignore[misc]
    """The first pass: each constant that stands for a weight becomes its operation, one a weight."""

    places: Places | None = None

    def apply(self, program: Any) -> None:
        if self.places is None:
            return
        for function in program.functions.values():
            made: dict[Piece, Any] = {}
            with function:
                for operation in list(function.operations):
                    piece = self.places.constants.get(operation.name) if operation.op_type == "const" else None
                    if piece is None:
                        continue
                    if piece not in made:
                        made[piece] = _place(self.places, piece, operation)
                    function.replace_uses_of_var_after_op(
                        anchor_op=operation, old_var=operation.outputs[0], new_var=made[piece], force_replace=True
                    )
                    function.remove_ops([operation])


def _place(places: Places, piece: Piece, before: Any) -> Any:
    shape = places.shapes[piece]
    name = f"edgeship_{len(places.held)}_weight"
    places.held[name] = piece
    arguments: dict[str, Any] = {"before_op": before, "name": name}
    if "lut" in shape.others:
        return mb.constexpr_lut_to_dense(
            indices=_hollow(shape.kind, shape.shape), lut=_hollow("fp32", shape.others["lut"]), **arguments
        )
    kind = "int8" if shape.kind == "float" else shape.kind
    if "offset" in shape.others:
        arguments["offset"] = _hollow(kind, shape.others["offset"])
    scale = shape.others.get("scale", (1,) * len(shape.shape))
    return mb.constexpr_blockwise_shift_scale(
        data=_hollow(kind, shape.shape), scale=_hollow("fp32", scale), **arguments
    )


def _hollow(kind: str, shape: tuple[int, ...]) -> Array:
    """One number seen from everywhere. Ones, so that nothing takes them for an underflow."""
    one = np.ones(1, types.nptype_from_builtin(types.string_to_builtin(kind)))
    return np.broadcast_to(one, shape) if shape else one.reshape(())


class _SettlePlaces(AbstractGraphPass):  # type: ignore[misc]
    """The last pass: operations get the names of their weights, those of floats become constants, and every constant
    that is still without content says which part of which weight it will hold."""

    places: Places | None = None

    def apply(self, program: Any) -> None:
        if self.places is None:
            return
        for function in program.functions.values():
            settled = set()
            with function:
                for operation in list(function.operations):
                    if not operation.op_type.startswith("constexpr_"):
                        continue
                    name = operation.name.partition("_weight")[0] + "_weight"
                    piece = self.places.held.get(name)
                    if piece is None:
                        raise LoweringError(f"Core ML's converter made {operation.name} of its own", fix="report it")
                    settled.add(piece)
                    _settle(function, operation, piece, self.places)
            lost = [piece.weight for piece in self.places.held.values() if piece not in settled]
            if lost:
                raise LoweringError(f"Core ML's converter did not keep {lost[0]}", fix="report this as a bug")


def _settle(function: Any, operation: Any, piece: Piece, places: Places) -> None:
    name = piece.stored
    shape = places.shapes[piece]
    if shape.kind != "float":
        operation.name = name
        operation.outputs[0].name = name
        for parameter, variable in operation.inputs.items():
            if variable.op.weight_id is None:
                variable.op.weight_id = f"{name}{PART}{parameter}"
        return
    value = mb.const(val=_hollow("fp16" if places.half else "fp32", shape.shape), before_op=operation, name=name)
    value.op.weight_id = f"{name}{PART}val"
    function.replace_uses_of_var_after_op(
        anchor_op=operation, old_var=operation.outputs[0], new_var=value, force_replace=True
    )
    function.remove_ops([operation])


Reader = Callable[[str], "EncodedTensor"]

HOLD = add_pass("hold_places", _HoldPlaces)
SETTLE = add_pass("settle_places", _SettlePlaces)
