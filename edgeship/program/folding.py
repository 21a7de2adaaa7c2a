"""Folding on a flat graph: constants computed ahead, batch norms merged into the layer before them."""

from __future__ import annotations

import hashlib
import itertools
import operator
from typing import TYPE_CHECKING, Any, cast

from edgeship.program.mutation import root, unsettled, written, written_roots

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, GraphModule, Node

# Folding larger constants than this (in elements) would grow the file for nothing.
MAX_FOLDED_ELEMENTS = 1 << 22


def fold_constants(module: GraphModule) -> None:
    """Compute everything that depends on neither inputs nor parameters; keep the results as buffers."""
    import torch

    apart: set[Node] = set()
    known = _known_values(module, apart)
    while found := _not_foldable(module.graph, known) - apart:
        apart |= found
        known = _known_values(module, apart)
    # Every layer of a language model makes the same mask and rotations again.
    names: dict[tuple[object, ...], str] = {}
    # This may run more than once.
    first = sum(name.startswith("folded_") for name, _ in module.named_buffers(recurse=False, remove_duplicate=False))
    for node in list(module.graph.nodes):
        value = known.get(node)
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.numel() > MAX_FOLDED_ELEMENTS:
            continue
        if all(user in known for user in node.users):
            continue
        value = value.detach().clone().contiguous()
        content = (
            hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().tobytes()).digest() if value.numel() else b""
        )
        key = (value.dtype, tuple(value.shape), content)
        name = names.setdefault(key, f"folded_{first + len(names)}")
        if not hasattr(module, name):
            module.register_buffer(name, value)
        with module.graph.inserting_before(node), quiet_get_attr():
            constant = module.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    _write_numbers(module, known)
    for node in reversed(list(module.graph.nodes)):
        # Operators that write in place are never dead code to fx.
        if node in known and not node.users and written(node):
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _write_numbers(module: GraphModule, known: dict[Node, Any]) -> None:
    """Numbers that the model read from constants (``int(self.length)``) stand in the operators that take them."""
    from torch.fx.node import map_arg

    numbers = {node: value for node, value in known.items() if isinstance(value, (bool, int, float))}
    if not numbers:
        return
    for node in module.graph.nodes:
        if any(source in numbers for source in node.all_input_nodes):
            node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda one: numbers.get(one, one))  # type: ignore[misc]


def _known_values(module: GraphModule, apart: set[Node]) -> dict[Node, Any]:
    """The value of every node that depends on neither inputs nor parameters, nor shows storage of one ``apart``."""
    import torch
    from torch.fx.node import map_arg

    known: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = fetch(module, str(node.target))
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                known[node] = value
            continue
        if node.op != "call_function" or _is_random(node) or root(node) in apart:
            continue
        table = _fixed_table(node, known)
        if table is not None:
            known[table] = fetch(module, str(table.target))
        if all(arg in known for arg in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: known[n])  # type: ignore[misc]
            with torch.no_grad():
                known[node] = cast("Any", node.target)(*args, **kwargs)
    return known


def _not_foldable(graph: Graph, known: dict[Node, Any]) -> set[Node]:
    """Written storage that must stay in the graph: partly written by others, or too large to keep as a buffer."""
    large = {
        owner
        for owner in written_roots(graph)
        if owner in known and getattr(known[owner], "numel", int)() > MAX_FOLDED_ELEMENTS
    }
    return unsettled(graph, known) | large


def _fixed_table(node: Node, known: dict[Node, Any]) -> Node | None:
    """The table of a lookup of constant rows, as position embeddings are: a fixed length needs those rows only."""
    import torch

    if node.target != torch.ops.aten.embedding.default or node.args[1] not in known:
        return None
    table = cast("Node", node.args[0])
    return table if table.op == "get_attr" and len(table.users) == 1 else None


def _is_random(node: Node) -> bool:
    import torch

    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def fold_batch_norms(module: GraphModule) -> None:
    """Scale the weights of the convolution or linear before each inference batch norm, and drop the norm."""
    import torch

    aten = torch.ops.aten
    targets = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)
    uses: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
    for norm in list(module.graph.nodes):
        if norm.op != "call_function" or norm.target != aten.batch_norm.default:
            continue
        layer, scale, shift, mean, variance, training, _, epsilon = norm.args[:8]
        weight = layer.args[1] if layer.op == "call_function" and layer.target in targets else None
        if weight is None or training or len(layer.users) != 1 or mean is None:
            continue
        if weight.op != "get_attr" or uses[str(weight.target)] != 1:
            continue

        def value(node: Any) -> torch.Tensor | None:
            """A parameter of a batch norm in float64, [channels]; None where it has none."""
            return None if node is None else cast("torch.Tensor", fetch(module, str(node.target))).double()

        factor = (value(variance) + epsilon).rsqrt()  # type: ignore[operator]
        factor = factor if scale is None else factor * value(scale)
        old = fetch(module, str(weight.target))
        folded = old.double() * factor.reshape(-1, *[1] * (old.dim() - 1))
        bias = value(layer.args[2]) if len(layer.args) > 2 else None
        offset = -value(mean) if bias is None else bias - value(mean)  # type: ignore[operator]
        offset = offset * factor + (0 if shift is None else value(shift))
        attach_over(module, str(weight.target), folded.to(old.dtype))
        bias_name = name_of_bias(module, layer)
        attach_over(module, bias_name, offset.to(old.dtype))
        with module.graph.inserting_before(layer):
            bias_node = module.graph.get_attr(bias_name)
            bias_node.meta["val"] = layer.meta["val"].new_empty(offset.shape)
        args = list(layer.args)
        layer.args = (args[0], args[1], bias_node, *args[3:])
        norm.replace_all_uses_with(layer)
        module.graph.erase_node(norm)


def fold_pads(graph: Graph) -> None:
    """Zeros around a convolution's input become the convolution's own padding, where one number an axis can say it.

    More zeros at the end than at the start (TensorFlow's padding "same" with a stride) have no such form in torch:
    those stay, and lowerings fold them where their format has both ends.
    """
    import torch

    aten = torch.ops.aten
    convolutions = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
    for layer in list(graph.nodes):
        while layer.op == "call_function" and layer.target in convolutions:
            pad = cast("Node", layer.args[0])
            padding = _padding_with(pad, layer)
            if padding is None:
                break
            # Converters want one number an axis where torch takes one for all.
            given = [*layer.args, *(None, [1] * len(padding), [0])[len(layer.args) - 2 :]]
            layer.args = (pad.args[0], *given[1:4], padding, *given[5:])
    graph.eliminate_dead_code()


def _padding_with(pad: Node, layer: Node) -> list[int] | None:
    """The padding of ``layer`` that stands for ``pad`` too; None where there is none."""
    import torch

    aten = torch.ops.aten
    if pad.op != "call_function" or pad.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return None
    mode, value = _filling(pad)
    if mode != "constant" or value not in (None, 0):
        return None
    size = cast("Node", pad.args[0]).meta["val"].shape
    kernel, outer = cast("Node", layer.args[1]).meta["val"].shape[2:], layer.meta["val"].shape[2:]
    stride, own, dilation = (_each(layer, place, default, len(kernel)) for place, default in ((3, 1), (4, 0), (5, 1)))
    # torch counts from the last axis: (start, end) of the last, then of the one before it.
    ends = list(cast("list[int]", pad.args[1]))
    pairs = [(ends[place], ends[place + 1]) for place in range(0, len(ends), 2)][::-1]
    pairs = [(0, 0)] * (len(size) - len(pairs)) + pairs
    if any(end < 0 for pair in pairs for end in pair) or any(any(pair) for pair in pairs[: len(size) - len(kernel)]):
        return None
    padding: list[int] = []
    for axis, (start, _) in enumerate(pairs[-len(kernel) :]):
        both = own[axis] + start
        reach = dilation[axis] * (int(kernel[axis]) - 1) + 1
        if (int(size[axis - len(kernel)]) + 2 * both - reach) // stride[axis] + 1 != outer[axis]:
            return None
        padding.append(both)
    return padding


def _filling(pad: Node) -> tuple[str, float | None]:
    """What a pad writes: its mode, and the number of a constant one."""
    import torch

    rest = list(pad.args[2:])
    if pad.target == torch.ops.aten.constant_pad_nd.default:
        return "constant", cast("float | None", rest[0] if rest else pad.kwargs.get("value", 0))
    mode = rest[0] if rest else pad.kwargs.get("mode", "constant")
    return cast("str", mode), cast("float | None", rest[1] if len(rest) > 1 else pad.kwargs.get("value"))


def _each(layer: Node, place: int, default: int, axes: int) -> list[int]:
    """An option of a convolution as one number an axis."""
    given: Any = layer.args[place] if len(layer.args) > place else default
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * axes if len(numbers) == 1 else numbers


def attach_over(module: torch.nn.Module, target: str, value: torch.Tensor) -> None:
    """Put a parameter where a dotted name says, over what is there. Any shape."""
    import torch

    *path, leaf = target.split(".")
    for part in path:
        if not isinstance(getattr(module, part, None), torch.nn.Module):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if hasattr(module, leaf):
        delattr(module, leaf)
    module.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))


def name_of_bias(module: GraphModule, layer: Node) -> str:
    """Where a layer's bias goes: beside its weight, under a name that nothing else reads.

    Weights may be called ``a.0`` and ``a.1``, as in files of other makers: ``a.bias`` is then the first one's only.
    """
    weight = str(cast("Node", layer.args[1]).target)
    bias = cast("Node | None", layer.args[2] if len(layer.args) > 2 else None)
    owner = weight.rpartition(".")[0]
    names = itertools.chain(
        [f"{owner}.bias" if owner else f"{weight}_bias", f"{weight}_bias"],
        (f"{weight}_bias{place}" for place in itertools.count(1)),
    )
    own = None if bias is None or not _read_once(module, bias) else str(bias.target)
    return next(name for name in names if name == own or not _holds(module, name))


def _read_once(module: GraphModule, constant: Node) -> bool:
    readers = [node for node in module.graph.nodes if node.op == "get_attr" and node.target == constant.target]
    return len(readers) == 1 and len(constant.users) == 1


def _holds(module: torch.nn.Module, target: str) -> bool:
    try:
        fetch(module, target)
    except AttributeError:
        return False
    return True


class quiet_get_attr:
    """fx warns of attributes that are not parameters; ours are tensors on purpose."""

    def __enter__(self) -> None:
        import warnings

        self._context = warnings.catch_warnings()
        self._context.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: object) -> None:
        self._context.__exit__(*exc)  # type: ignore[arg-type]


def fetch(module: torch.nn.Module, target: str) -> Any:
    """The attribute behind a dotted name."""
    return operator.attrgetter(target)(module)
