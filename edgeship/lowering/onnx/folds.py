"""Clips and pads that operators beside them do for nothing, left out of the graph with the same numbers.

ONNX Runtime drops a clip between equal grids itself where the grid's ends lie within it, but keeps what stands behind
it, and every pad between grids: EfficientNet-Lite0 takes four times as long with its 33 clips and 17 pads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeship.lowering.onnx.edit import number, quantizer

if TYPE_CHECKING:
    import onnx_ir as ir


def drop_idle_clips(model: ir.Model) -> None:
    """``pair -> Relu or Clip -> pair`` becomes the first pair, in place, where both have one grid, and its ends lie
    within the clip: it changes no integer then."""
    for clip in [node for node in model.graph if node.op_type in ("Relu", "Clip")]:
        before, after = quantizer(clip.inputs[0]), _sole_pair(clip.outputs[0])
        if before is None or after is None or after.outputs[0].is_graph_output():
            continue
        if _same_grid(before, after) and _within(before, clip):
            after.outputs[0].replace_all_uses_with(before.outputs[0])


def fold_pads(model: ir.Model) -> None:
    """Zeros around a convolution's input become its own ``pads``, in place; between static pairs, where both are on one
    grid, zero is an integer of that grid."""
    from onnx_ir.passes import common

    for layer in [node for node in model.graph if node.op_type == "Conv"]:
        while _fold_pad(layer):
            pass
    common.RemoveUnusedNodesPass()(model)


def _fold_pad(layer: ir.Node) -> bool:
    import onnx_ir as ir

    given = layer.inputs[0]
    restore = quantizer(given)
    padded = given if restore is None else _quantized(restore)
    pad = None if padded is None else padded.producer()
    axes = len(layer.inputs[1].shape or ()) - 2 if layer.inputs[1] is not None else 0
    ends = _zeros_around(pad, axes)
    if pad is None or ends is None or pad.inputs[0] is None or _automatic(layer):
        return False
    inner = quantizer(pad.inputs[0])
    if restore is not None and (inner is None or not _same_grid(inner, restore)):
        return False
    own = layer.attributes.get("pads")
    held = [0] * 2 * axes if own is None else list(own.as_ints())
    layer.attributes["pads"] = ir.AttrInt64s("pads", [one + more for one, more in zip(held, ends, strict=True)])
    layer.replace_input_with(0, pad.inputs[0])
    return True


def _automatic(layer: ir.Node) -> bool:
    """Whether the convolution's own padding is a rule rather than numbers."""
    rule = layer.attributes.get("auto_pad")
    return rule is not None and rule.as_string() != "NOTSET"


def _zeros_around(pad: ir.Node | None, axes: int) -> list[int] | None:
    """Starts, then ends, of the last ``axes`` axes that a Pad puts zeros around; None when it does something else."""
    if pad is None or pad.op_type != "Pad" or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return None
    mode = pad.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return None
    filling = pad.inputs[2] if len(pad.inputs) > 2 else None
    if (filling is not None and not _is_zero(filling)) or not _is_constant(pad.inputs[1]):
        return None
    widths = [int(width) for width in number(pad.inputs[1])]
    rank = len(widths) // 2
    outer = [*widths[: rank - axes], *widths[rank : 2 * rank - axes]]
    if any(outer) or min(widths) < 0:
        return None
    return [*widths[rank - axes : rank], *widths[2 * rank - axes :]]


def _is_constant(value: ir.Value | None) -> bool:
    import onnx_ir as ir

    return value is not None and ir.convenience.get_const_tensor(value) is not None


def _is_zero(value: ir.Value) -> bool:
    return _is_constant(value) and not number(value).any()


def _sole_pair(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear of the pair that alone reads a value."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "QuantizeLinear":
        return None
    restores = [use.node for use in uses[0].node.outputs[0].uses()]
    alone = len(restores) == 1 and restores[0].op_type == "DequantizeLinear"
    return restores[0] if alone else None


def _quantized(restore: ir.Node) -> ir.Value | None:
    """The float value that a pair, given by its DequantizeLinear, rounds."""
    integers = restore.inputs[0]
    quantize = None if integers is None else integers.producer()
    return quantize.inputs[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else None


def _same_grid(one: ir.Node, other: ir.Node) -> bool:
    """Whether two pairs, given by their DequantizeLinear, have one scale and zero point."""
    for mine, theirs in zip(one.inputs[1:3], other.inputs[1:3], strict=True):
        a, b = number(mine), number(theirs)
        if a.dtype != b.dtype or a.shape != b.shape or (a != b).any():
            return False
    return True


def _within(restore: ir.Node, clip: ir.Node) -> bool:
    """Whether every number of a pair's grid passes a clip unchanged."""
    import numpy as np

    scale, zero = (number(value) for value in restore.inputs[1:3])
    if scale.size != 1:
        return False
    limits = np.iinfo(zero.dtype)
    ends = [np.float32(scale.reshape(())) * np.float32(limit - int(zero)) for limit in (limits.min, limits.max)]
    low, high = _clip_bounds(clip)
    return bool(low <= ends[0] and ends[1] <= high)


def _clip_bounds(clip: ir.Node) -> tuple[float, float]:
    """What passes a Relu or Clip; nothing (``inf, -inf``) where a bound is not a constant."""
    if clip.op_type == "Relu":
        return 0.0, math.inf
    bounds = [-math.inf, math.inf]
    for place, bound in enumerate(clip.inputs[1:3]):
        if bound is None:
            continue
        if not _is_constant(bound):
            return math.inf, -math.inf
        bounds[place] = float(number(bound).reshape(()))
    return bounds[0], bounds[1]
