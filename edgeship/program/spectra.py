"""Complex numbers as pairs of real ones, and Fourier transforms as products with a fixed basis.

No runtime that we lower to has complex tensors, and what their converters make of ``stft`` differs or fails. In the
normal form a short-time transform is a convolution with cosines and sines (times the window), a transform of an axis a
product with them; what follows is arithmetic on real and imaginary parts. The basis is computed in float64 and is no
trained weight: compression leaves it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from edgeship.errors import SourceError
from edgeship.program.folding import fetch, quiet_get_attr
from edgeship.program.pairs import as_real, pair, pair_operators, power

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
    table = pair_operators()
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
            function = power if _is_squared(node) else table[node.target]
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


def has_complex(graph: Graph) -> bool:
    """Whether something in a graph is complex."""
    return any(_is_complex(node.meta.get("val")) for node in graph.nodes)


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
        return module.graph.call_function(pair, tuple(parts)) if torch.is_complex(value) else node


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
        aten.fft_ifft.default: _transform,
        aten.fft_irfft.default: _inverse,
        aten.istft.default: _istft,
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
    return as_real(_framed(x, kernel, hop, rows))


def _transform(module: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``fft_rfft``, ``fft_fft`` and ``fft_ifft`` of one axis: a product with the basis."""
    given = dict(zip(("self", "n", "dim", "norm"), args, strict=False)) | kwargs
    shape = args[0].meta["val"].shape if "val" in args[0].meta else node.all_input_nodes[0].meta["val"].shape
    axis = int(given.get("dim", -1))
    length = int(given.get("n") or shape[axis])
    rows = length // 2 + 1 if "rfft" in str(node.target) else length
    basis, norm = fourier_basis(length, rows), given.get("norm")
    if "ifft" in str(node.target):
        # The other way round the circle.
        basis[rows:] *= -1
        norm = {None: "forward", "backward": "forward", "forward": "backward"}.get(norm, norm)
    basis = basis * _scale(norm, length)
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


def _istft(module: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """``istft(x [.., rows, T])``: a transposed convolution with the windowed basis, over the sum of windows."""
    import torch
    from torch.nn import functional

    names = ("self", "n_fft", "hop_length", "win_length", "window", "center", "normalized", "onesided", "length")
    given = dict(zip(names, args, strict=False)) | kwargs
    length = int(given["n_fft"])
    hop = int(given.get("hop_length") or length // 4)
    width = int(given.get("win_length") or length)
    rows, frames = (int(size) for size in node.all_input_nodes[0].meta["val"].shape[-2:])
    window, left = given.get("window"), (length - width) // 2
    held = torch.ones(width) if window is None else _value_of(module, window)
    if held is None:
        raise SourceError("istft with a window that is computed", fix="keep the window in a buffer of the module")
    window = functional.pad(held.double(), (left, length - width - left))
    basis = fourier_basis(length, rows) * window / (math.sqrt(length) if given.get("normalized") else length)
    if rows == length // 2 + 1:
        # Frequencies that stand for two count twice.
        twice = torch.full((rows,), 2.0, dtype=torch.float64)
        twice[0] = 1.0
        if length % 2 == 0:
            twice[-1] = 1.0
        basis = basis * twice.repeat(2)[:, None]
    ones = torch.ones(1, 1, frames, dtype=torch.float64)
    added = functional.conv_transpose1d(ones, window.square().reshape(1, 1, -1), stride=hop).flatten()
    begin = length // 2 if given.get("center", True) else 0
    end = len(added) - begin
    wanted = end - begin if given.get("length") is None else int(given["length"])
    seen = added[begin : begin + wanted]
    graph = module.graph
    kernel = keep_computed(module, graph, basis.float().unsqueeze(1))
    shares = keep_computed(module, graph, (1 / seen).float())
    return graph.call_function(_added_up, (given["self"], kernel, shares, hop, begin, wanted))


def _added_up(x: Pair, kernel: Tensor, shares: Tensor, hop: int, begin: int, wanted: int) -> Tensor:
    """Two of [B, rows, T] or [rows, T] to [B, wanted] or [wanted]."""
    import torch
    from torch.nn import functional

    both = torch.cat(x, -2)
    many = both if both.dim() == 3 else both.unsqueeze(0)
    # [B, 2 * rows, T] -> [B, 1, samples] -> [B, samples]
    whole = functional.conv_transpose1d(many, kernel, stride=hop).squeeze(1)
    kept = whole.narrow(1, begin, shares.shape[0]) * shares
    kept = functional.pad(kept, (0, wanted - shares.shape[0]))
    return kept if both.dim() == 3 else kept.squeeze(0)


def _scale(norm: str | None, length: int) -> float:
    return {"ortho": 1 / math.sqrt(length), "forward": 1 / length}.get(norm or "", 1.0)
