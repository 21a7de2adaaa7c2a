"""Where a scale of each channel can move from a layer's inputs into the weights that made them, with equal results.

AWQ and SmoothQuant divide the inputs of linear layers by ``s`` and multiply their weights by it. That costs nothing at
run time where whatever makes the inputs is linear in its own weights (a norm's weight and bias, a linear layer's rows)
and every reader of them is such a linear layer. A search follows each producer's channels through views, attention and
products to all readers; one reader that does anything else, and there is no fold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgeship.errors import DataError, EncodingError
from edgeship.program.inventory import weight_nodes

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

    from edgeship.program.program import TorchProgram

# Every number of the result is one number of the first argument.
VIEWS = {
    "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "flatten", "unflatten", "repeat",
    "repeat_interleave", "slice", "select", "movedim", "clone", "contiguous", "tile",
}  # fmt: skip
# f(s x) = s f(x) for s > 0, number by number.
HOMOGENEOUS = {"relu", "relu_", "leaky_relu", "leaky_relu_", "neg"}


@dataclass(frozen=True)
class Fold:
    """One place for a scale.

    Args:
        producer: the node that makes the inputs. weights: names of its weights, divided by ``s`` along axis 0.
        consumers: nodes of linear layers, and their weights' names, multiplied by ``s`` along axis 1.
        channels: for each input channel of the consumers, the producer's channel that it is (several may be one, as in
            grouped attention).
        size: the producer's channels; ``s`` has one positive number for each.
    """

    producer: str
    weights: tuple[str, ...]
    consumers: tuple[tuple[str, str], ...]
    channels: tuple[int, ...]
    size: int

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """``s`` for the consumers' input channels, ``(K,)``."""
        import torch

        return scale[torch.tensor(self.channels)]


def find_folds(program: TorchProgram) -> list[Fold]:
    """Every fold of a float program, in graph order. Weights that are tied, shared or encoded already take no part."""
    signature = program.exported.graph_signature
    constants = {node: name for name, node in weight_nodes(program.exported).items()}
    tied = set(program.record.aliases) | set(program.record.aliases.values())
    fixed = set(signature.inputs_to_buffers)
    free = {
        node: name
        for node, name in constants.items()
        if len(node.users) == 1 and name not in tied and name not in program.encoded and node.name not in fixed
    }
    folds = []
    for node in program.exported.graph.nodes:
        source = _source(node, free)
        if source is None:
            continue
        consumers, channels = _follow(node, free)
        if consumers:
            folds.append(Fold(node.name, source, tuple(consumers), tuple(channels), _shape(node)[-1]))
    return folds


def apply_fold(weights: Mapping[str, torch.Tensor], fold: Fold, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The float weights that change when ``scale`` is folded, by name.

    Args:
        weights: float weights by name, such as ``program.weights``, or a `ChainMap` with earlier folds in front.
        scale: ``(fold.size,)``, positive: inputs are divided by it.

    Raises:
        EncodingError: of another size. DataError: not positive and finite.
    """
    import torch

    if tuple(scale.shape) != (fold.size,):
        raise EncodingError(f"{fold.producer} has {fold.size} channels, not {tuple(scale.shape)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise DataError(f"scales for {fold.producer} are not positive", fix="check the calibration data")
    # In float64, so that only one rounding moves the weights.
    scale = scale.detach().double()
    changed = {}
    for name in fold.weights:
        value = weights[name]
        changed[name] = (value.double() / scale.reshape(-1, *[1] * (value.dim() - 1))).to(value.dtype)
    for _, name in fold.consumers:
        changed[name] = (weights[name].double() * fold.spread(scale)).to(weights[name].dtype)
    return changed


def _source(node: Node, free: Mapping[Node, str]) -> tuple[str, ...] | None:
    """The weights to divide, when a node's result is linear in them, channel by channel of its last axis."""
    name = _name(node)
    arguments: list[Any] = list(node.args)
    owned: list[Any]
    if name in ("layer_norm", "native_layer_norm"):
        owned = arguments[2:4] if len(arguments[1]) == 1 else [None]
    elif name == "rms_norm":
        owned = arguments[2:3] if len(arguments[1]) == 1 else [None]
    elif name == "linear":
        owned = [arguments[1], *(item for item in arguments[2:3] if item is not None)]
    elif name == "mul":
        # The weight of a root mean square norm: one number a channel, times what the inputs made.
        scales = [item for item in arguments if item in free and len(_shape(item)) == 1]
        if not scales or _shape(scales[0])[0] != _shape(node)[-1]:
            return None
        owned = scales[:1]
    else:
        return None
    if not owned or any(item not in free for item in owned):
        return None
    return tuple(free[item] for item in owned)


def _follow(source: Node, free: Mapping[Node, str]) -> tuple[list[tuple[str, str]], list[int]]:
    """All linear layers that read a producer's channels, and which channels; nothing when anything else does."""
    import torch

    shape = _shape(source)
    indices = {source: torch.arange(shape[-1]).expand(shape)}
    consumers: list[tuple[str, str]] = []
    channels: list[int] = []
    for node in source.graph.nodes:
        carried = [arg for arg in node.all_input_nodes if arg in indices]
        if not carried or node is source:
            continue
        if _name(node) == "linear" and carried == [node.args[0]] and node.args[1] in free:
            index = indices[cast("Node", node.args[0])]
            line = index.reshape(-1, index.shape[-1])
            same = bool((line == line[0]).all()) and (not channels or channels == line[0].tolist())
            if not same:
                return [], []
            channels = line[0].tolist()
            consumers.append((node.name, free[cast("Node", node.args[1])]))
            continue
        passed = _pass_on(node, carried[0], indices[carried[0]]) if len(carried) == 1 else None
        if passed is None:
            return [], []
        indices[node] = passed
    return consumers, channels


def _pass_on(node: Node, carried: Node, index: torch.Tensor) -> torch.Tensor | None:
    """The channel that each number of a node's result is, when it is linear in that channel alone."""
    import torch

    name, arguments = _name(node), list(node.args)
    if arguments.count(carried) != 1:
        return None
    place = arguments.index(carried)
    if name in HOMOGENEOUS:
        return index
    if name in ("view", "reshape", "_unsafe_view") and place == 0:
        return index.reshape(_shape(node))
    if name in VIEWS and place == 0 and len(node.all_input_nodes) == 1:
        return cast("torch.Tensor", cast("Any", node.target)(index, *arguments[1:], **node.kwargs))
    if name == "mul" or (name == "div" and place == 0):
        return index.expand(_shape(node)) if len(node.all_input_nodes) == 2 else index
    attends = name == "scaled_dot_product_attention" and place == 2
    if attends or (name in ("matmul", "bmm") and place == 1 and index.dim() > 2):
        # Positions are mixed, channels are not: all positions must have the same ones.
        shape = _shape(node)
        if not bool((index == index[..., :1, :]).all()):
            return None
        if attends and node.kwargs.get("enable_gqa"):
            index = index.repeat_interleave(shape[-3] // index.shape[-3], -3)
        return torch.broadcast_to(index[..., :1, :], shape)
    return None


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", "")).split(".")[0] if node.op == "call_function" else ""


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)
