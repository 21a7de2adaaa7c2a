"""Complex numbers as pairs of real ones, and Fourier transforms as products with a fixed basis.

No runtime that we lower to has complex tensors, and what their converters make of ``stft`` differs or fails. In the
normal form a short-time transform is a convolution with cosines and sines (times the window), a transform of an axis a
product with them; what follows is arithmetic on real and imaginary parts. The basis is computed in float64 and is no
trained weight: compression leaves it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from edgeship.program.folding import fetch, quiet_get_attr

# How the buffers are called whose numbers the normal form computed.
COMPUTED = "computed_"

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.fx import Graph, GraphModule, Node

    Pair = tuple[Tensor, Tensor]


def real_spectra(module: GraphModule) -> int:
    """Rewrite ``module`` in place so that nothing in it is complex; returns how many operators changed.

    Nothing is changed where an operator on complex numbers is not known here: what a converter says of it then is
    more useful than half a rewrite.
    """
    nodes = [node for node in module.graph.nodes if _makes_complex(module, node) or _reads_complex(node)]
    spectra = [node for node in module.graph.nodes if node.target in _spectra()]
    if not nodes and not spectra:
        return 0
    table = _table()
    if any(node.op != "get_attr" and node.target not in table and node.target not in _spectra() for node in nodes):
        return 0
    changed = [node for node in module.graph.nodes if node in {*nodes, *spectra}]
    pairs: dict[Node, Node] = {}
    for node in changed:
        _rewrite(module, node, pairs, table)
    for node in reversed(changed):
        if not node.users:
            module.graph.erase_node(node)
    return len(changed)


def _rewrite(module: GraphModule, node: Node, pairs: dict[Node, Node], table: Mapping[Any, Callable[..., Any]]) -> None:
    from torch.fx.node import map_arg

    graph = module.graph
    if node.op == "get_attr":
        pairs[node] = _constant_pair(module, node)
        return
    args, kwargs = map_arg((node.args, node.kwargs), lambda item: pairs.get(item, item))  # type: ignore[misc]
    with graph.inserting_before(node):
        if node.target in _spectra():
            new = _spectra()[node.target](module, node, args, dict(kwargs))
        else:
            function = _power if _is_squared(node) else table[node.target]
            new = graph.call_function(function, args, dict(kwargs))
    new.meta = {key: value for key, value in node.meta.items() if key != "val"}
    if _is_complex(node.meta.get("val")):
        pairs[node] = new
        return
    new.meta["val"] = node.meta["val"]
    if _is_squared(node):
        for user in list(node.users):
            user.replace_all_uses_with(new)
            graph.erase_node(user)
    node.replace_all_uses_with(new)


def _is_squared(node: Node) -> bool:
    """Whether a magnitude is only read by squares: the power needs no root."""
    import torch

    aten = torch.ops.aten
    if node.target != aten.abs.default or not node.users:
        return False
    return all(
        user.target == aten.square.default or (user.target == aten.pow.Tensor_Scalar and user.args[1] == 2)
        for user in node.users
    )


def _is_complex(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_complex()


def _makes_complex(module: GraphModule, node: Node) -> bool:
    if node.op == "get_attr":
        return _is_complex(fetch(module, str(node.target)))
    return node.op == "call_function" and _is_complex(node.meta.get("val"))


def _reads_complex(node: Node) -> bool:
    return node.op == "call_function" and any(_is_complex(item.meta.get("val")) for item in node.all_input_nodes)


def _constant_pair(module: GraphModule, node: Node) -> Node:
    """The two parts of a complex constant."""
    import torch

    value = fetch(module, str(node.target))
    with module.graph.inserting_before(node):
        parts = [keep_computed(module, module.graph, part.contiguous()) for part in (value.real, value.imag)]
        return module.graph.call_function(_pair, tuple(parts)) if torch.is_complex(value) else node


def keep_computed(module: GraphModule, graph: Graph, value: Tensor) -> Node:
    """A buffer with numbers that the normal form computed, at the graph's place of insertion; equal ones are one.

    Any shape.
    """
    import torch

    number = 0
    while hasattr(module, f"{COMPUTED}{number}"):
        held = cast("torch.Tensor", getattr(module, f"{COMPUTED}{number}"))
        if held.dtype == value.dtype and held.shape == value.shape and torch.equal(held, value):
            break
        number += 1
    name = f"{COMPUTED}{number}"
    if not hasattr(module, name):
        module.register_buffer(name, value)
    with quiet_get_attr():
        node = graph.get_attr(name)
    node.meta["val"] = value
    return node


def fourier_basis(length: int, rows: int) -> Tensor:
    """``[2 * rows, length]`` in float64: cosines, then negative sines, of the first ``rows`` frequencies."""
    import torch

    turns = torch.outer(torch.arange(rows), torch.arange(length)) % length
    angles = turns.double() * (2 * math.pi / length)
    # Exactly 0 where torch's is: the angle of a negative number hangs on the sign of its imaginary part.
    sines = torch.where(2 * turns % length == 0, 0.0, -torch.sin(angles))
    return torch.cat([torch.cos(angles), sines])


def _spectra() -> dict[Any, Callable[..., Node]]:
    import torch

    aten = torch.ops.aten
    return {
        aten.stft.default: _stft,
        aten.fft_rfft.default: _transform,
        aten.fft_fft.default: _transform,
        aten.fft_irfft.default: _inverse,
    }


def _stft(module: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``stft(x [B, L] or [L])``, not centred (torch pads before): a convolution with the windowed basis."""
    import torch

    names = ("self", "n_fft", "hop_length", "win_length", "window", "normalized", "onesided", "return_complex")
    given = dict(zip(names, args, strict=False)) | kwargs
    length = int(given["n_fft"])
    hop = int(given.get("hop_length") or length // 4)
    width = int(given.get("win_length") or length)
    onesided = True if given.get("onesided") is None else bool(given["onesided"])
    rows = length // 2 + 1 if onesided else length
    basis = fourier_basis(length, rows).unsqueeze(1)
    if given.get("normalized"):
        basis = basis / math.sqrt(length)
    window, left = given.get("window"), (length - width) // 2
    edges = (left, length - width - left)
    graph = module.graph
    held = None if window is None else _value_of(module, window)
    if window is None or held is not None:
        ones = torch.ones(width, dtype=torch.float64) if held is None else held.double()
        basis = basis * torch.nn.functional.pad(ones, edges)
        kernel = keep_computed(module, graph, basis.float())
    else:
        kernel = graph.call_function(_windowed, (keep_computed(module, graph, basis.float()), window, edges))
    complex_wanted = _is_complex(node.meta["val"])
    return graph.call_function(_framed if complex_wanted else _framed_real, (given["self"], kernel, hop, rows))


def _value_of(module: GraphModule, node: Node) -> Tensor | None:
    import torch

    if node.op != "get_attr":
        return None
    value = fetch(module, str(node.target))
    return None if isinstance(value, torch.nn.Parameter) else cast("Tensor", value)


def _windowed(basis: Tensor, window: Tensor, edges: tuple[int, int]) -> Tensor:
    """``basis`` [rows, n] times ``window`` [n - edges], padded by ``edges``."""
    from torch.nn import functional

    return basis * functional.pad(window, list(edges))


def _framed(x: Tensor, kernel: Tensor, hop: int, rows: int) -> Pair:
    """``x`` ``[B, L]`` or ``[L]`` to two ``[B, rows, T]`` or ``[rows, T]``."""
    from torch.nn import functional

    many = functional.conv1d((x if x.dim() == 2 else x.unsqueeze(0)).unsqueeze(1), kernel, stride=hop)
    many = many if x.dim() == 2 else many.squeeze(0)
    return many.narrow(-2, 0, rows), many.narrow(-2, rows, rows)


def _framed_real(x: Tensor, kernel: Tensor, hop: int, rows: int) -> Tensor:
    """Real and imaginary part along a new last axis: [..., frames, rows, 2]."""
    return _as_real(_framed(x, kernel, hop, rows))


def _transform(module: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``fft_rfft`` and ``fft_fft`` of one axis: a product with the basis."""
    given = dict(zip(("self", "n", "dim", "norm"), args, strict=False)) | kwargs
    shape = args[0].meta["val"].shape if "val" in args[0].meta else node.all_input_nodes[0].meta["val"].shape
    axis = int(given.get("dim", -1))
    length = int(given.get("n") or shape[axis])
    rows = length // 2 + 1 if "rfft" in str(node.target) else length
    basis = fourier_basis(length, rows) * _scale(given.get("norm"), length)
    constant = keep_computed(module, module.graph, basis.t().float().contiguous())
    both = _is_complex(node.all_input_nodes[0].meta["val"])
    return module.graph.call_function(_projected, (given["self"], constant, axis, length, rows, both))


def _projected(x: Any, basis: Tensor, axis: int, length: int, rows: int, both: bool) -> Pair:
    from torch.nn import functional

    def project(part: Tensor) -> Pair:
        moved = part.movedim(axis, -1)
        spare = length - moved.shape[-1]
        moved = functional.pad(moved, (0, spare)) if spare > 0 else moved.narrow(-1, 0, length)
        # [..., length] x [length, 2 * rows]
        found = moved @ basis
        return found.narrow(-1, 0, rows).movedim(-1, axis), found.narrow(-1, rows, rows).movedim(-1, axis)

    if not both:
        return project(x)
    (first_real, first_imag), (second_real, second_imag) = project(x[0]), project(x[1])
    return first_real - second_imag, first_imag + second_real


def _inverse(module: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``fft_irfft`` of one axis: a product with the basis; frequencies that stand for two count twice."""
    import torch

    given = dict(zip(("self", "n", "dim", "norm"), args, strict=False)) | kwargs
    axis = int(given.get("dim", -1))
    have = int(node.all_input_nodes[0].meta["val"].shape[axis])
    length = int(given.get("n") or 2 * (have - 1))
    rows = length // 2 + 1
    weights = torch.full((rows,), 2.0, dtype=torch.float64)
    weights[0] = 1.0
    if length % 2 == 0:
        weights[-1] = 1.0
    scale = _scale(given.get("norm"), length) * (1 / length if given.get("norm") in (None, "backward") else 1.0)
    if given.get("norm") == "forward":
        scale = 1.0
    basis = fourier_basis(length, rows) * weights.repeat(2)[:, None] * scale
    constant = keep_computed(module, module.graph, basis.float())
    return module.graph.call_function(_restored, (given["self"], constant, axis, rows))


def _restored(x: Pair, basis: Tensor, axis: int, rows: int) -> Tensor:
    from torch.nn import functional

    parts = []
    for part in x:
        moved = part.movedim(axis, -1)
        spare = rows - moved.shape[-1]
        parts.append(functional.pad(moved, (0, spare)) if spare > 0 else moved.narrow(-1, 0, rows))
    # [..., rows] x [rows, length]
    real, imag = parts[0] @ basis[:rows], parts[1] @ basis[rows:]
    return (real + imag).movedim(-1, axis)


def _scale(norm: str | None, length: int) -> float:
    return {"ortho": 1 / math.sqrt(length), "forward": 1 / length}.get(norm or "", 1.0)


def _pair(real: Tensor, imag: Tensor) -> Pair:
    """Two tensors of one shape."""
    return real, imag


def _parts(x: Any) -> tuple[Any, Any]:
    """Real and imaginary part of a pair, a real tensor or a number."""
    if isinstance(x, (tuple, list)):
        return x[0], x[1]
    return (x.real, x.imag) if isinstance(x, complex) else (x, 0)


def _power(x: Pair) -> Tensor:
    """Squared magnitude, element by element."""
    return x[0] * x[0] + x[1] * x[1]


def _as_real(x: Pair) -> Tensor:
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


def _table() -> dict[Any, Callable[..., Any]]:
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
        aten.complex.default: _pair,
        aten.polar.default: lambda size, angle: (size * torch.cos(angle), size * torch.sin(angle)),
        aten.view_as_real.default: _as_real,
        aten._conj.default: lambda x: (x[0], -x[1]),
        aten.conj.default: lambda x: (x[0], -x[1]),
        aten.conj_physical.default: lambda x: (x[0], -x[1]),
        aten.resolve_conj.default: same,
        aten.real.default: lambda x: x[0],
        aten.imag.default: lambda x: x[1],
        aten.abs.default: lambda x: torch.sqrt(_power(x)),
        aten.angle.default: lambda x: torch.atan2(x[1], x[0]),
        aten.square.default: lambda x: _times(x, x),
        aten.add.Tensor: _sum(1),
        aten.sub.Tensor: _sum(-1),
        aten.mul.Tensor: _times,
        aten.mul.Scalar: _times,
        aten.div.Tensor: _over,
        aten.matmul.default: _product,
    }
