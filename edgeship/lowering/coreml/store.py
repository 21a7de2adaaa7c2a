"""Store every decided weight in an mlprogram exactly, as a ``constexpr_*`` operation.

This is a graph pass at the very start of coremltools' pipeline. The front end names constants after the graph's
placeholders; each that stands for an encoded weight is replaced before any other pass can fold, cast or merge it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

from edgeship.core.weights import AffineTensor, FloatTensor
from edgeship.errors import EncodingError

if TYPE_CHECKING:
    from edgeship.core.weights import Array, EncodedTensor

PASS = "edgeship::store_exact"
IOS18 = 18


@dataclass
class Order:
    """What the pass is to store: constant -> (weight, how), for one version of iOS. It takes out what it stored."""

    ios: int
    waiting: dict[str, tuple[str, AffineTensor]]


def order(encoded: Mapping[str, EncodedTensor], constants: Mapping[str, str], ios: int) -> Order:
    """An order for the pass.

    Args:
        encoded: decided weights by name.
        constants: name of the constant -> weight.
        ios: the version to store for.

    Raises:
        EncodingError: that version has no form for an encoding.
    """
    waiting = {}
    for constant, weight in constants.items():
        tensor = encoded.get(weight)
        if tensor is None or isinstance(tensor, FloatTensor):
            continue
        if not isinstance(tensor, AffineTensor):
            raise EncodingError(f"edgeship cannot store {tensor.encoding} for {weight} in Core ML", fix="use integers")
        _check(weight, tensor, ios)
        waiting[constant] = (weight, tensor)
    return Order(ios, waiting)


def _check(weight: str, tensor: AffineTensor, ios: int) -> None:
    if ios >= IOS18:
        return
    wide = [axis for axis, size in enumerate(tensor.scale.shape) if size > 1]
    if tensor.encoding.bits != 8:
        raise EncodingError(
            f"Core ML before iOS 18 has no int{tensor.encoding.bits} for {weight}",
            fix="use 8 bits, or --set lower/torch_to_coreml.target=iOS18",
        )
    if len(wide) > 1 or any(tensor.scale.shape[axis] != tensor.shape[axis] for axis in wide):
        raise EncodingError(
            f"Core ML before iOS 18 has no scales per group for {weight}",
            fix="use scales per channel, or --set lower/torch_to_coreml.target=iOS18",
        )


class _StoreExact(AbstractGraphPass):  # type: ignore[misc]
    order: Order | None = None

    def apply(self, program: Any) -> None:
        if self.order is None:
            return
        for function in program.functions.values():
            with function:
                for operation in list(function.operations):
                    if operation.op_type == "const" and operation.name in self.order.waiting:
                        _replace(function, operation, self.order)


def _replace(function: Any, operation: Any, order: Order) -> None:
    _, tensor = order.waiting.pop(operation.name)
    stored = _blockwise(tensor, operation) if order.ios >= IOS18 else _affine(tensor, operation)
    function.replace_uses_of_var_after_op(
        anchor_op=operation, old_var=operation.outputs[0], new_var=stored, force_replace=True
    )
    function.remove_ops([operation])


if PASS not in PASS_REGISTRY:
    register_pass(namespace="edgeship", name="store_exact")(_StoreExact)


def _blockwise(tensor: AffineTensor, operation: Any) -> Any:
    """IOS 18: any block, 8 and 4 bits as they are, 3 and 2 bits as indices into the list of all their integers.

    Before iOS 26 Core ML must scale that list before it looks up; coremltools changes the order then.
    """
    bits, signed = tensor.encoding.bits, tensor.encoding.symmetric
    kind = f"int{bits}" if signed else f"uint{bits}"
    name = operation.name
    zero = tensor.zero_point
    if bits in (4, 8):
        data: Any = _typed(tensor.values, kind)
        offset = None if zero is None else _typed(zero, kind)
    else:
        low = -(2 ** (bits - 1)) if signed else 0
        table = np.arange(low, low + 2**bits).astype(np.int8 if signed else np.uint8)
        indices = _typed((tensor.values.astype(np.int16) - low).astype(np.uint8), f"uint{bits}")
        lut = table.reshape([1] * len(tensor.shape) + [2**bits, 1])
        data = mb.constexpr_lut_to_dense(indices=indices, lut=lut, before_op=operation, name=f"{name}_integers")
        offset = zero
    arguments = {} if offset is None else {"offset": offset}
    return mb.constexpr_blockwise_shift_scale(
        data=data, scale=tensor.scale.astype(np.float32), before_op=operation, name=name, **arguments
    )


def _affine(tensor: AffineTensor, operation: Any) -> Any:
    """IOS 16 and 17: 8 bits, one scale a channel."""
    wide = [axis for axis, size in enumerate(tensor.scale.shape) if size > 1]
    scale = tensor.scale.reshape(-1).astype(np.float32)
    zero = np.zeros(scale.shape, tensor.values.dtype) if tensor.zero_point is None else tensor.zero_point.reshape(-1)
    scalar = not wide and tensor.shape[0] != 1
    return mb.constexpr_affine_dequantize(
        quantized_data=np.ascontiguousarray(tensor.values),
        zero_point=zero[0] if scalar else zero,
        scale=scale[0] if scalar else scale,
        axis=wide[0] if wide else 0,
        before_op=operation,
        name=operation.name,
    )


def _typed(values: Array, kind: str) -> Array:
    # ``astype`` drops the metadata that tells 4 bits from 8; a view keeps it.
    return np.ascontiguousarray(values).view(types.nptype_from_builtin(types.string_to_builtin(kind)))
