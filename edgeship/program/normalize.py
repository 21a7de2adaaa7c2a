"""Bring an eager module into the one normal form that compression and every converter start from.

Normal form: static shapes, positional tensor inputs named as in the signature, a flat tuple of outputs, inference
operators only (no dropout, no asserts, no aliases), constants folded, batch norms folded into the convolution or linear
before them. ``linear``, ``conv2d``, ``layer_norm``, ``gelu`` and ``scaled_dot_product_attention`` stay whole: each
converter decomposes what its runtime lacks.
"""

from __future__ import annotations

import keyword
import operator
import re
from typing import TYPE_CHECKING, Any, cast

from edgeship.errors import SourceError
from edgeship.program.rewrites import index_as_view

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Graph, GraphModule, Node

# Folding larger constants than this (in elements) would grow the file for nothing.
MAX_FOLDED_ELEMENTS = 1 << 22


def export_normalised(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], input_names: tuple[str, ...], prefix: str = ""
) -> ExportedProgram:
    """Export ``module`` (positional tensors in, flat tuple of tensors out) in normal form.

    Args:
        inputs: example tensors; their shapes become the program's shapes.
        input_names: one a tensor; they become the names of the graph's placeholders.
        prefix: dropped from the weights' names (the attribute under which a wrapper keeps the real module).

    Raises:
        SourceError: the module cannot be exported, with torch's own reason in one line.
    """
    import torch

    try:
        with torch.no_grad():
            program = torch.export.export(module, inputs, strict=False)
    except Exception as error:
        raise SourceError(f"torch.export could not trace the model: {_first_line(error)}", fix=_EXPORT_FIX) from error
    if program.graph_signature.buffers_to_mutate:
        names = ", ".join(sorted(program.graph_signature.buffers_to_mutate.values()))
        raise SourceError(f"the model changes its buffers while it runs: {names}", fix="return them as outputs instead")
    flat = _flatten_signature(program.module(check_guards=False), input_names, prefix)
    _loosen_views(flat.graph)
    _drop_no_ops(flat.graph)
    _fold_constants(flat)
    _fold_batch_norms(flat)
    flat.graph.eliminate_dead_code()
    flat.delete_all_unused_submodules()
    _drop_unused_tensors(flat)
    flat.recompile()
    with torch.no_grad():
        normal: ExportedProgram = torch.export.export(flat, inputs, strict=False).run_decompositions({})
    _drop_no_ops(normal.graph_module.graph)
    index_as_view(normal)
    normal.graph_module.recompile()
    return normal


_EXPORT_FIX = "the model must run on tensors of fixed shapes without Python branches on their values"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _flatten_signature(module: GraphModule, names: tuple[str, ...], prefix: str) -> GraphModule:
    """A plain ``forward(names...) -> tuple`` with weights named without ``prefix``."""
    import torch
    from torch.fx import Graph, GraphModule

    graph = Graph()
    holder = torch.nn.Module()
    mapping: dict[Node, Node] = {}
    waiting = _identifiers(names)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            name = waiting.pop(0)
            mapping[node] = graph.placeholder(name)
            mapping[node].meta = dict(node.meta)
        elif node.op == "get_attr":
            target = str(node.target)
            short = target.removeprefix(prefix + ".") if prefix else target
            _attach(holder, short, _fetch(module, target))
            mapping[node] = graph.get_attr(short)
            mapping[node].meta = dict(node.meta)
        elif node.op == "call_module":
            continue
        elif node.op == "output":
            leaves = torch.utils._pytree.tree_leaves(node.args)
            graph.output(tuple(mapping[leaf] for leaf in leaves))
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    with _quiet_get_attr():
        return GraphModule(holder, graph)


def _identifiers(names: tuple[str, ...]) -> list[str]:
    """Names that Python accepts as arguments, in the same order, each once."""
    made: list[str] = []
    for name in names:
        clean = re.sub(r"\W", "_", name)
        clean = f"input_{clean}" if not clean.isidentifier() or keyword.iskeyword(clean) else clean
        while clean in made:
            clean += "_"
        made.append(clean)
    return made


class _quiet_get_attr:
    """fx warns of attributes that are not parameters; ours are tensors on purpose."""

    def __enter__(self) -> None:
        import warnings

        self._context = warnings.catch_warnings()
        self._context.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: object) -> None:
        self._context.__exit__(*exc)  # type: ignore[arg-type]


def _fetch(module: torch.nn.Module, target: str) -> Any:
    return operator.attrgetter(target)(module)


def _attach(module: torch.nn.Module, target: str, value: Any) -> None:
    import torch

    *path, leaf = target.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if isinstance(value, torch.nn.Parameter):
        module.register_parameter(leaf, torch.nn.Parameter(value.detach(), requires_grad=False))
    elif isinstance(value, torch.Tensor):
        module.register_buffer(leaf, value.detach())
    else:
        setattr(module, leaf, value)


def _drop_no_ops(graph: Graph) -> None:
    """Remove operators that compute nothing at inference; users read their input instead."""
    import torch

    aten = torch.ops.aten
    same = {
        aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default, aten.clone.default,
        aten.contiguous.default, aten.dropout.default, aten.feature_dropout.default, aten.alias_copy.default,
        aten.dropout_.default,
    }  # fmt: skip
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = str(node.target)
        if "_assert" in name or "sym_constrain" in name:
            if not node.users:
                graph.erase_node(node)
            continue
        if node.target in same or _is_same_copy(node):
            # A clone is what made the memory contiguous for a view behind it.
            for user in node.users:
                if user.target in (aten.view.default, aten._unsafe_view.default):
                    user.target = aten.reshape.default
            node.replace_all_uses_with(cast("Node", node.args[0]))
            graph.erase_node(node)


def _loosen_views(graph: Graph) -> None:
    """Views become reshapes, because the copies that made their memory contiguous are about to go."""
    import torch

    for node in graph.nodes:
        if node.target == torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _is_same_copy(node: Node) -> bool:
    import torch

    aten = torch.ops.aten
    copies = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
    if node.target in (aten.expand.default, aten.view.default, aten.reshape.default, aten.permute.default):
        before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
        if node.target == aten.permute.default:
            axes = cast("list[int]", node.args[1])
            return [axis % len(axes) for axis in axes] == list(range(len(axes)))
        return before is not None and after is not None and before.shape == after.shape
    if node.target not in copies:
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    return before is not None and after is not None and before.dtype == after.dtype


def _fold_constants(module: GraphModule) -> None:
    """Compute everything that depends on neither inputs nor parameters; keep the results as buffers."""
    import torch
    from torch.fx.node import map_arg

    known: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = _fetch(module, str(node.target))
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                known[node] = value
            continue
        if node.op != "call_function" or _is_random(node):
            continue
        table = _fixed_table(node, known)
        if table is not None:
            known[table] = _fetch(module, str(table.target))
        if all(arg in known for arg in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: known[n])  # type: ignore[misc]
            with torch.no_grad():
                known[node] = cast("Any", node.target)(*args, **kwargs)
    count = 0
    for node in list(module.graph.nodes):
        value = known.get(node)
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.numel() > MAX_FOLDED_ELEMENTS:
            continue
        if all(user in known for user in node.users):
            continue
        name = f"folded_{count}"
        count += 1
        module.register_buffer(name, value.detach().clone().contiguous())
        with module.graph.inserting_before(node), _quiet_get_attr():
            constant = module.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    module.graph.eliminate_dead_code()


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


def _fold_batch_norms(module: GraphModule) -> None:
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
            return None if node is None else cast("torch.Tensor", _fetch(module, str(node.target))).double()

        factor = (value(variance) + epsilon).rsqrt()  # type: ignore[operator]
        factor = factor if scale is None else factor * value(scale)
        old = _fetch(module, str(weight.target))
        folded = old.double() * factor.reshape(-1, *[1] * (old.dim() - 1))
        bias = value(layer.args[2]) if len(layer.args) > 2 else None
        offset = -value(mean) if bias is None else bias - value(mean)  # type: ignore[operator]
        offset = offset * factor + (0 if shift is None else value(shift))
        _attach_over(module, str(weight.target), folded.to(old.dtype))
        name = str(weight.target).rpartition(".")[0]
        bias_name = f"{name}.bias" if name else f"{weight.target}_bias"
        _attach_over(module, bias_name, offset.to(old.dtype))
        with module.graph.inserting_before(layer):
            bias_node = module.graph.get_attr(bias_name)
            bias_node.meta["val"] = layer.meta["val"].new_empty(offset.shape)
        args = list(layer.args)
        layer.args = (args[0], args[1], bias_node, *args[3:])
        norm.replace_all_uses_with(layer)
        module.graph.erase_node(norm)


def _attach_over(module: torch.nn.Module, target: str, value: torch.Tensor) -> None:
    import torch

    *path, leaf = target.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    module._parameters.pop(leaf, None)
    module._buffers.pop(leaf, None)
    module.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))


def _drop_unused_tensors(module: GraphModule) -> None:
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for owner_name, owner in list(module.named_modules()):
        for table in (owner._parameters, owner._buffers):
            for leaf in list(table):
                if f"{owner_name}.{leaf}".removeprefix(".") not in used:
                    del table[leaf]
