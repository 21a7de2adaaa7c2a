"""Complex numbers as pairs of real tensors: what each operator does with them.

Functions are traced in the place of the operator; a pair is (real part, imaginary part), of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Pair = tuple[Tensor, Tensor]


def pair(real: Tensor, imag: Tensor) -> Pair:
    """Two tensors of one shape."""
    return real, imag


def _parts(x: Any) -> tuple[Any, Any]:
    """Real and imaginary part of a pair, a real tensor or a number."""
    if isinstance(x, (tuple, list)):
        return x[0], x[1]
    return (x.real, x.imag) if isinstance(x, complex) else (x, 0)


def power(x: Pair) -> Tensor:
    """Squared magnitude, element by element."""
    return x[0] * x[0] + x[1] * x[1]


def as_real(x: Pair) -> Tensor:
    """Two of [...] -> [..., 2]."""
    import torch

    return torch.stack(x, -1)


def _times(a: Any, b: Any) -> Pair:
    (a_real, a_imag), (b_real, b_imag) = _parts(a), _parts(b)
    if isinstance(a_imag, (int, float)) and a_imag == 0:
        return a_real * b_real, a_real * b_imag
    if isinstance(b_imag, (int, float)) and b_imag == 0:
        return a_real * b_real, a_imag * b_real
    return a_real * b_real - a_imag * b_imag, a_real * b_imag + a_imag * b_real


def _over(a: Any, b: Any) -> Pair:
    if not isinstance(b, (tuple, list, complex)):
        return a[0] / b, a[1] / b
    real, imag = _parts(b)
    square = real * real + imag * imag
    top = _times(a, (real, -imag))
    return top[0] / square, top[1] / square


def _sum(sign: int) -> Callable[..., Pair]:
    def add(a: Any, b: Any, *, alpha: float = 1) -> Pair:
        import torch

        (a_real, a_imag), (b_real, b_imag) = _parts(a), _parts(b)
        factor = sign * alpha
        real = a_real + b_real * factor
        imag = a_imag + (b_imag * factor if factor != 1 else b_imag)
        # A part that only one side has takes the shape of both.
        return real, imag.expand(real.shape) if isinstance(imag, torch.Tensor) else torch.full_like(real, imag)

    return add


def _product(a: Any, b: Any) -> Pair:
    (a_real, a_imag), (b_real, b_imag) = _parts(a), _parts(b)
    if isinstance(b_imag, int):
        return a_real @ b_real, a_imag @ b_real
    if isinstance(a_imag, int):
        return a_real @ b_real, a_real @ b_imag
    return a_real @ b_real - a_imag @ b_imag, a_real @ b_imag + a_imag @ b_real


def _each(operator: Any) -> Callable[..., Pair]:
    """An operator that moves elements, or is linear, on both parts."""

    def apply(x: Any, *args: Any, **kwargs: Any) -> Pair:
        if isinstance(x, list):
            reals, imags = [item[0] for item in x], [item[1] for item in x]
            return operator(reals, *args, **kwargs), operator(imags, *args, **kwargs)
        return operator(x[0], *args, **kwargs), operator(x[1], *args, **kwargs)

    return apply


def _einsum(equation: str, items: Sequence[Any], path: Any = None) -> Pair:
    """One or two factors, of which each may be a pair."""
    import torch

    def sums(*parts: Any) -> Any:
        """Nothing where a factor has no such part."""
        none = any(isinstance(part, (int, float)) for part in parts)
        return 0 if none else torch.einsum(equation, list(parts))

    first = _parts(items[0])
    if len(items) == 1:
        return sums(first[0]), sums(first[1])
    second = _parts(items[1])
    real = sums(first[0], second[0]) - sums(first[1], second[1])
    return real, sums(first[0], second[1]) + sums(first[1], second[0])


def _whole(x: Any) -> Pair:
    """A pair, of a real tensor one with zeros."""
    import torch

    return (x[0], x[1]) if isinstance(x, (tuple, list)) else (x, torch.zeros_like(x))


def _copied(x: Pair, source: Any, non_blocking: bool = False) -> Pair:
    """``source`` in the shape of ``x``."""
    real, imag = _whole(source)
    return real.expand(x[0].shape), imag.expand(x[0].shape)


def _as_complex(x: Any, *args: Any, **kwargs: Any) -> Pair:
    """A real tensor with nothing imaginary."""
    return _whole(x)


def _both(operator: Any) -> Callable[..., Pair]:
    """An operator that puts one tensor into another, on both parts."""

    def apply(x: Any, source: Any, *args: Any, **kwargs: Any) -> Pair:
        (real, imag), (new_real, new_imag) = _whole(x), _whole(source)
        return operator(real, new_real, *args, **kwargs), operator(imag, new_imag, *args, **kwargs)

    return apply


def pair_operators() -> dict[Any, Callable[..., Any]]:
    """Operator -> what stands in its place where it reads or makes a pair."""
    import torch

    aten = torch.ops.aten
    moving: Sequence[Any] = (
        aten.permute.default, aten.transpose.int, aten.slice.Tensor, aten.select.int,
        aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.expand.default, aten.cat.default,
        aten.stack.default, aten.index_select.default, aten.narrow.default, aten.movedim.int, aten.clone.default,
        aten.contiguous.default, aten.alias.default, aten.detach.default, aten.mean.dim, aten.sum.dim_IntList,
        aten.neg.default, aten.flip.default, aten.pad.default, aten.constant_pad_nd.default, aten.flatten.using_ints,
        aten.repeat.default, aten.mT.default, aten.t.default, aten.lift_fresh_copy.default,
    )  # fmt: skip

    def reshape(x: Pair, shape: Sequence[int]) -> Pair:
        return x[0].reshape(shape), x[1].reshape(shape)

    def halves(x: Tensor) -> Pair:
        """[..., 2] -> two of [...]."""
        return x.select(-1, 0), x.select(-1, 1)

    def same(x: Pair) -> Pair:
        return x

    return {
        **{operator: _each(operator) for operator in moving},
        aten.view.default: reshape,
        aten.reshape.default: reshape,
        aten._unsafe_view.default: reshape,
        aten.view_as_complex.default: halves,
        aten.complex.default: pair,
        aten.polar.default: lambda size, angle: (size * torch.cos(angle), size * torch.sin(angle)),
        aten.view_as_real.default: as_real,
        aten._conj.default: lambda x: (x[0], -x[1]),
        aten.conj.default: lambda x: (x[0], -x[1]),
        aten.conj_physical.default: lambda x: (x[0], -x[1]),
        aten.resolve_conj.default: same,
        aten.real.default: lambda x: x[0],
        aten.imag.default: lambda x: x[1],
        aten.abs.default: lambda x: torch.sqrt(power(x)),
        aten.angle.default: lambda x: torch.atan2(x[1], x[0]),
        aten.square.default: lambda x: _times(x, x),
        aten.add.Tensor: _sum(1),
        aten.sub.Tensor: _sum(-1),
        aten.mul.Tensor: _times,
        aten.mul.Scalar: _times,
        aten.div.Tensor: _over,
        aten.matmul.default: _product,
        aten.mm.default: _product,
        aten.bmm.default: _product,
        aten.einsum.default: _einsum,
        aten.roll.default: _each(aten.roll.default),
        aten.copy.default: _copied,
        aten.slice_scatter.default: _both(aten.slice_scatter.default),
        aten.select_scatter.default: _both(aten.select_scatter.default),
        aten.to.dtype: _as_complex,
        aten._to_copy.default: _as_complex,
    }
