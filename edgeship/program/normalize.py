"""Bring an eager module into the one normal form that compression and every converter start from.

Normal form: static shapes, positional tensor inputs named as in the signature, a flat tuple of outputs, inference
operators only (no dropout, no asserts, no aliases), constants folded, batch norms folded into the convolution or linear
before them, zeros around a convolution's input its own padding where torch can say it. ``linear``, ``conv2d``,
``layer_norm``, ``gelu`` and ``scaled_dot_product_attention`` stay whole: each converter decomposes what its runtime
lacks.
"""

from __future__ import annotations

import builtins
import keyword
import re
from typing import TYPE_CHECKING, Any, cast

from edgeship.errors import EdgeshipError, OpenSizeError, SourceError
from edgeship.program.aliases import by_one_name
from edgeship.program.cells import spell_cells
from edgeship.program.collector import few_collections, quick_tracing
from edgeship.program.expected import Expected
from edgeship.program.factors import fold_factors
from edgeship.program.few_axes import with_few_axes
from edgeship.program.folding import fetch, fold_batch_norms, fold_constants, fold_pads, quiet_get_attr
from edgeship.program.looks import first_norms
from edgeship.program.mutation import protect_inputs, refuse_state, root, written_roots
from edgeship.program.plain import drop_idle_bounds, numbers_second
from edgeship.program.plain_forms import (
    choose_by_constants,
    choose_nearest,
    count_from_start,
    fill_plainly,
    resize_as_products,
    spell_out,
    strides_as_indices,
)
from edgeship.program.pools import pool_plainly
from edgeship.program.provenance import keep_places
from edgeship.program.rewrites import index_as_view
from edgeship.program.spectra import has_complex, real_spectra
from edgeship.program.transforms import one_axis_at_a_time

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Graph, GraphModule, Node


def export_normalised(
    module: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    input_names: tuple[str, ...],
    prefix: str = "",
    expected: dict[str, Expected] | None = None,
) -> ExportedProgram:
    """Export ``module`` (positional tensors in, flat tuple of tensors out) in normal form.

    Args:
        inputs: example tensors; their shapes become the program's shapes.
        input_names: one a tensor; they become the names of the graph's placeholders.
        prefix: dropped from the weights' names (the attribute under which a wrapper keeps the real module).
        expected: filled with what the batch norms behind the first layers remember of training, see `looks`.

    Raises:
        SourceError: the module cannot be exported, with torch's own reason in one line.
        OpenSizeError: a size or a branch depends on values.
    """
    program = traced(module, inputs)
    open_sizes = _open_size(program.graph)
    try:
        return _normal_form(program, inputs, input_names, prefix, expected)
    except EdgeshipError:
        raise
    except Exception as error:
        if not open_sizes:
            raise
        raise OpenSizeError(open_sizes) from error


def traced(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> ExportedProgram:
    """What torch traces of a module on ``inputs``, in their own shapes. Raises `SourceError`, `OpenSizeError`."""
    import torch

    try:
        with torch.no_grad(), few_collections():
            return torch.export.export(module, inputs, strict=False)
    except EdgeshipError:
        raise
    except Exception as error:
        if _asks_values(error):
            settled = _settled_by_constants(module, inputs)
            if settled is not None:
                return settled
            raise OpenSizeError(f"the model asks for values that only a run tells: {_first_line(error)}") from error
        raise SourceError(f"torch.export could not trace the model: {_first_line(error)}", fix=_EXPORT_FIX) from error


def _settled_by_constants(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> ExportedProgram | None:
    """What torch traces where every value that the model asks for is that of constants: no input changes it.

    None where some value hangs on an input or a parameter, or the trace fails: the caller tells the first reason.
    """
    import torch

    from edgeship.compat.torch import with_real_values

    try:
        with torch.no_grad(), few_collections(), with_real_values():
            program: ExportedProgram = torch.export.export(module, inputs, strict=False)
    except Exception:
        return None
    # Of parameters torch 2.13 hands on other values than theirs.
    given = {*program.graph_signature.user_inputs, *program.graph_signature.inputs_to_parameters}
    moved: set[Node] = set()
    for node in program.graph.nodes:
        if node.name in given or any(source in moved for source in node.all_input_nodes):
            moved.add(node)
    asked = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
    return None if any(node in moved and node.target in asked for node in program.graph.nodes) else program


def _normal_form(
    program: ExportedProgram,
    inputs: tuple[torch.Tensor, ...],
    input_names: tuple[str, ...],
    prefix: str,
    expected: dict[str, Expected] | None,
) -> ExportedProgram:
    """What `export_normalised` makes of a traced program. ``inputs`` in their own shapes."""
    import torch

    from edgeship.compat.torch import is_batching

    if has_complex(program.graph) or any(is_batching(node.target) for node in program.graph.nodes):
        # Writing into a part of a tensor becomes a new tensor: pairs are not written into. Batches are spelled out.
        program = program.run_decompositions({})
    flat = flattened(program.module(check_guards=False), input_names, prefix)
    refuse_state(flat.graph)
    protect_inputs(flat.graph)
    by_one_name(flat.graph)
    _loosen_views(flat.graph)
    pool_plainly(flat)
    spell_out(flat)
    spell_cells(flat.graph)
    _drop_no_ops(flat.graph)
    numbers_second(flat)
    fold_constants(flat)
    if choose_by_constants(flat):
        return _traced_again(flat, inputs, input_names, expected)
    fill_plainly(flat)
    one_axis_at_a_time(flat.graph)
    real_spectra(flat)
    fold_constants(flat)
    drop_idle_bounds(flat)
    if expected is not None:
        expected.update(first_norms(flat))
    fold_batch_norms(flat)
    fold_factors(flat)
    fold_pads(flat.graph)
    choose_nearest(flat)
    resize_as_products(flat)
    strides_as_indices(flat)
    count_from_start(flat)
    flat.graph.eliminate_dead_code()
    flat.delete_all_unused_submodules()
    _drop_unused_tensors(flat)
    flat.recompile()
    with torch.no_grad(), quick_tracing():
        normal: ExportedProgram = torch.export.export(flat, inputs, strict=False).run_decompositions({})
        normal = with_few_axes(normal)
    _refuse_open_sizes(normal.graph_module.graph)
    _drop_no_ops(normal.graph_module.graph)
    _drop_empty_parts(normal.graph_module.graph)
    index_as_view(normal)
    _name_outputs(normal)
    for node in normal.graph_module.graph.nodes:
        # It holds addresses of this process, which would make every saved program another one.
        node.meta.pop("from_node", None)
    keep_places(flat.graph, normal.graph_module.graph, prefix)
    normal.graph_module.recompile()
    return normal


def _traced_again(
    flat: GraphModule,
    inputs: tuple[torch.Tensor, ...],
    input_names: tuple[str, ...],
    expected: dict[str, Expected] | None,
) -> ExportedProgram:
    """The normal form of a graph whose sizes are known only now. ``inputs`` in their own shapes."""
    flat.graph.eliminate_dead_code()
    _drop_no_ops(flat.graph)
    flat.recompile()
    normal = _normal_form(traced(flat, inputs), inputs, input_names, "", expected)
    keep_places(flat.graph, normal.graph_module.graph)
    return normal


def _name_outputs(program: ExportedProgram) -> None:
    """Let the signature know outputs by the names of today: what did nothing before them is gone."""
    results: Any = program.graph_module.graph.output_node().args[0]
    for spec, result in zip(program.graph_signature.output_specs, results, strict=True):
        spec.arg.name = result.name


_EXPORT_FIX = "the model must run on tensors of fixed shapes without Python branches on their values"


def _asks_values(error: BaseException) -> bool:
    """Whether torch says that a size or a branch depends on values."""
    told = f"{type(error).__name__} {error}".lower()
    return any(word in told for word in ("data-dependent", "datadependent", "dynamicoutputshape", "unbacked"))


def _refuse_open_sizes(graph: Graph) -> None:
    """Raise `OpenSizeError` for a size that only a run tells, such as how many elements a mask takes."""
    found = _open_size(graph)
    if found:
        raise OpenSizeError(found, fix="choose with torch.where or a fixed topk instead, or leave that step to the app")


def _open_size(graph: Graph) -> str:
    """What returns a size that only a run tells, in words; empty where nothing does."""
    import torch

    for node in graph.nodes:
        value = node.meta.get("val")
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(part, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in part.shape):
                return f"what {node.target} returns has a size that depends on the values of the input"
    return ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def flattened(module: GraphModule, names: tuple[str, ...], prefix: str) -> GraphModule:
    """A plain ``forward(names...) -> tuple`` with weights named without ``prefix``."""
    import torch
    from torch.fx import Graph, GraphModule

    from edgeship.compat.torch import leaves_of

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
            _attach(holder, short, fetch(module, target))
            mapping[node] = graph.get_attr(short)
            mapping[node].meta = dict(node.meta)
        elif node.op == "call_module":
            continue
        elif node.op == "output":
            leaves = leaves_of(node.args)
            graph.output(tuple(mapping[leaf] for leaf in leaves))
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    with quiet_get_attr():
        return GraphModule(holder, graph)


def _identifiers(names: tuple[str, ...]) -> list[str]:
    """Names in ASCII that Python accepts as arguments, in the same order, each once."""
    made: list[str] = []
    for name in names:
        clean = re.sub(r"\W", "_", name, flags=re.ASCII)
        # fx renames nodes called as a builtin (input, id) whenever it copies a graph.
        if not clean.isidentifier() or keyword.iskeyword(clean) or hasattr(builtins, clean) or clean == "self":
            clean = f"input_{clean}"
        while clean in made:
            clean += "_"
        made.append(clean)
    return made


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
    """Remove operators that compute nothing at inference; users read their input instead.

    Copies that are written into, or made of what is, stay: the second export needs no copies, and this runs again.
    """
    import torch

    aten = torch.ops.aten
    same = {
        aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default, aten.clone.default,
        aten.contiguous.default, aten.dropout.default, aten.feature_dropout.default, aten.alias_copy.default,
        aten.dropout_.default,
    }  # fmt: skip
    protected = written_roots(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = str(node.target)
        if "_assert" in name or "sym_constrain" in name:
            if not node.users:
                graph.erase_node(node)
            continue
        if node.target in same or _is_same_copy(node):
            if node in protected or root(node.args[0]) in protected:
                continue
            _loosen_behind(node)
            node.replace_all_uses_with(cast("Node", node.args[0]))
            graph.erase_node(node)


def _loosen_behind(copy: Node) -> None:
    """Views of a copy become reshapes, for it is what made their memory contiguous. Operators that keep its shape hand
    its strides on: views behind those too."""
    import torch

    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    shape, pending, seen = _shape_of(copy), [copy], {copy}
    while pending:
        for user in pending.pop().users:
            if user.target in views:
                user.target = torch.ops.aten.reshape.default
            elif user not in seen and _shape_of(user) == shape:
                seen.add(user)
                pending.append(user)


def _shape_of(node: Node) -> tuple[int, ...] | None:
    """Of the tensor that a node makes; None where it makes something else."""
    import torch

    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _loosen_views(graph: Graph) -> None:
    """Views become reshapes, because the copies that made their memory contiguous are about to go."""
    import torch

    for node in graph.nodes:
        if node.target == torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _drop_empty_parts(graph: Graph) -> None:
    """What is joined with nothing stays itself: a model that rotates whole heads joins the rest of none to them."""
    import torch

    for node in list(graph.nodes):
        if node.target != torch.ops.aten.cat.default:
            continue
        parts = [part for part in node.args[0] if part.meta["val"].numel()]
        if not parts or len(parts) == len(node.args[0]):
            continue
        if len(parts) == 1:
            # Joining made the memory contiguous for any view behind it.
            _loosen_views(graph)
            node.replace_all_uses_with(parts[0])
            graph.erase_node(node)
        else:
            node.args = (parts, *node.args[1:])
    graph.eliminate_dead_code()


def _is_same_copy(node: Node) -> bool:
    import torch

    aten = torch.ops.aten
    copies = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return not any(cast("list[int]", node.args[1]))
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


def _drop_unused_tensors(module: GraphModule) -> None:
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for owner_name, owner in list(module.named_modules()):
        parameters = owner.named_parameters(recurse=False, remove_duplicate=False)
        buffers = owner.named_buffers(recurse=False, remove_duplicate=False)
        for leaf in [name for name, _ in (*parameters, *buffers)]:
            if f"{owner_name}.{leaf}".removeprefix(".") not in used:
                delattr(owner, leaf)
