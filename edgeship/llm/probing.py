"""Ask a module what it computes: feed it numbers, rebuild what it may be, and compare.

Names of classes say nothing here. Weights of full size take no memory: each is a random vector that is read from
another place for every row.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call

# Of the largest number of an answer; float32 in another order of sums.
TOLERANCE = 1e-4
# Attributes in which modules keep what they add to a mean square.
EPSILONS = ("variance_epsilon", "eps", "epsilon")
# More would be no width of a norm.
MOST_WIDTH = 1 << 20
# Squares of these are far below any epsilon, and far above all of them: both ends show.
SCALES = (1e-6, 1e-2, 1.0, 30.0)


def random_tensor(shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Numbers of about one for each row's length: different rows, without memory for them."""
    shape = tuple(shape)
    generator = torch.Generator().manual_seed(seed + sum(shape))
    if len(shape) < 2:
        return 1 + 0.2 * torch.randn(shape, generator=generator)
    # Each row begins two numbers later than the row before, or a square would be its own transpose.
    strides = tuple(range(len(shape), 0, -1))
    values = torch.randn(held_numbers(shape), generator=generator)
    return torch.as_strided(values, shape, strides)


def held_numbers(shape: Sequence[int]) -> int:
    """How many numbers `random_tensor` reads from."""
    return 1 + sum((size - 1) * (len(shape) - axis) for axis, size in enumerate(shape))


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two answers are the same but for the order of sums. Any shape."""
    if found.shape != wanted.shape or not torch.isfinite(wanted).all():
        return False
    return float((found - wanted).abs().max()) <= tolerance * max(float(wanted.abs().max()), 1e-30)


def answers_alike(
    module: nn.Module, values: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], wanted: torch.Tensor
) -> bool:
    """Whether a module with these parameters answers ``wanted``. One that cannot run on the inputs does not."""
    try:
        with torch.no_grad():
            found = functional_call(module, dict(values), tuple(inputs))
    except Exception:  # it may be anything, and raise anything
        return False
    return isinstance(found, torch.Tensor) and close(found, wanted)


@dataclass(frozen=True)
class RootNorm:
    """``x / sqrt(mean(x^2) + epsilon) * (offset + weight)`` over the last axis.

    Args:
        epsilon: added to the mean square. offset: added to the weight. weighted: whether there is a weight; the
            factor is 1 without one.
    """

    epsilon: float
    offset: float = 0.0
    weighted: bool = True

    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """The same shape as ``x``."""
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)
        return normed if weight is None else normed * (self.offset + weight)


def root_norm_of(module: nn.Module) -> RootNorm | None:
    """What kind of root mean square norm a module is; None when it is none, or one that is not understood."""
    if list(module.children()) or type(module).forward is nn.Module.forward or not _takes_one(module):
        return None
    held = dict(module.named_parameters(recurse=False))
    if set(held) > {"weight"} or any(parameter.dim() != 1 for parameter in held.values()):
        return None
    if any(True for _ in module.buffers(recurse=False)):
        return None
    weight = held.get("weight")
    for width in _widths(module) if weight is None else [int(weight.shape[0])]:
        x = random_tensor((2, 3, width), seed=1).contiguous()
        for epsilon in _epsilons(module, width, weight is not None):
            for offset in (0.0, 1.0) if weight is not None else (0.0,):
                norm = RootNorm(epsilon, offset, weight is not None)
                if _is(module, norm, x, width):
                    return norm
    return None


def _widths(module: nn.Module) -> list[int]:
    """Widths that a norm without a weight may take: any, or the one that it says."""
    told = [value[0] for value in vars(module).values() if isinstance(value, tuple) and len(value) == 1]
    return [8, *(width for width in told if isinstance(width, int) and 0 < width < MOST_WIDTH)]


def _takes_one(module: nn.Module) -> bool:
    """Whether a module can be called with a single tensor, and with none less or more: a second may be a gate."""
    takes = inspect.signature(module.forward)
    try:
        takes.bind(None)
    except TypeError:
        return False
    try:
        takes.bind(None, None)
        return False
    except TypeError:
        pass
    return not isinstance(module, (nn.Linear, nn.Embedding))


def _epsilons(module: nn.Module, width: int, weighted: bool) -> list[float]:
    """What a module may add to the mean square: what it says, or what shows on numbers that vanish beside it."""
    found = []
    for name in EPSILONS:
        value = getattr(module, name, None)
        if isinstance(value, float | int) and not isinstance(value, bool):
            found.append(float(value))
    if found:
        return found
    tiny = torch.full((1, 1, width), 1e-9)
    values = {"weight": torch.ones(width)} if weighted else {}
    try:
        with torch.no_grad():
            answer = functional_call(module, values, (tiny,))
    except Exception:  # it may be anything, and raise anything
        return []
    if not isinstance(answer, torch.Tensor) or answer.shape != tiny.shape:
        return []
    seen = float(answer.flatten()[0])
    if seen <= 0:
        return []
    # With an offset of one the factor is two.
    return [float(f"{(1e-9 * factor / seen) ** 2:.6g}") for factor in (1.0, 2.0)]


def _is(module: nn.Module, norm: RootNorm, x: torch.Tensor, width: int) -> bool:
    values = {"weight": random_tensor((width,), seed=3)} if norm.weighted else {}
    return all(answers_alike(module, values, (x * scale,), norm(x * scale, values.get("weight"))) for scale in SCALES)


def rotation_kinds(module: nn.Module) -> list[str | None]:
    """The kinds of layers that a module of rotations knows, one None when it knows but one; empty when it is no such
    module: one without parameters that answers, for positions ``[1, T]``, cosines and sines ``[1, T, width]``."""
    takes = inspect.signature(module.forward).parameters
    if (
        list(module.children())
        or "position_ids" not in takes
        or next(module.parameters(recurse=False), None) is not None
    ):
        return []
    kinds: list[str | None] = [None]
    if "layer_type" in takes:
        kinds = list(cast("Any", getattr(module, "rope_type", None)) or [])
    return kinds if kinds and all(_rotates(module, kind) for kind in kinds) else []


def angles_of(module: nn.Module, positions: torch.Tensor, kind: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[T, width]`` at positions ``[T]``."""
    with torch.no_grad():
        cos, sin = module(torch.zeros(1), positions[None], *([] if kind is None else [kind]))
    return cos[0], sin[0]


def _rotates(module: nn.Module, kind: str | None) -> bool:
    positions = torch.tensor([0, 1, 5])
    try:
        cos, sin = angles_of(module, positions, kind)
    except Exception:  # it may be anything, and raise anything
        return False
    if not (isinstance(cos, torch.Tensor) and isinstance(sin, torch.Tensor)) or cos.is_complex():
        return False
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != 3:
        return False
    # Rotations may be scaled, all alike.
    radius = cos.square() + sin.square()
    return close(radius, radius[0, 0].expand_as(radius)) and not close(cos[1], cos[2])


def window_of(mask_function: Any, positions: int) -> tuple[bool, int | None]:
    """What a mask function lets a token see: (True, None) for all before it and itself, (True, n) for the last n of
    those, (False, None) for another pattern.

    Args:
        positions: of the longest text.
    """
    last = max(positions - 1, 1)
    keys = torch.arange(last + 1)
    seen = _row(mask_function, last, keys)
    count = int(seen.sum())
    window = None if count == last + 1 else count
    for query in sorted({0, 1, min(2, last), last // 3, last // 2, last - 1, last}):
        distance = query - keys
        wanted = (distance >= 0) & (distance < (window or last + 2))
        if not torch.equal(_row(mask_function, query, keys), wanted):
            return False, None
    return True, window


def _row(mask_function: Any, query: int, keys: torch.Tensor) -> torch.Tensor:
    answer = mask_function(0, 0, torch.tensor([[query]]), keys[None])
    return torch.broadcast_to(answer, (1, len(keys)))[0].bool()
