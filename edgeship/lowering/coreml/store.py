"""Store every decided weight in an mlprogram exactly, as a ``constexpr_*`` operation.

This is a graph pass at the very start of coremltools' pipeline. The front end names constants after the graph's
placeholders; each that stands for an encoded weight is replaced before any other pass can fold, cast or merge it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass

from edgeship.compat.coremltools import add_pass
from edgeship.core.weights import FloatTensor, MXFP4Tensor, SparseTensor
from edgeship.errors import EncodingError
from edgeship.lowering.coreml.constexpr import Stored, build

if TYPE_CHECKING:
    from edgeship.core.weights import EncodedTensor

# The names that the operations of an activation's grid get; runtimes/coreml/grids.py finds them.
QUANTIZED = "{}__int8"
RESTORED = "{}__restored"


@dataclass
class Order:
    """What the pass is to store: constant -> (weight, how), for one version of iOS. It takes out what it stored.

    ``in_fours`` are weights whose integers of 2 and 3 bits stand in 4. ``grids`` has dequantize operation ->
    activation, to name the pair after.
    """

    ios: int
    waiting: dict[str, tuple[str, Stored]]
    in_fours: frozenset[str] = frozenset()
    grids: dict[str, str] = field(default_factory=dict)


def order(encoded: Mapping[str, EncodedTensor], constants: Mapping[str, str], ios: int) -> Order:
    """An order for the pass.

    Args:
        encoded: decided weights by name.
        constants: name of the constant -> weight.
        ios: the version to store for.

    Raises:
        EncodingError: there is no form for an encoding.
    """
    waiting = {}
    for constant, weight in constants.items():
        tensor = encoded.get(weight)
        if tensor is None or isinstance(tensor, FloatTensor):
            continue
        if not isinstance(tensor, Stored):
            raise EncodingError(f"Core ML cannot store {tensor.encoding} for {weight}", fix="use another encoding")
        _check(weight, tensor)
        waiting[constant] = (weight, tensor)
    return Order(ios, waiting)


def _check(weight: str, tensor: Stored) -> None:
    if isinstance(tensor, SparseTensor) and not tensor.mask.any():
        raise EncodingError(
            f"{weight} is all zeros, and Core ML stores no sparse weight without values",
            fix="prune less, or store it dense",
        )
    if isinstance(tensor, MXFP4Tensor) and not tensor.fits_float16:
        raise EncodingError(f"{weight} has scales beyond those of float16", fix="store it as float16 or int8")


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
                    elif operation.op_type == "dequantize" and operation.name in self.order.grids:
                        _name_pair(operation, self.order.grids[operation.name])


def _replace(function: Any, operation: Any, order: Order) -> None:
    weight, tensor = order.waiting.pop(operation.name)
    stored = build(tensor, order.ios, operation, listed=weight not in order.in_fours)
    function.replace_uses_of_var_after_op(
        anchor_op=operation, old_var=operation.outputs[0], new_var=stored, force_replace=True
    )
    function.remove_ops([operation])


def _name_pair(dequantize: Any, activation: str) -> None:
    """Name both operations after the activation, so that its grid is found in the saved file."""
    block = dequantize.enclosing_block
    for operation, name in ((dequantize.input.op, QUANTIZED), (dequantize, RESTORED)):
        # Outputs of the program keep the names that the signature gives them.
        if operation.outputs[0] in block.outputs:
            continue
        operation.name = name.format(activation)
        operation.outputs[0].set_name(operation.name)


PASS = add_pass("store_exact", _StoreExact)
