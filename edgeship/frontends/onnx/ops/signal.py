"""Fourier transforms, as products with constant cosine tables: no phone runtime has complex numbers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.registry import op
from edgeship.frontends.onnx.values import is_constant

Tensor = torch.Tensor


@op("DFT", since=17)
def dft(call: OpCall) -> Tensor:
    """The last axis holds real numbers (size 1) or real and imaginary parts (size 2)."""
    x = call.x(0)
    given = -2
    if call.opset < 20:
        given = call.attr_int("axis", 1)
    elif call.given(2):
        given = call.const_int(2, "axis")
    axis = call.axis(given, x.dim())
    inverse, onesided = bool(call.attr_int("inverse", 0)), bool(call.attr_int("onesided", 0))
    length = call.const_int(1, "dft_length") if call.given(1) else x.shape[axis]
    if inverse and onesided:
        if not call.given(1):
            length = 2 * (x.shape[axis] - 1)
        x = _mirrored(x, axis, length)
    x = _fitted(x, axis, length)
    rows = length // 2 + 1 if onesided and not inverse else length
    cosine, sine = _tables(rows, length, x.dtype, inverse=inverse)
    moved = torch.movedim(x, axis, -1)
    real = torch.select(moved, -2, 0)
    if moved.shape[-2] == 1:
        parts = [F.linear(real, cosine), F.linear(real, sine)]
    else:
        imaginary = torch.select(moved, -2, 1)
        parts = [
            torch.sub(F.linear(real, cosine), F.linear(imaginary, sine)),
            torch.add(F.linear(real, sine), F.linear(imaginary, cosine)),
        ]
    if inverse and onesided:
        parts = parts[:1]
    return torch.movedim(torch.stack(parts, -2), -1, axis)


@op("STFT")
def stft(call: OpCall) -> Tensor:
    """Frames, windowed, times the tables of the transform. [N, samples] -> [N, frames, frequencies, 2]."""
    signal, step = call.x(0), call.const_int(1, "frame_step")
    window = call.optional(2)
    length = 0 if window is None else window.shape[0]
    if call.given(3):
        length = call.const_int(3, "frame_length")
    if step < 1 or not 0 < length <= signal.shape[1]:
        raise call.broken(f"frames of {length} every {step} in a signal of {signal.shape[1]}")
    if signal.dim() == 3 and signal.shape[2] == 2:
        raise call.refuse("complex signals are not imported")
    real = torch.reshape(signal, tuple(signal.shape[:2]))
    count = (signal.shape[1] - length) // step + 1
    places = torch.arange(count).reshape(-1, 1) * step + torch.arange(length).reshape(1, -1)
    frames = torch.index_select(real, 1, places.reshape(-1))
    frames = torch.reshape(frames, (signal.shape[0], count, length))
    rows = length // 2 + 1 if call.attr_int("onesided", 1) else length
    cosine, sine = _tables(rows, length, signal.dtype, inverse=False)
    if window is not None and is_constant(window):
        cosine, sine = cosine * window, sine * window
    elif window is not None:
        frames = torch.mul(frames, window)
    return torch.stack([F.linear(frames, cosine), F.linear(frames, sine)], -1)


def _tables(rows: int, length: int, dtype: torch.dtype, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the transform, [rows, length]; an inverse one has its 1/length in it."""
    steps = torch.arange(rows).reshape(-1, 1) * torch.arange(length).reshape(1, -1) % length
    phase = steps.to(torch.float64) * (2 * math.pi / length)
    sign, factor = (1.0, 1.0 / length) if inverse else (-1.0, 1.0)
    return (torch.cos(phase) * factor).to(dtype), (torch.sin(phase) * sign * factor).to(dtype)


def _fitted(x: Tensor, axis: int, length: int) -> Tensor:
    """Cut or filled with zeros to ``length``. Along ``axis``."""
    if x.shape[axis] >= length:
        return x if x.shape[axis] == length else torch.narrow(x, axis, 0, length)
    return F.pad(x, [0, 0] * (x.dim() - 1 - axis) + [0, length - x.shape[axis]])


def _mirrored(x: Tensor, axis: int, length: int) -> Tensor:
    """The missing half of a one-sided spectrum: complex conjugates in reverse.

    [..., length / 2 + 1, ..., 2] -> [..., length, ..., 2] along ``axis``.
    """
    half = _fitted(x, axis, length // 2 + 1)
    rest = torch.flip(torch.narrow(half, axis, 1, length - half.shape[axis]), [axis])
    return torch.cat([half, torch.mul(rest, torch.tensor([1.0, -1.0], dtype=x.dtype))], axis)
