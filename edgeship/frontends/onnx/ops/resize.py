"""Resize and Upsample.

Each axis is resized on its own: output = table @ input, with a table of weights known at import. Where torch's
own interpolation has exactly that table it is used; otherwise the table itself becomes a small matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.registry import op

Tensor = torch.Tensor

_TORCH_MODE = {
    "nearest": {3: "nearest", 4: "nearest", 5: "nearest"},
    "linear": {3: "linear", 4: "bilinear", 5: "trilinear"},
    "cubic": {4: "bicubic"},
}


@dataclass(frozen=True)
class Rule:
    """How an output position reads the input; names as in the ONNX specification."""

    mode: str
    coordinates: str
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation: float = 0.0


@dataclass(frozen=True)
class Axis:
    """One resized axis: ``source`` gives, for each output position, a place in the input."""

    size: int
    output: int
    scale: float
    source: np.ndarray


@op("Upsample")
def upsample_attributes(call: OpCall) -> Tensor:
    """Before opset 9 the scales are attributes. [N, C, H, W] -> [N, C, H * scale, W * scale]."""
    if call.opset < 7:
        height, width = call.attr_float("height_scale"), call.attr_float("width_scale")
        return _scaled(call, [1.0, 1.0, height, width], _upsample_rule(call))
    return _scaled(call, call.attr_floats("scales"), _upsample_rule(call))


@op("Upsample", since=9)
def upsample(call: OpCall) -> Tensor:
    """Resize by scales, the first rules. Any rank; each axis by its scale."""
    return _scaled(call, _const_floats(call, 1), _upsample_rule(call))


@op("Resize", since=10)
def resize_scales(call: OpCall) -> Tensor:
    """Opset 10 knows the first rules only. Any rank; each axis by its scale."""
    return _scaled(call, _const_floats(call, 1), _upsample_rule(call))


def _upsample_rule(call: OpCall) -> Rule:
    mode = call.attr_text("mode", "nearest")
    mode = "linear" if mode in ("bilinear", "trilinear") else mode
    return Rule(mode, "asymmetric", "floor")


@op("Resize", since=11)
def resize(call: OpCall) -> Tensor:
    """By scales or to sizes, with every rule of opset 11 to 19. Any rank; each axis by its scale, or to its size."""
    x = call.x(0)
    rule = Rule(
        call.attr_text("mode", "nearest"),
        call.attr_text("coordinate_transformation_mode", "half_pixel"),
        call.attr_text("nearest_mode", "round_prefer_floor"),
        call.attr_float("cubic_coeff_a", -0.75),
        bool(call.attr_int("exclude_outside", 0)),
        bool(call.attr_int("antialias", 0)),
        call.attr_float("extrapolation_value", 0.0),
    )
    axes = [call.axis(axis, x.dim()) for axis in call.attr_ints("axes", tuple(range(x.dim())))]
    roi = [(0.0, 1.0)] * x.dim()
    if rule.coordinates == "tf_crop_and_resize":
        values = _const_floats(call, 1)
        for place, axis in enumerate(axes):
            roi[axis] = (values[place], values[place + len(axes)])
    if call.given(3) and call.x(3).numel():
        sizes, scales = _from_sizes(call, x, axes)
    else:
        scales, sizes = [1.0] * x.dim(), list(x.shape)
        for axis, scale in zip(axes, _const_floats(call, 2), strict=True):
            start, end = roi[axis]
            scales[axis] = scale
            sizes[axis] = math.floor(x.shape[axis] * (end - start) * scale)
    return _resize(call, x, sizes, scales, rule, roi)


def _from_sizes(call: OpCall, x: Tensor, axes: Sequence[int]) -> tuple[list[int], list[float]]:
    """The sizes and scales of all axes of ``x``, from the ``sizes`` given for ``axes``."""
    sizes, scales = list(x.shape), [1.0] * x.dim()
    wanted = call.const_ints(3, "sizes")
    policy = call.attr_text("keep_aspect_ratio_policy", "stretch")
    ratios = [size / x.shape[axis] for axis, size in zip(axes, wanted, strict=True)]
    common = min(ratios) if policy == "not_larger" else max(ratios)
    for axis, size, ratio in zip(axes, wanted, ratios, strict=True):
        scales[axis] = ratio if policy == "stretch" else common
        sizes[axis] = size if policy == "stretch" else math.floor(common * x.shape[axis] + 0.5)
    return sizes, scales


def _scaled(call: OpCall, scales: list[float], rule: Rule) -> Tensor:
    """Each axis of input 0 by its scale, rounded down."""
    x = call.x(0)
    if len(scales) != x.dim():
        raise call.broken(f"{len(scales)} scales for {x.dim()} axes")
    sizes = [math.floor(size * scale) for size, scale in zip(x.shape, scales, strict=True)]
    return _resize(call, x, sizes, scales, rule, [(0.0, 1.0)] * x.dim())


def _resize(
    call: OpCall,
    x: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    rule: Rule,
    roi: Sequence[tuple[float, float]],
) -> Tensor:
    """Each axis of ``x`` to its size, one axis after the other."""
    call.check_size(sizes)
    if rule.mode not in _TORCH_MODE or any(not 0 < scale < float("inf") for scale in scales) or 0 in x.shape:
        raise call.broken(f'mode "{rule.mode}" with scales {list(scales)}')
    crops = rule.coordinates == "tf_crop_and_resize"
    work = [
        axis
        for axis, size in enumerate(x.shape)
        if sizes[axis] != size or scales[axis] != 1.0 or (crops and roi[axis] != (0.0, 1.0))
    ]
    if not work:
        return x
    plans = {axis: _plan(x.shape[axis], sizes[axis], scales[axis], rule, roi[axis]) for axis in work}
    tables = {axis: _table(plan, rule) for axis, plan in plans.items()}
    wide = x if x.is_floating_point() else x.to(torch.float32)
    result = _by_torch(wide, sizes, tables, rule)
    if result is None:
        result = wide
        for axis in work:
            result = _apply(result, axis, tables[axis], nearest=rule.mode == "nearest")
    if crops:
        result = _extrapolated(result, plans, rule)
    return result if x.is_floating_point() else torch.round(result).to(x.dtype)


def _plan(size: int, output: int, scale: float, rule: Rule, roi: tuple[float, float]) -> Axis:
    """Place in the input that each output position reads, by the formulas of the specification."""
    place = np.arange(output, dtype=np.float64)
    scaled = size * scale
    if rule.coordinates == "align_corners":
        source = place * (size - 1) / (scaled - 1) if scaled > 1 else np.zeros_like(place)
    elif rule.coordinates == "asymmetric":
        source = place / scale
    elif rule.coordinates == "pytorch_half_pixel":
        source = (place + 0.5) / scale - 0.5 if output > 1 else np.zeros_like(place)
    elif rule.coordinates == "tf_half_pixel_for_nn":
        source = (place + 0.5) / scale
    elif rule.coordinates == "half_pixel_symmetric":
        offset = size / 2 * (1 - output / scaled)
        source = offset + (place + 0.5) / scale - 0.5
    elif rule.coordinates == "tf_crop_and_resize":
        start, end = roi
        if output > 1:
            source = start * (size - 1) + place * (end - start) * (size - 1) / (output - 1)
        else:
            source = np.full_like(place, 0.5 * (start + end) * (size - 1))
    else:
        source = (place + 0.5) / scale - 0.5
    return Axis(size, output, scale, source)


def _table(axis: Axis, rule: Rule) -> np.ndarray:
    """Weights [output, input] of one axis."""
    table: np.ndarray = np.zeros((axis.output, axis.size))
    rows = np.arange(axis.output)
    if rule.mode == "nearest":
        table[rows, np.clip(_round(axis.source, rule.nearest), 0, axis.size - 1)] = 1.0
        return table
    stretch = min(axis.scale, 1.0) if rule.antialias else 1.0
    reach = (1 if rule.mode == "linear" else 2) / stretch
    base = np.floor(axis.source)
    taps = np.arange(-math.ceil(reach) + 1, math.ceil(reach) + 1)
    for tap in taps:
        place = base + tap
        distance = (place - axis.source) * stretch
        weight = np.maximum(1 - np.abs(distance), 0) if rule.mode == "linear" else _cubic(distance, rule.cubic)
        inside = (place >= 0) & (place < axis.size)
        if rule.exclude_outside:
            weight = np.where(inside, weight, 0.0)
        np.add.at(table, (rows, np.clip(place, 0, axis.size - 1).astype(np.int64)), weight)
    if rule.exclude_outside or rule.antialias:
        total = table.sum(axis=1, keepdims=True)
        table /= np.where(total == 0, 1.0, total)
    return table


def _round(source: np.ndarray, mode: str) -> np.ndarray:
    """Positions of any shape to whole ones."""
    if mode == "floor":
        rounded = np.floor(source)
    elif mode == "ceil":
        rounded = np.ceil(source)
    elif mode == "round_prefer_ceil":
        rounded = np.floor(source + 0.5)
    else:
        rounded = np.ceil(source - 0.5)
    places: np.ndarray = rounded.astype(np.int64)
    return places


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel, https://doi.org/10.1109/TASSP.1981.1163711. Any shape."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    result: np.ndarray = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    return result


def _by_torch(x: Tensor, sizes: Sequence[int], tables: dict[int, np.ndarray], rule: Rule) -> Tensor | None:
    """The interpolation of torch, where its tables are exactly ours; None where they are not.

    ``x`` [N, C, ...space]; ``tables`` by axis.
    """
    mode = _TORCH_MODE[rule.mode].get(x.dim())
    if mode is None or 0 in tables or 1 in tables or rule.antialias:
        return None
    size = tuple(sizes[2:])
    if rule.mode == "nearest":
        # By whole factors only: converters disagree with torch, and with each other, about the rest.
        whole = all(after % before == 0 for before, after in zip(x.shape[2:], size, strict=True))
        plain = whole and _same(x, sizes, tables, Rule("nearest", "asymmetric", "floor"))
        return F.interpolate(x, size=size, mode="nearest") if plain else None
    for align, coordinates in ((False, "half_pixel"), (True, "align_corners")):
        if _same(x, sizes, tables, Rule(rule.mode, coordinates)):
            return F.interpolate(x, size=size, mode=mode, align_corners=align)
    return None


def _same(x: Tensor, sizes: Sequence[int], tables: dict[int, np.ndarray], rule: Rule) -> bool:
    """Whether torch's own tables are ``tables``, which are [output, input] by axis."""
    for axis, table in tables.items():
        size, output = x.shape[axis], sizes[axis]
        theirs = _table(_plan(size, output, output / size, rule, (0.0, 1.0)), rule)
        if not np.allclose(theirs, table, rtol=0, atol=1e-6):
            return False
    return True


def _apply(x: Tensor, axis: int, table: np.ndarray, *, nearest: bool) -> Tensor:
    """Multiply one axis of ``x`` by ``table`` [output, input]."""
    if nearest:
        return torch.index_select(x, axis, torch.from_numpy(table.argmax(axis=1)))
    weights = torch.from_numpy(table).to(x.dtype)
    return torch.movedim(F.linear(torch.movedim(x, axis, -1), weights), -1, axis)


def _extrapolated(x: Tensor, plans: dict[int, Axis], rule: Rule) -> Tensor:
    """Positions outside of the picture get one fixed value. The shape of ``x`` after it was resized."""
    inside = torch.ones((1,) * x.dim(), dtype=torch.bool)
    for axis, plan in plans.items():
        view = [1] * x.dim()
        view[axis] = plan.output
        within = (plan.source >= 0) & (plan.source <= plan.size - 1)
        inside = inside & torch.from_numpy(within).reshape(view)
    if bool(inside.all()):
        return x
    return torch.where(inside, x, torch.tensor(rule.extrapolation, dtype=x.dtype))


def _const_floats(call: OpCall, index: int) -> list[float]:
    return [float(value) for value in call.const(index).reshape(-1).tolist()]
