"""Gives every constant that the graph reads a home and a name in the imported module."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from onnx import TensorProto
from torch import nn

from edgeship.compat.torch import FakeTensor, WeakIdKeyDictionary
from edgeship.core.weights import Affine, AffineTensor, Granularity, expand_blocks
from edgeship.errors import WeightsError
from edgeship.frontends.onnx.dtypes import SUB_BYTE_BITS, integer_range


def is_real(tensor: torch.Tensor) -> bool:
    """Whether the tensor has values, and not only a shape and a dtype."""
    return not isinstance(tensor, FakeTensor)


@dataclass(frozen=True)
class Integers:
    """How a file stores a constant: integers of ``elem_type`` with these scales and zero points, in the file's form."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    elem_type: int


class ConstantStore:
    """Holds the constants of one import as parameters (weights) and buffers (everything else).

    A float constant that the file carries as an initializer, or that an operator uses as its weight, is a
    parameter. Names follow ONNX: ``base_net.0.weight`` stays ``base_net.0.weight``.
    """

    def __init__(self) -> None:
        self.root = nn.Module()
        self._names = WeakIdKeyDictionary()
        self._weights = WeakIdKeyDictionary()
        self._initializers = WeakIdKeyDictionary()
        self._placed = WeakIdKeyDictionary()
        self._derived = WeakIdKeyDictionary()
        self._integers = WeakIdKeyDictionary()
        #: Path in the module -> the weight as the file stores it.
        self.encoded: dict[str, AffineTensor] = {}
        self._taken: set[str] = set()
        self._folders: set[str] = set()

    def name(self, tensor: torch.Tensor, name: str, *, initializer: bool = False) -> None:
        """Remember what ONNX calls ``tensor``; the first name stays."""
        if tensor not in self._names:
            self._names[tensor] = name
        if initializer:
            self._initializers[tensor] = True

    def remember(self, tensor: torch.Tensor, integers: Integers) -> None:
        """Say how the file stores ``tensor``."""
        self._integers[tensor] = integers

    def inherit(self, tensor: torch.Tensor, source: torch.Tensor) -> None:
        """Let ``tensor``, another layout of ``source``, go by the same name."""
        if source in self._integers and tensor is not source and tensor not in self._integers:
            self._integers[tensor] = self._integers[source]
        if source in self._names and tensor is not source:
            self._names[tensor] = self._names[source]
            if source in self._initializers:
                self._initializers[tensor] = True

    def derive(self, source: torch.Tensor, how: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``make(source)`` as a weight that goes by the name of ``source``; made once for each ``how``.

        ``make`` may change the shape: [in, out] -> [out, in].
        """
        if not is_real(source):
            return make(source)
        if source not in self._derived:
            self._derived[source] = {}
        made: dict[str, torch.Tensor] = self._derived[source]
        if how not in made:
            result = make(source)
            if result is source:
                result = source.view_as(source)
            self.inherit(result, source)
            self.mark_weight(result)
            made[how] = result
        return made[how]

    def name_of(self, tensor: torch.Tensor) -> str:
        """What ONNX calls ``tensor``; ``"constant"`` where it has no name."""
        return str(self._names[tensor]) if tensor in self._names else "constant"

    def mark_weight(self, tensor: torch.Tensor) -> None:
        """Say that an operator uses ``tensor`` as its weight."""
        self._weights[tensor] = True

    def place(self, tensor: torch.Tensor) -> str:
        """Put ``tensor`` into the module, once, and return its path there.

        Raises:
            WeightsError: a weight is NaN or infinite, or another initializer is NaN.
        """
        if tensor not in self._placed:
            self._check_finite(tensor)
            path = self._free_path(self.name_of(tensor))
            held = tensor.detach().contiguous()
            self._register(path, held, parameter=self._is_parameter(tensor))
            if tensor in self._integers and self._is_parameter(tensor):
                found = integers_again(held, self._integers[tensor])
                if found is not None:
                    self.encoded[path] = found
            self._placed[tensor] = path
        return str(self._placed[tensor])

    def _is_parameter(self, tensor: torch.Tensor) -> bool:
        known = tensor in self._weights or (tensor in self._initializers and tensor.dim() > 0)
        # A mask of infinities is not a weight: it stays a constant, which is allowed them.
        return known and tensor.is_floating_point() and not bool(torch.isinf(tensor).any())

    def _check_finite(self, tensor: torch.Tensor) -> None:
        named = tensor in self._initializers or tensor in self._weights
        if not named or not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype.itemsize < 2:
            return
        low, high = torch.aminmax(tensor)
        # An infinite mask is a legal constant; an infinite weight is damage.
        damaged = bool(low.isnan()) or (tensor in self._weights and bool(low.isinf() | high.isinf()))
        if damaged:
            kind = "NaN" if bool(low.isnan()) else "infinite"
            raise WeightsError(
                f'weight "{self.name_of(tensor)}" has {kind} values',
                fix="export the model again from a checkpoint with finite weights",
            )

    def _free_path(self, name: str) -> str:
        parts = [_component(part) for part in name.split(".") if part] or ["constant"]
        path = ".".join(parts)
        if any(above in self._taken for above in _above(path)):
            # A parent of this name is a tensor: no number at the end would make room.
            path = path.replace(".", "_")
        base, count = path, 0
        while path in self._taken or path in self._folders:
            count += 1
            path = f"{base}_{count}"
        self._taken.add(path)
        self._folders.update(_above(path))
        return path

    def _register(self, path: str, tensor: torch.Tensor, *, parameter: bool) -> None:
        *folders, leaf = path.split(".")
        home = self.root
        for folder in folders:
            if not isinstance(getattr(home, folder, None), nn.Module):
                home.add_module(folder, nn.Module())
            home = home.get_submodule(folder)
        if parameter:
            home.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            home.register_buffer(leaf, tensor)


def integers_again(weight: torch.Tensor, stored: Integers) -> AffineTensor | None:
    """The integers of a weight in the layout that it has now: transposed, reshaped or a part of what the file holds.

    None where no layout of the file's scales gives the weight to the last bit, or the integers have another width.

    ``weight``: any shape.
    """
    bits = {**SUB_BYTE_BITS, TensorProto.INT8: 8, TensorProto.UINT8: 8}.get(stored.elem_type)
    if bits is None or weight.numel() == 0:
        return None
    low, high = integer_range(stored.elem_type)
    for scale, zero in _layouts(tuple(weight.shape), stored):
        whole_scale = expand_blocks(scale, tuple(weight.shape))
        whole_zero = expand_blocks(zero, tuple(weight.shape))
        values = np.rint(weight.numpy().astype(np.float64) / whole_scale) + whole_zero
        same = ((values - whole_zero).astype(np.float32) * whole_scale.astype(np.float32)) == weight.numpy()
        if not same.all() or values.min() < low or values.max() > high:
            continue
        return _as_affine(values.astype(np.int16), scale, zero, bits, signed=low < 0)
    return None


def _layouts(shape: tuple[int, ...], stored: Integers) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scales and zero points in every arrangement that could tile a weight of ``shape``."""
    scale = stored.scale.detach().to(torch.float32).numpy()
    zero = np.broadcast_to(stored.zero_point.numpy().astype(np.int16), scale.shape)
    if scale.ndim > len(shape):
        # A part for each direction of a recurrent layer.
        for place in range(len(scale)):
            yield from _layouts(shape, Integers(stored.scale[place], stored.zero_point[place], stored.elem_type))
        return
    if scale.size == 1:
        yield scale.reshape([1] * len(shape)), zero.reshape([1] * len(shape))
        return
    if scale.ndim == 1:
        for axis, size in enumerate(shape):
            if size == scale.size:
                view = [1] * len(shape)
                view[axis] = size
                yield scale.reshape(view), zero.reshape(view)
        return
    for turned in ((scale, zero), (scale.T, zero.T)):
        if turned[0].ndim == len(shape) and not any(n % s for n, s in zip(shape, turned[0].shape, strict=True)):
            yield turned


def _as_affine(values: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int, *, signed: bool) -> AffineTensor:
    """In the forms of `edgeship.core.weights`: the narrow range around 0, or unsigned with zero points."""
    # Scales along each axis: one, as many as numbers (a channel each), or one for each group of numbers.
    reach: Granularity = "tensor"
    size = None
    for length, count in zip(values.shape, scale.shape, strict=True):
        if count == 1:
            continue
        if count != length and size is None:
            size = length // count
        reach = "group" if size else "channel"
    if signed and not zero.any() and values.min() > -(1 << (bits - 1)):
        return AffineTensor(values.astype(np.int8), scale, None, Affine(bits, True, reach, size))
    # Signed integers are moved up by half their range: the same grid, unsigned.
    offset = 1 << (bits - 1) if signed else 0
    unsigned = (values + offset).astype(np.uint8)
    return AffineTensor(unsigned, scale, (zero + offset).astype(np.uint8), Affine(bits, False, reach, size))


def _above(path: str) -> list[str]:
    """The submodules on the way to ``path``."""
    return [path[:end] for end in range(len(path)) if path[end] == "."]


def _component(part: str) -> str:
    """One part of a dotted name as an attribute name that shadows nothing of nn.Module."""
    clean = re.sub(r"[^0-9A-Za-z_]", "_", part)
    # The code that torch.fx writes has `self.<part>`: a number is fine to it, a keyword is not.
    if keyword.iskeyword(clean) or hasattr(torch.fx.GraphModule, clean) or hasattr(nn.Module(), clean):
        return f"{clean}_"
    return clean
