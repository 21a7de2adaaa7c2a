"""Puts layers back together that exporters had taken apart, so that converters and quantization see them whole.

Three shapes that real files are full of: a product with a bias added after it, and, from before the operators
existed (opset 17 and 20), layer norm and Gelu spelled out. Each is replaced only where nothing else reads the
values in between.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

SHAPE = "shape"


def fuse(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place; nodes carry the shape of their value in ``meta[SHAPE]``."""
    for node in list(graph.nodes):
        for rule in (_linear_bias, _layer_norm, _gelu):
            replacement = rule(graph, node)
            if replacement is not None:
                node.replace_all_uses_with(replacement)
                break
    graph.eliminate_dead_code()


def _linear_bias(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``linear(x, w) + b`` is ``linear(x, w, b)``."""
    for product, bias in _either_way(node, torch.add):
        if not _calls(product, F.linear) or len(product.args) != 2 or not _only_use(product):
            continue
        if _is_constant(bias) and _shape(bias) == _shape(product)[-1:]:
            return _insert(graph, node, F.linear, (*product.args, bias))
    return None


def _layer_norm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``(x - mean) / sqrt(mean((x - mean)^2) + eps)``, with scale and bias where they follow."""
    x, epsilon = _normalized(node)
    if x is not None:
        return _insert(graph, node, F.layer_norm, (x, _shape(x)[-1:], None, None, epsilon))
    for product, bias in _either_way(node, torch.add):
        for norm, scale in _either_way(product, torch.mul):
            if not _calls(norm, F.layer_norm) or not (_only_use(product) and _only_use(norm)):
                continue
            both_fit = _shape(scale) == _shape(bias) == norm.args[1]
            if both_fit and _is_constant(scale) and _is_constant(bias) and norm.args[2] is None:
                arguments = (norm.args[0], norm.args[1], scale, bias, norm.args[4])
                return _insert(graph, node, F.layer_norm, arguments)
    return None


def _normalized(node: Any) -> tuple[fx.Node | None, float]:
    """``x`` and epsilon, where ``node`` is the division at the end of a layer norm over the last axis."""
    nothing = None, 0.0
    if not _calls(node, torch.div):
        return nothing
    centred, deviation = node.args[:2]
    if not _calls(deviation, torch.sqrt) or not _calls(deviation.args[0], torch.add):
        return nothing
    variance, epsilon = deviation.args[0].args[:2]
    x = _centred_from(centred)
    if x is None or not isinstance(epsilon, float) or not _calls(variance, torch.mean):
        return nothing
    if not _over_last_axis(variance):
        return nothing
    square = variance.args[0]
    squared = _calls(square, torch.pow) and square.args[1] == 2
    multiplied = _calls(square, torch.mul) and square.args[0] is square.args[1]
    if not squared and not multiplied:
        return nothing
    root = square.args[0]
    return (x, epsilon) if root is centred or _centred_from(root) is x else nothing


def _centred_from(node: Any) -> fx.Node | None:
    """``x``, where ``node`` is ``x - mean(x)`` over the last axis."""
    if not _calls(node, torch.sub):
        return None
    x, mean = node.args[:2]
    fits = _calls(mean, torch.mean) and mean.args[0] is x and _over_last_axis(mean)
    return x if isinstance(x, fx.Node) and fits else None


def _over_last_axis(mean: Any) -> bool:
    source = mean.args[0]
    last = len(_shape(source)) - 1
    return list(mean.args[1]) in ([last], [-1]) and bool(mean.kwargs.get("keepdim"))


def _gelu(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``0.5 * x * (1 + erf(x / sqrt(2)))``, multiplied in any order."""
    if not _calls(node, torch.mul):
        return None
    factors = list(_factors(node, outermost=True))
    if len(factors) != 3 or not any(factor == 0.5 for factor in factors):
        return None
    for factor in factors:
        for erf, one in _either_way(factor, torch.add):
            if one != 1.0 or not _calls(erf, torch.erf):
                continue
            for x in factors:
                if isinstance(x, fx.Node) and x is not factor and _is_scaled(erf.args[0], x):
                    return _insert(graph, node, F.gelu, (x,))
    return None


def _is_scaled(node: Any, x: fx.Node) -> bool:
    """Whether ``node`` is ``x / sqrt(2)``."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not node.args or node.args[0] is not x:
        return False
    factor = node.args[1] if len(node.args) > 1 else None
    if not isinstance(factor, float):
        return False
    if node.target is torch.div:
        return math.isclose(factor, math.sqrt(2), rel_tol=1e-5)
    return node.target is torch.mul and math.isclose(factor, math.sqrt(0.5), rel_tol=1e-5)


def _factors(node: Any, *, outermost: bool = False) -> Iterator[Any]:
    """What a chain of products multiplies; a product that something else reads too is one factor."""
    if _calls(node, torch.mul) and (outermost or _only_use(node)):
        yield from _factors(node.args[0])
        yield from _factors(node.args[1])
    else:
        yield node


def _either_way(node: Any, function: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    """Both orders of the arguments of a commutative call."""
    if _calls(node, function) and len(node.args) == 2 and not node.kwargs:
        left, right = node.args
        yield left, right
        yield right, left


def _insert(graph: fx.Graph, before: fx.Node, function: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(function, arguments)
    node.meta.update(before.meta)
    return node


def _calls(node: Any, function: Callable[..., Any]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is function


def _only_use(node: fx.Node) -> bool:
    return len(node.users) == 1


def _is_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _shape(node: Any) -> tuple[int, ...]:
    """Shape of a node's value; one that no value has where it is unknown."""
    return tuple(map(operator.index, node.meta.get(SHAPE, (-1,)))) if isinstance(node, fx.Node) else (-1,)
