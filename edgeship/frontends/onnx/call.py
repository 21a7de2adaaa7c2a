"""One ONNX node while it is imported: its inputs, its attributes, and how it declines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import AttributeProto, GraphProto, NodeProto

from edgeship.errors import SourceError, UnsupportedOpError
from edgeship.frontends.onnx.constants import ConstantStore
from edgeship.frontends.onnx.dtypes import ELEM_TYPE
from edgeship.frontends.onnx.tensors import read_sparse, read_tensor
from edgeship.frontends.onnx.values import (
    Cause,
    Grid,
    Picked,
    Product,
    Quantized,
    Rounded,
    Scaled,
    Value,
    is_constant,
)
from edgeship.program.rows import ChosenRows

#: Larger tensors are not computed at import: a damaged file can ask for any size.
MAX_ELEMENTS = 1 << 31


@dataclass(frozen=True)
class OpCall:
    """What an operator function gets. Inputs are torch tensors, constant (real) or graph values (fake)."""

    node: NodeProto
    opset: int
    where: str
    inputs: Sequence[Value]
    attributes: Mapping[str, AttributeProto]
    constants: ConstantStore
    elem_types: MutableMapping[torch.Tensor, int]
    model: Path
    run_subgraph: Callable[[GraphProto, Sequence[Value]], list[Value]]
    cause: Callable[[torch.Tensor], Cause]
    expand: Callable[[], tuple[Value, ...]]
    quantize: Callable[[torch.Tensor, Grid], Quantized]
    dynamic: MutableMapping[torch.Tensor, Rounded | Scaled | Product | Picked]
    note_dynamic: Callable[[], None]
    chosen: ChosenRows

    # Declining

    def refuse(self, reason: str, fix: str = "") -> UnsupportedOpError:
        """The error for a node that cannot be imported; raise it."""
        way_out = fix or "replace the operator in the source model, or keep that part outside the exported graph"
        return UnsupportedOpError(f"{self.where}: {reason}", fix=way_out)

    def broken(self, reason: str) -> SourceError:
        """The error for a node that contradicts the operator's specification; raise it."""
        return SourceError(f"{self.where}: {reason}", fix="check the file with onnx.checker, or export it again")

    # Inputs

    def given(self, index: int) -> bool:
        """Whether optional input ``index`` is there."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def x(self, index: int) -> torch.Tensor:
        """Input ``index``, a tensor that must be there. Any shape."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise self.broken(f"input {index} is missing")
        if isinstance(value, list):
            raise self.broken(f"input {index} is a sequence where a tensor belongs")
        return value.integers() if isinstance(value, Quantized) else value

    def quantized(self, index: int) -> Quantized | None:
        """Input ``index`` where it is integers of an activation on a known grid."""
        value = self.inputs[index] if index < len(self.inputs) else None
        return value if isinstance(value, Quantized) else None

    def optional(self, index: int) -> torch.Tensor | None:
        """Input ``index``, or None where the node leaves it out. Any shape."""
        return self.x(index) if self.given(index) else None

    def sequence(self, index: int) -> list[torch.Tensor]:
        """Input ``index``, a sequence of tensors. Any shapes."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if not isinstance(value, list):
            raise self.broken(f"input {index} is not a sequence")
        return value

    def tensors(self) -> list[torch.Tensor]:
        """All inputs of a variadic operator. Any shapes."""
        return [self.x(index) for index in range(len(self.inputs))]

    def weight(self, index: int) -> torch.Tensor:
        """Input ``index``, marked as a weight so that a constant becomes a parameter. Any shape."""
        value = self.x(index)
        if is_constant(value):
            self.constants.mark_weight(value)
        return value

    def optional_weight(self, index: int) -> torch.Tensor | None:
        """Like `weight`, for an input that may be left out. Any shape."""
        return self.weight(index) if self.given(index) else None

    def const(self, index: int, role: str = "") -> torch.Tensor:
        """Input ``index``, which must be known at import.

        Any shape.

        Raises:
            UnsupportedOpError: it depends on the data; names the graph inputs it comes from.
        """
        value = self.x(index)
        if not is_constant(value):
            what = role or f"input {index}"
            cause = self.cause(value)
            raise self.refuse(
                f"{what} must be a constant and depends on {cause.names}",
                fix=cause.fix or "export with fixed shapes, or store that input as an initializer",
            )
        return value

    def const_ints(self, index: int, role: str = "") -> list[int]:
        """Constant input ``index`` as a list of ints."""
        return [int(value) for value in self.const(index, role).reshape(-1).tolist()]

    def const_int(self, index: int, role: str = "") -> int:
        """Constant input ``index`` of one element as an int."""
        values = self.const_ints(index, role)
        if len(values) != 1:
            raise self.broken(f"input {index} has {len(values)} elements and should have one")
        return values[0]

    def ints_from(self, attribute: str, index: int) -> list[int] | None:
        """Ints that older opsets keep in an attribute and newer ones in a constant input; None: neither."""
        if attribute in self.attributes:
            return self.attr_ints(attribute)
        return self.const_ints(index, attribute) if self.given(index) else None

    def elem_type(self, index: int) -> int:
        """ONNX element type of input ``index``, also where torch stores it in a wider dtype."""
        quantized = self.quantized(index)
        if quantized is not None:
            return quantized.grid.elem_type
        value = self.x(index)
        return self.elem_types.get(value, ELEM_TYPE[value.dtype])

    # Attributes

    def has(self, name: str) -> bool:
        """Whether the attribute is there."""
        return name in self.attributes

    def attr_int(self, name: str, default: int | None = None) -> int:
        """An int attribute."""
        return int(self._attribute(name, AttributeProto.INT).i) if self._need(name, default) else default or 0

    def attr_float(self, name: str, default: float | None = None) -> float:
        """A float attribute."""
        return float(self._attribute(name, AttributeProto.FLOAT).f) if self._need(name, default) else default or 0.0

    def attr_text(self, name: str, default: str | None = None) -> str:
        """A string attribute."""
        if not self._need(name, default):
            return default or ""
        return str(self._attribute(name, AttributeProto.STRING).s.decode("utf-8", "replace"))

    def attr_ints(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """A list-of-ints attribute."""
        if not self._need(name, default):
            return list(default or ())
        return [int(value) for value in self._attribute(name, AttributeProto.INTS).ints]

    def attr_floats(self, name: str, default: Sequence[float] | None = None) -> list[float]:
        """A list-of-floats attribute."""
        if not self._need(name, default):
            return list(default or ())
        return [float(value) for value in self._attribute(name, AttributeProto.FLOATS).floats]

    def attr_texts(self, name: str, default: Sequence[str] | None = None) -> list[str]:
        """A list-of-strings attribute."""
        if not self._need(name, default):
            return list(default or ())
        return [value.decode("utf-8", "replace") for value in self._attribute(name, AttributeProto.STRINGS).strings]

    def attr_tensor(self, name: str) -> torch.Tensor:
        """A tensor attribute, dense or sparse. Any shape."""
        self._need(name, None)
        attribute = self.attributes[name]
        where = f'attribute "{name}" of {self.where}'
        if attribute.type == AttributeProto.SPARSE_TENSOR:
            return read_sparse(attribute.sparse_tensor, self.model, where)
        return read_tensor(self._attribute(name, AttributeProto.TENSOR).t, self.model, where)

    def attr_elem_type(self, name: str) -> int:
        """Element type of a tensor attribute."""
        return int(self._attribute(name, AttributeProto.TENSOR).t.data_type)

    def attr_graph(self, name: str) -> GraphProto:
        """A graph attribute: the body of a Loop, the branch of an If."""
        self._need(name, None)
        return self._attribute(name, AttributeProto.GRAPH).g

    # Outputs

    @property
    def n_outputs(self) -> int:
        """How many outputs the node declares."""
        return len(self.node.output)

    def wants(self, index: int) -> bool:
        """Whether anyone named output ``index``."""
        return index < len(self.node.output) and self.node.output[index] != ""

    def axis(self, axis: int, rank: int) -> int:
        """``axis`` counted from the front; raises where the tensor has no such axis."""
        if not -rank <= axis < max(rank, 1):
            raise self.broken(f"axis {axis} does not exist in a tensor of rank {rank}")
        return axis % rank if rank else 0

    def check_size(self, shape: Sequence[int]) -> None:
        """Raise before computing something absurdly large."""
        if any(size < 0 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise self.broken(f"the result would have the shape {list(shape)}")

    def _need(self, name: str, default: object) -> bool:
        if name in self.attributes:
            return True
        if default is None:
            raise self.broken(f'attribute "{name}" is missing')
        return False

    def _attribute(self, name: str, kind: AttributeProto.AttributeType) -> AttributeProto:
        attribute = self.attributes[name]
        if attribute.type != kind:
            raise self.broken(f'attribute "{name}" has the wrong type')
        return attribute
