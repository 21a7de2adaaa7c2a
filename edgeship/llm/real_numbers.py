"""While a model runs: complex numbers as pairs of real ones, and functions that engines lack in those that they have.

No engine of a phone has complex tensors. Rotations of positions are sometimes written as products of complex numbers.
Inside `RealNumbers` the few functions that make such numbers answer a `Pair` instead, and those that take one apart
read it. Steps that a model computes in bfloat16 whatever its weights are become float32 that is rounded: `Short`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from edgeship.errors import UnsupportedOpError


@dataclass(frozen=True)
class Pair:
    """Complex numbers: their real and imaginary parts, two tensors of one shape."""

    real: torch.Tensor
    imag: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the complex tensor."""
        return self.real.shape

    @property
    def device(self) -> torch.device:
        """Where the parts lie."""
        return self.real.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.view_as_real:
            raise TypeError(f"complex numbers have no {func.__name__} here")
        return torch.stack([args[0].real, args[0].imag], dim=-1)

    def __mul__(self, other: Any) -> Pair:
        if isinstance(other, Pair):
            real = self.real * other.real - self.imag * other.imag
            return Pair(real, self.real * other.imag + self.imag * other.real)
        return Pair(self.real * other, self.imag * other)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Pair:
        return Pair(self.real[index], self.imag[index])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method that moves numbers and changes none, of both parts."""
        if name not in MOVING:
            raise AttributeError(f"complex numbers have no {name} here")

        def move(*args: Any, **kwargs: Any) -> Pair:
            return Pair(getattr(self.real, name)(*args, **kwargs), getattr(self.imag, name)(*args, **kwargs))

        return move


MOVING = {
    "contiguous", "expand", "flatten", "permute", "repeat", "reshape", "squeeze", "to", "transpose", "unsqueeze",
    "view",
}  # fmt: skip


@dataclass(frozen=True)
class Short:
    """Numbers in bfloat16: float32 that is rounded after each step.

    Args:
        value: of any shape.
    """

    value: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.value.shape

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.value.device

    @property
    def dtype(self) -> torch.dtype:
        """What it stands for."""
        return torch.bfloat16

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            one, two = args
            return one * two if isinstance(one, Short) else two * one
        raise _refused()

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Short):
            return Short(rounded(self.value * other.value))
        if not isinstance(other, torch.Tensor):
            return Short(rounded(self.value * other))
        # torch takes the wider of two types of floats, and floats before integers.
        return self.value * other if other.is_floating_point() else self * shortened(other)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Short:
        return Short(self.value[index])

    def to(self, *wanted: Any, **named: Any) -> Any:
        """Itself, or as a tensor of another type."""
        dtypes = [kind for kind in (*wanted, *named.values()) if isinstance(kind, torch.dtype)]
        return self if dtypes in ([], [torch.bfloat16]) else self.value.to(dtypes[0])

    type = to

    def float(self) -> torch.Tensor:
        """As a tensor of float32."""
        return self.value

    def __getattr__(self, name: str) -> Callable[..., Short]:
        """A method that moves numbers and changes none."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in MOVING:
            raise _refused()

        def move(*args: Any, **kwargs: Any) -> Short:
            return Short(getattr(self.value, name)(*args, **kwargs))

        return move


def shortened(x: torch.Tensor) -> Short:
    """Numbers of any type and shape in bfloat16."""
    return Short(rounded(x.float()))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of bfloat16's eight bits, the even ones between two. The same shape.

    T. J. Dekker, "A floating-point technique for extending the available precision" (1971): what this adds to a number
    pushes its lower sixteen bits out.
    """
    pushed = x * (2.0**16 + 1)
    return pushed - (pushed - x)


def _refused() -> UnsupportedOpError:
    return UnsupportedOpError(
        "the model computes a step in bfloat16 whatever its weights are, which engines here lack",
        fix="leave out language models of this kind, or report it",
    )


PRODUCTS = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
CASTS = (torch.Tensor.to, torch.Tensor.type)


class RealNumbers(TorchFunctionMode):
    """No complex tensor is made inside, and none in bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.view_as_complex:
            return Pair(args[0][..., 0], args[0][..., 1])
        if func is torch.polar:
            return Pair(args[0] * args[1].cos(), args[0] * args[1].sin())
        if func in INVERSE_ERROR:
            return inverse_error(args[0])
        told = func in CASTS and any(kind is torch.bfloat16 for kind in (*args[1:], *kwargs.values()))
        if told or func is torch.Tensor.bfloat16:
            return shortened(args[0])
        answer = func(*args, **kwargs)
        if isinstance(answer, torch.Tensor) and answer.dtype is torch.bfloat16:
            raise _refused()
        return answer


INVERSE_ERROR = (torch.erfinv, torch.special.erfinv, torch.Tensor.erfinv)
# M. Giles, "Approximating the erfinv function" (2010), single precision: highest powers first, of -log(1 - x^2) - 2.5,
# and of its root less 3 in the tails.
MIDDLE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip
TAILS = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip


def inverse_error(x: torch.Tensor) -> torch.Tensor:
    """The inverse of the error function, of the same shape, to float32's last digits."""
    far = -torch.log((1 - x) * (1 + x))
    return x * torch.where(far < 5, _polynomial(MIDDLE, far - 2.5), _polynomial(TAILS, torch.sqrt(far) - 3))


def _polynomial(powers: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    found = torch.full_like(x, powers[0])
    for power in powers[1:]:
        found = found * x + power
    return found
