"""Weights in an mlprogram as places without content, until the program is written.

A converter that is given gigabytes carries them through some eighty passes. It is given instead, for each weight, the
``constexpr`` operation that will hold it, on arrays of the right shape that are one number seen from everywhere.
`edgeship.lowering.coreml.stream` writes the real ones into the file, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

from edgeship.core.weights import AffineTensor, FloatTensor, PaletteTensor
from edgeship.errors import EncodingError, LoweringError

if TYPE_CHECKING:
    from edgeship.core.weights import Array, EncodedTensor

HOLD = "edgeship::hold_places"
SETTLE = "edgeship::settle_places"
# Between a weight and the part of it in the identifier that says what a constant will hold.
PART = "::"


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


@dataclass
class Places:
    """Which constants stand for weights.

    Args:
        constants: name of a constant in the program -> weight. shapes: of the weights.
        half: floats are float16.
    """

    constants: Mapping[str, str]
    shapes: Mapping[str, Shape]
    half: bool = True
    held: dict[str, str] = field(default_factory=dict)


def shape_of(weight: str, tensor: EncodedTensor) -> Shape:
    """The shape of an encoded weight. Raises `EncodingError` where a place cannot be kept for it."""
    if isinstance(tensor, FloatTensor):
        return Shape("float", tensor.shape)
    if isinstance(tensor, PaletteTensor):
        groups, entries = tensor.table.shape
        table = (groups, *[1] * (len(tensor.shape) - 1), entries, 1)
        return Shape(f"uint{tensor.encoding.bits}", tensor.shape, {"lut": table})
    if isinstance(tensor, AffineTensor):
        kind = f"{'' if tensor.encoding.symmetric else 'u'}int{max(tensor.encoding.bits, 4)}"
        others = {"scale": tensor.scale.shape}
        if tensor.zero_point is not None:
            others["offset"] = tensor.zero_point.shape
        return Shape(kind, tensor.shape, others)
    raise EncodingError(
        f"a language model in Core ML has no place for {tensor.encoding} ({weight})", fix="store it dense"
    )


def parts(tensor: EncodedTensor) -> dict[str, Array]:
    """The content of a weight's place, by parameter of its operation."""
    if isinstance(tensor, FloatTensor):
        return {"val": tensor.values}
    if isinstance(tensor, PaletteTensor):
        return {"indices": tensor.indices, "lut": tensor.table}
    assert isinstance(tensor, AffineTensor)
    found = {"data": tensor.values, "scale": tensor.scale}
    return found if tensor.zero_point is None else {**found, "offset": tensor.zero_point}


class _HoldPlaces(AbstractGraphPass):  # type: ignore[misc]
    """The first pass: each constant that stands for a weight becomes its operation, one a weight."""

    places: Places | None = None

    def apply(self, program: Any) -> None:
        if self.places is None:
            return
        for function in program.functions.values():
            made: dict[str, Any] = {}
            with function:
                for operation in list(function.operations):
                    weight = self.places.constants.get(operation.name) if operation.op_type == "const" else None
                    if weight is None:
                        continue
                    if weight not in made:
                        made[weight] = _place(self.places, weight, operation)
                    function.replace_uses_of_var_after_op(
                        anchor_op=operation, old_var=operation.outputs[0], new_var=made[weight], force_replace=True
                    )
                    function.remove_ops([operation])


def _place(places: Places, weight: str, before: Any) -> Any:
    shape = places.shapes[weight]
    name = f"edgeship_{len(places.held)}_weight"
    places.held[name] = weight
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
                    weight = self.places.held.get(name)
                    if weight is None:
                        raise LoweringError(f"Core ML's converter made {operation.name} of its own", fix="report it")
                    settled.add(weight)
                    _settle(function, operation, weight, self.places)
            lost = set(self.places.held.values()) - settled
            if lost:
                raise LoweringError(f"Core ML's converter did not keep {min(lost)}", fix="report this as a bug")


def _settle(function: Any, operation: Any, weight: str, places: Places) -> None:
    name = stored_name(weight)
    shape = places.shapes[weight]
    if shape.kind != "float":
        operation.name = name
        operation.outputs[0].name = name
        for parameter, variable in operation.inputs.items():
            if variable.op.weight_id is None:
                variable.op.weight_id = f"{weight}{PART}{parameter}"
        return
    value = mb.const(val=_hollow("fp16" if places.half else "fp32", shape.shape), before_op=operation, name=name)
    value.op.weight_id = f"{weight}{PART}val"
    function.replace_uses_of_var_after_op(
        anchor_op=operation, old_var=operation.outputs[0], new_var=value, force_replace=True
    )
    function.remove_ops([operation])


def stored_name(weight: str) -> str:
    """What a package calls a weight."""
    return "".join(letter if letter.isalnum() else "_" for letter in weight)


Reader = Callable[[str], "EncodedTensor"]

for _name, _pass in (("hold_places", _HoldPlaces), ("settle_places", _SettlePlaces)):
    if f"edgeship::{_name}" not in PASS_REGISTRY:
        register_pass(namespace="edgeship", name=_name)(_pass)
