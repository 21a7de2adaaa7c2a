"""Values while a graph is imported: a constant is a real tensor, anything else a fake tensor with a graph node.

Operators are written as plain torch code. Run on real tensors, that code *is* the constant folding; run on
fake tensors, every torch call it makes is written down as one node of a torch.fx graph.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from edgeship.compat.torch import FakeTensor, FakeTensorMode, WeakIdKeyDictionary, pair_operators
from edgeship.data.specs import in_command
from edgeship.frontends.onnx.constants import ConstantStore, is_real
from edgeship.frontends.onnx.dtypes import TORCH_DTYPE, integer_range
from edgeship.frontends.onnx.fusions import SHAPE, fuse
from edgeship.program.rows import ChosenRows
from edgeship.program.suppression import CANDIDATES


@dataclass(frozen=True)
class Grid:
    """The integers that an activation is rounded to: ``value = scale * (integer - zero_point)``, one scale for all."""

    scale: float
    zero_point: int
    elem_type: int


@dataclass(frozen=True)
class Quantized:
    """Integers of the graph, kept as the float ``value`` on its grid: integers are computed only where one asks."""

    value: torch.Tensor
    grid: Grid

    def integers(self) -> torch.Tensor:
        """The integers themselves. The shape of the value."""
        low, high = integer_range(self.grid.elem_type)
        whole = torch.round(torch.div(self.value, self.grid.scale))
        shifted = torch.clamp(torch.add(whole, float(self.grid.zero_point)), low, high)
        dtype = TORCH_DTYPE[self.grid.elem_type]
        return (shifted.to(torch.int64) if dtype == torch.uint16 else shifted).to(dtype)


@dataclass(frozen=True)
class Rounded:
    """What is known of integers whose ``scale`` the data decide: the float ``value`` that was rounded."""

    value: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class Scaled:
    """A number that is ``scale``, which the data decide, times constants."""

    scale: torch.Tensor
    factor: torch.Tensor


@dataclass(frozen=True)
class Product:
    """A sum of integer products with constant weights; ``make`` gives it in float, from the scale of the weights."""

    scale: torch.Tensor
    make: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Picked:
    """Rows of a constant ``table`` of integers, [rows, columns], at ``indices``."""

    table: torch.Tensor
    indices: torch.Tensor


#: What an ONNX name can stand for: a tensor, integers of an activation, a sequence, or an input that was left out.
Value = torch.Tensor | Quantized | list[torch.Tensor] | None


@dataclass(frozen=True)
class Cause:
    """Why a value is not known at import: the graph inputs it comes from, in words, and how to fix them."""

    names: str
    fix: str


def is_constant(value: Value) -> bool:
    """Whether ``value`` is known at import time (a missing optional input is)."""
    if isinstance(value, list):
        return all(is_constant(item) for item in value)
    return value is None or (isinstance(value, torch.Tensor) and is_real(value))


class Recorder(TorchFunctionMode):
    """While active, records each torch call that touches a graph value; calls on constants just run."""

    def __init__(self, candidates: int = CANDIDATES) -> None:
        super().__init__()
        self.graph = fx.Graph()
        #: Which rows of graph values count, where values choose them; a mode inside this one.
        self.chosen = ChosenRows(candidates, is_constant)
        self.constants = ConstantStore()
        self.label = ""
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._nodes = WeakIdKeyDictionary()
        self._reads: dict[str, fx.Node] = {}
        self._input_names: dict[fx.Node, str] = {}
        self._argument_names: set[str] = set()
        #: Graph value -> `Rounded`, `Scaled` or `Product`, while integers that the data decide are followed.
        self.dynamic = WeakIdKeyDictionary()
        self.is_dynamic = False

    def input(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A new graph input; call it in graph order, before recording starts.

        The tensor stands for the input: it has its shape and no numbers.
        """
        argument = re.sub(r"\W", "_", name, flags=re.ASCII)
        if not argument.isidentifier() or keyword.iskeyword(argument) or argument == "self":
            argument = f"input_{argument}"
        while argument in self._argument_names:
            argument += "_"
        self._argument_names.add(argument)
        with self._fake_mode:
            value = torch.empty(tuple(shape), dtype=dtype)
        node = self.graph.placeholder(argument)
        node.meta[SHAPE] = tuple(value.shape)
        self._nodes[value] = node
        self._input_names[node] = name
        return value

    def quantize(self, value: torch.Tensor, grid: Grid) -> Quantized:
        """A graph value rounded to a grid, as a pair of operators that `edgeship.program.activations` knows again.

        Any shape.
        """
        bits = 8 * TORCH_DTYPE[grid.elem_type].itemsize
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        # Signed integers with the zero point moved along: the same grid.
        zero = grid.zero_point - (integer_range(grid.elem_type)[0] - low)
        numbers = (grid.scale, zero, low, high, torch.int8 if bits == 8 else torch.int16)
        ops = pair_operators()
        integers = self.graph.call_function(ops.quantize_per_tensor.default, (self._nodes[value], *numbers))
        restored = self.graph.call_function(ops.dequantize_per_tensor.default, (integers, *numbers))
        integers.meta[SHAPE] = restored.meta[SHAPE] = tuple(value.shape)
        with self._fake_mode:
            result = torch.empty(tuple(value.shape), dtype=value.dtype)
        self._nodes[result] = restored
        return Quantized(result, grid)

    def note_dynamic(self) -> None:
        """Remember that the file rounds activations by the data at hand."""
        self.is_dynamic = True

    def cause(self, value: torch.Tensor) -> Cause:
        """The graph inputs that ``value`` depends on, for an error message."""
        pending, seen, found = [self._nodes[value]], set(), []
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                found.append(node)
            pending.extend(node.all_input_nodes)
        names = sorted(f'input "{self._input_names[node]}"' for node in found)
        small = [node for node in found if math.prod(node.meta[SHAPE]) == 1]
        # Fixing a scalar settles a branch; nobody would fix an image.
        fix = ""
        if small and len(small) == len(found):
            fixes = (in_command(self._input_names[node], f"={_compared_with(node)}") for node in small)
            fix = f"fix its value: {' '.join(sorted(fixes))}"
        return Cause(" and ".join(names) or "nothing that is known", fix)

    def finish(self, outputs: Sequence[torch.Tensor]) -> fx.GraphModule:
        """The module that computes ``outputs``, as a tuple, from the inputs. Each output in its own shape."""
        self.graph.output(tuple(self._argument(value) for value in outputs))
        self.graph.eliminate_dead_code()
        fuse(self.graph)
        self.graph.lint()
        return fx.GraphModule(self.constants.root, self.graph, class_name="ImportedOnnxModule")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not _touches_graph((args, kwargs)):
            return func(*args, **kwargs)
        with self._fake_mode:
            result = func(*args, **kwargs)
        # A call may hand back its own argument (`contiguous`, `to`): that value has its node already.
        known = isinstance(result, torch.Tensor) and result in self._nodes
        if not known and _touches_graph(result):
            self._record(func, args, kwargs, result)
        return result

    def _record(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        node_args = fx.node.map_aggregate(tuple(args), self._argument)
        node_kwargs = fx.node.map_aggregate(kwargs, self._argument)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            raise AssertionError("operators call torch functions, not tensor properties, on graph values")
        if name == "__getitem__":
            node = self.graph.create_node("call_function", operator.getitem, node_args, node_kwargs)
        elif is_tensor_method_or_property(func):
            node = self.graph.create_node("call_method", name, node_args, node_kwargs)
        else:
            node = self.graph.create_node("call_function", func, node_args, node_kwargs)
        node.meta["onnx_node"] = self.label
        if isinstance(result, torch.Tensor):
            node.meta[SHAPE] = tuple(result.shape)
            self._nodes[result] = node
            return
        for index, item in enumerate(result):
            if isinstance(item, FakeTensor):
                part = self.graph.call_function(operator.getitem, (node, index))
                part.meta[SHAPE] = tuple(item.shape)
                self._nodes[item] = part

    def _argument(self, value: Any) -> Any:
        """A graph value as its node, a constant tensor as a read of the module's attribute."""
        if isinstance(value, FakeTensor):
            return self._nodes[value]
        if isinstance(value, torch.Size):
            return tuple(value)
        if not isinstance(value, torch.Tensor):
            return value
        path = self.constants.place(value)
        if path not in self._reads:
            self._reads[path] = self.graph.get_attr(path)
            self._reads[path].meta[SHAPE] = tuple(value.shape)
        return self._reads[path]


def _compared_with(node: fx.Node) -> str:
    """A number that the graph compares an input with, so that a fix can be typed; ``VALUE`` where there is none."""
    pending, seen = [node], set()
    while pending:
        following = pending.pop()
        if following in seen:
            continue
        seen.add(following)
        for user in following.users:
            numbers = [arg for arg in user.args if isinstance(arg, (bool, int, float))]
            if user.target in (torch.eq, torch.ge, torch.le, torch.gt, torch.lt) and numbers:
                return str(numbers[0]).lower()
            if user.target in (torch.reshape, torch.squeeze, torch.unsqueeze, "to", "reshape", "squeeze"):
                pending.append(user)
    return "VALUE"


def _touches_graph(value: Any) -> bool:
    if isinstance(value, FakeTensor):
        return True
    if isinstance(value, (tuple, list)):
        return any(_touches_graph(item) for item in value)
    if isinstance(value, dict):
        return any(_touches_graph(item) for item in value.values())
    return False
