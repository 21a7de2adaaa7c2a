"""Constants that the result of a convolution is scaled by, or that are added to it, go into its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from edgeship.program.folding import attach_over, fetch, name_of_bias

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

# Weights that a factor leaves outside of these would lose precision, or their finiteness, in float16.
FOLDED_RANGE = (1e-3, 1e3)


def fold_factors(module: GraphModule) -> None:
    """Multiply the weights of a convolution by the constant that its result is scaled by, and drop that.

    Converters do the same on their way, with what was decided for the weight, or fail to. A sum with a constant of one
    number a channel goes into the bias. A linear layer keeps its factor: those of language models stay on disk.
    """
    import torch

    aten = torch.ops.aten
    sums = (aten.add.Tensor, aten.sub.Tensor)
    factors = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in (*sums, *factors) or len(node.args) != 2 or node.kwargs:
            continue
        left_is_layer = _is_own_convolution(module, node.args[0])
        swapped = not left_is_layer and node.target in (aten.mul.Tensor, aten.add.Tensor)
        layer, other = (node.args[1], node.args[0]) if swapped else node.args
        if not (left_is_layer or (swapped and _is_own_convolution(module, layer))):
            continue
        number = _of_channels(module, other, layer)
        if number is None or node.meta["val"].shape != layer.meta["val"].shape:
            continue
        if node.target in sums:
            _fold_into(module, layer, torch.ones_like(number), number if node.target == sums[0] else -number)
        else:
            factor = number if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1 / number
            largest = float((fetch(module, str(layer.args[1].target)).abs().max() * factor.abs().max()).item())
            if not FOLDED_RANGE[0] <= largest <= FOLDED_RANGE[1] or not bool(torch.isfinite(factor).all()):
                continue
            _fold_into(module, layer, factor, torch.zeros_like(factor))
        node.replace_all_uses_with(layer)
        module.graph.erase_node(node)


def _is_own_convolution(module: GraphModule, layer: Any) -> bool:
    import torch

    return _is_own_layer(module, layer) and layer.target != torch.ops.aten.linear.default


def _is_own_layer(module: GraphModule, layer: Any) -> bool:
    """Whether a value is a layer's with a weight (and bias) of its own, in memory, and is read once."""
    import torch

    aten = torch.ops.aten
    targets = (
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default,
        aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    )  # fmt: skip
    if getattr(layer, "op", "") != "call_function" or layer.target not in targets or len(layer.users) != 1:
        return False
    for parameter in layer.args[1:3]:
        if parameter is None:
            continue
        if parameter.op != "get_attr":
            return False
        held = fetch(module, str(parameter.target))
        readers = [node for node in module.graph.nodes if node.op == "get_attr" and node.target == parameter.target]
        alone = len(parameter.users) == 1 and len(readers) == 1
        # A hollow weight is one number seen from everywhere; the real one lies on disk.
        hollow = held.is_meta or (held.numel() > 1 and not any(held.stride()))
        if not isinstance(held, torch.nn.Parameter) or not alone or hollow:
            return False
    return True


def _is_transposed(layer: Node) -> bool:
    return "transpose" in str(layer.target)


def _of_channels(module: GraphModule, other: Any, layer: Node) -> torch.Tensor | None:
    """A constant as one number for each of a layer's output channels, float64; None where it is none."""
    import torch

    shape = layer.meta["val"].shape
    # The weight has as many axes as an answer with a batch; without one the channels come first.
    axis = len(shape) - cast("Node", layer.args[1]).meta["val"].dim() + 1
    channels = int(shape[axis])
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return torch.full((channels,), float(other), dtype=torch.float64)
    if getattr(other, "op", "") != "get_attr":
        return None
    value = fetch(module, str(other.target))
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.is_meta:
        return None
    if value.dim() > len(shape) or (len(shape) - value.dim() not in (0, 1) and value.numel() > 1):
        return None
    wide = value.detach().double().reshape(*[1] * (len(shape) - value.dim()), *value.shape)
    if any(size != 1 for place, size in enumerate(wide.shape) if place != axis):
        return None
    return wide.reshape(-1).expand(channels).clone()


def _fold_into(module: GraphModule, layer: Node, factor: torch.Tensor, shift: torch.Tensor | float) -> None:
    """Let a layer answer ``factor * y + shift``, one number a channel, in float64."""
    weight, name = cast("Node", layer.args[1]), str(cast("Node", layer.args[1]).target)
    old = fetch(module, name)
    bias = cast("Node | None", layer.args[2] if len(layer.args) > 2 else None)
    held = None if bias is None else fetch(module, str(bias.target)).double()
    if _is_transposed(layer):
        # [in, out / groups, ...]: the outputs of a group lie along the second axis, groups along the first.
        groups = int(cast("int", layer.args[6])) if len(layer.args) > 6 else 1
        spread = factor.reshape(groups, -1).repeat_interleave(old.shape[0] // groups, 0)
        folded = old.double() * spread.reshape(*spread.shape, *[1] * (old.dim() - 2))
    else:
        folded = old.double() * factor.reshape(-1, *[1] * (old.dim() - 1))
    attach_over(module, name, folded.to(old.dtype))
    offset = (0 if held is None else held) * factor + shift
    if bias is None and not bool((offset != 0).any()):
        return
    bias_name = str(bias.target) if bias is not None else name_of_bias(module, layer)
    attach_over(module, bias_name, offset.to(old.dtype))
    with module.graph.inserting_before(weight if bias is None else bias):
        bias_node = module.graph.get_attr(bias_name)
        bias_node.meta["val"] = layer.meta["val"].new_empty(offset.shape)
    args = list(layer.args)
    layer.args = (args[0], args[1], bias_node, *args[3:])
    if bias is not None:
        module.graph.erase_node(bias)
