"""Fourier transforms of several axes, and those of other names, as transforms of one axis that `spectra` writes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import Graph, Node

# What a transform there is with the scale of the way back.
OTHER_WAY = {None: "forward", "backward": "forward", "forward": "backward", "ortho": "ortho"}


def one_axis_at_a_time(graph: Graph) -> int:
    """Rewrite such transforms in place. Returns how many there were."""
    import torch

    from edgeship.compat.torch import schema_of

    aten = torch.ops.aten
    rfft, irfft = aten.fft_rfft.default, aten.fft_irfft.default
    fft, ifft = aten.fft_fft.default, aten.fft_ifft.default
    table: dict[Any, Callable[..., Node]] = {
        aten.fft_fft2.default: _axes(fft, fft, default=(-2, -1)),
        aten.fft_fftn.default: _axes(fft, fft),
        aten.fft_ifft2.default: _axes(ifft, ifft, default=(-2, -1)),
        aten.fft_ifftn.default: _axes(ifft, ifft),
        aten.fft_rfft2.default: _axes(rfft, fft, default=(-2, -1)),
        aten.fft_rfftn.default: _axes(rfft, fft),
        aten.fft_irfft2.default: _axes(irfft, ifft, last_first=False, default=(-2, -1)),
        aten.fft_irfftn.default: _axes(irfft, ifft, last_first=False),
        aten.fft_hfft.default: _hermitian,
        aten.fft_ihfft.default: _from_hermitian,
        aten.fft_fftshift.default: _shifted(1),
        aten.fft_ifftshift.default: _shifted(-1),
    }
    changed = 0
    for node in list(graph.nodes):
        rewrite = table.get(node.target) if node.op == "call_function" else None
        if rewrite is None:
            continue
        schema = schema_of(node.target)
        assert schema is not None, "operators have schemas, functions are not in the table"
        names = [argument.name for argument in schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        with graph.inserting_before(node):
            found = rewrite(graph, **given)
        node.replace_all_uses_with(found)
        graph.erase_node(node)
        changed += 1
    return changed


def _call(graph: Graph, operator: Any, *args: Any) -> Node:
    """A new operator, with the shape and dtype of what it computes."""
    import torch

    node: Node = graph.call_function(operator, args)
    node.meta["val"] = operator(*(arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in args))
    return node


def _axes(
    last: Any, others: Any, *, last_first: bool = True, default: tuple[int, ...] | None = None
) -> Callable[..., Node]:
    """``last`` of the last axis that is named, ``others`` of the others.

    Args:
        last_first: or last of all. default: axes where none are named; all, or as many as sizes are given, when None.
    """

    def rewrite(graph: Graph, self: Node, s: Any = None, dim: Any = None, norm: str | None = None) -> Node:
        count = self.meta["val"].dim() if s is None else len(s)
        axes = list(dim or default or range(-count, 0))
        given = s or [-1] * len(axes)
        # -1 leaves an axis as long as it is.
        sizes = [None if size == -1 else size for size in given]
        steps = [(others, size, axis) for size, axis in zip(sizes, axes, strict=True)]
        steps[-1] = (last, *steps[-1][1:])
        found = self
        for operator, size, axis in reversed(steps) if last_first else steps:
            found = _call(graph, operator, found, size, axis, norm)
        return found

    return rewrite


def _hermitian(graph: Graph, self: Node, n: int | None = None, dim: int = -1, norm: str | None = None) -> Node:
    """``hfft``: of a signal that is symmetric about its first, to real frequencies."""
    import torch

    turned = _call(graph, torch.ops.aten._conj.default, self)
    return _call(graph, torch.ops.aten.fft_irfft.default, turned, n, dim, OTHER_WAY[norm])


def _from_hermitian(graph: Graph, self: Node, n: int | None = None, dim: int = -1, norm: str | None = None) -> Node:
    import torch

    found = _call(graph, torch.ops.aten.fft_rfft.default, self, n, dim, OTHER_WAY[norm])
    return _call(graph, torch.ops.aten._conj.default, found)


def _shifted(sign: int) -> Callable[..., Node]:
    """The first frequency to the middle, or back."""

    def rewrite(graph: Graph, self: Node, dim: Any = None) -> Node:
        import torch

        sizes = self.meta["val"].shape
        axes = list(range(len(sizes))) if dim is None else list(dim)
        shifts = [sizes[axis] // 2 if sign > 0 else -(sizes[axis] // 2) for axis in axes]
        return _call(graph, torch.ops.aten.roll.default, self, shifts, axes)

    return rewrite
