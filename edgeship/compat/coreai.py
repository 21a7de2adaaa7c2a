"""What edgeship takes from Core AI's packages that they do not document. Written for coreai-core 1.0.0b3 and
coreai-torch 0.4.3.

It ends when ``coreai.authoring`` can make constants and operations itself, with names and locations, and when
`coreai_torch.TorchConverter` can be told what stands for a weight.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import coreai.authoring  # noqa: F401  before its dialects, which import it in a circle
import numpy as np
from coreai._compiler import ir
from coreai._compiler._mlir_libs._coreaiIR._bindings import mlir as _bindings
from coreai._compiler.dialects import coreai as dialect
from coreai._compiler.ir import (
    Attribute,
    DenseElementsAttr,
    DenseResourceElementsAttr,
    F16Type,
    F32Type,
    Float4E2M1FNType,
    Float8E8M0FNUType,
    FloatAttr,
    InsertionPoint,
    IntegerType,
    Location,
    Operation,
    RankedTensorType,
    StringAttr,
    Type,
    Value,
)
from coreai.authoring import func, graph_builder
from coreai_torch import TorchConverter
from coreai_torch._aten_to_core import _aten_to_core_resolver

from edgeship.compat.exchange import exchanged

if TYPE_CHECKING:
    from coreai.authoring import AIProgram
    from torch.fx import Node

__all__ = [
    "Attribute",
    "Converter",
    "DenseElementsAttr",
    "DenseResourceElementsAttr",
    "F16Type",
    "F32Type",
    "Float4E2M1FNType",
    "Float8E8M0FNUType",
    "FloatAttr",
    "InsertionPoint",
    "IntegerType",
    "Location",
    "Operation",
    "RankedTensorType",
    "StringAttr",
    "Type",
    "Value",
    "dialect",
    "drawn_names",
    "hashed_constants",
    "ir",
    "knows_aten",
    "module_of",
    "numbered_names",
]

# Beside its function of the same name, which hides it.
_constants = importlib.import_module("coreai._compiler.dialects.coreai.constant")
RESOURCE = "resource_"
# Of a constant that is made twice to be named: weights have names of their own, and what is left is small.
MOST_BYTES = 64 << 20


def module_of(program: AIProgram) -> Any:
    """The MLIR module of a program: what it computes, operation by operation."""
    return program._module._mlir_module


@contextmanager
def numbered_names() -> Iterator[None]:
    """Inside, in this thread, names that get eight letters drawn at random get the next eight instead: aaaaaaaa,
    aaaaaaab. Without it no two conversions give the same bytes."""
    numbers, here, plain = itertools.count(), threading.get_ident(), func._randomize_fn_name

    def numbered(name: str) -> str:
        if threading.get_ident() != here:
            return str(plain(name))
        number = next(numbers)
        letters = (ascii_lowercase[number // 26**place % 26] for place in reversed(range(8)))
        return f"{name}_{''.join(letters)}"

    name = "_randomize_fn_name"
    with exchanged(func, name, numbered), exchanged(graph_builder, name, numbered):
        yield


@contextmanager
def hashed_constants() -> Iterator[None]:
    """Inside, constants that have no name of their own get one by their content. The library takes a hash that is
    another in each process."""
    plain = _bindings.dialects.coreai.create_elements_attr

    def create(location: Any, kind: Any, data: Any) -> Any:
        made = plain(location, kind, data)
        array = np.ascontiguousarray(data)
        # Types narrower than a byte are packed in ways of their own; small constants are no resources.
        drawn = array.nbytes <= MOST_BYTES and str(made).startswith(f"dense_resource<{RESOURCE}")
        if not drawn or array.dtype.itemsize * 8 != _width(kind):
            return made
        digest = hashlib.sha256(str(kind).encode() + array.tobytes()).hexdigest()
        return DenseResourceElementsAttr.get_from_buffer(array, f"{RESOURCE}{digest[:16]}", kind)

    name = "create_elements_attr"
    with exchanged(_bindings.dialects.coreai, name, create), exchanged(_constants, name, create):
        yield


def drawn_names(names: Iterable[str]) -> list[str]:
    """Which names of constants are others in the next process: the library's own, numbers of up to 20 digits."""
    ours = re.compile(f"{RESOURCE}[0-9a-f]{{16}}")
    return [name for name in names if name.startswith(RESOURCE) and not ours.fullmatch(name)]


def _width(kind: Any) -> int:
    """Bits of an element of a tensor type; 0 where it is not of whole bytes."""
    element = ir.RankedTensorType(kind).element_type
    known = {ir.F32Type: 32, ir.F16Type: 16, ir.BF16Type: 16}
    for cls, bits in known.items():
        if cls.isinstance(element):
            return bits
    width = ir.IntegerType(element).width if ir.IntegerType.isinstance(element) else 0
    return width if width % 8 == 0 else 0


def knows_aten(key: str) -> bool:
    """Whether the converter lowers ``aten.<key>``, such as ``add.Tensor``."""
    return key in _aten_to_core_resolver


class Converter(TorchConverter):  # type: ignore[misc]
    """`TorchConverter` in its release mode, whose steps a subclass may take over."""

    def __init__(self) -> None:
        super().__init__(mode=TorchConverter.Mode.RELEASE)

    def to_coreai(self, *given: Any, **options: Any) -> AIProgram:
        """The program; operators that the converter makes of others have the same names each time."""
        with numbered_names(), hashed_constants():
            return super().to_coreai(*given, **options)

    def begin(self, name: str, **options: Any) -> Any:
        """Begin the graph of an entry point; the graph's operation."""
        return super()._get_graph_op(name, **options)

    def placeholder(self, node: Node) -> None:
        """Bring in an input or a weight, under its node's target."""
        super()._handle_placeholder_op(node)

    def call(self, node: Node) -> None:
        """Lower one operator."""
        super()._handle_call_function_op(node)

    def bind(self, node: Node, value: Value) -> None:
        """Let a placeholder stand for a value."""
        self._values_map[node.target] = value

    def _get_graph_op(self, name: str, **options: Any) -> Any:
        return self.begin(name, **options)

    def _handle_placeholder_op(self, node: Node) -> None:
        self.placeholder(node)

    def _handle_call_function_op(self, node: Node) -> None:
        self.call(node)
