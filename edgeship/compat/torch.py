"""What edgeship takes from torch that torch does not document. Written for torch 2.9 to 2.14.

Most of it ends when `torch.export` can change a program in place: today an `ExportedProgram` has no public way to get
another graph, and its archive no public reader that runs nothing of the file.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._C import DispatchKey
from torch._export import utils as export_utils
from torch._ops import OperatorBase
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from edgeship.compat.exchange import exchanged, log_level

if TYPE_CHECKING:
    from torch.export import ExportedProgram, ExportGraphSignature, ModuleCallEntry
    from torch.fx import GraphModule

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "WeakIdKeyDictionary",
    "archive_schema",
    "decomposed",
    "decomposition_of",
    "deserialized",
    "dtype_of_code",
    "is_batching",
    "is_mutable",
    "is_operator",
    "is_union",
    "is_view",
    "leaves_of",
    "map_tensors",
    "name_of_node",
    "on_meta_device",
    "onednn_linear",
    "onnx_table_kept",
    "operator_named",
    "operator_names",
    "outside_of_tracing",
    "pair_operators",
    "quick_decompositions",
    "quiet_shape_errors",
    "replaced",
    "schema_of",
    "seeded",
    "structure_of",
    "with_real_values",
    "with_structure",
]


# Operators


def is_operator(target: object) -> bool:
    """Whether what a node calls is one overload of a registered operator, and no Python function."""
    return isinstance(target, torch._ops.OpOverload)


def is_view(target: object) -> bool:
    """Whether an operator only looks at the memory of its input in another way."""
    return isinstance(target, torch._ops.OpOverload) and bool(target.is_view)


def is_batching(target: object) -> bool:
    """Whether what a node calls is a step of ``vmap`` that torch keeps in a trace, and cannot trace again."""
    return getattr(target, "__module__", "") == "torch._functorch.predispatch"


def schema_of(target: object) -> Any | None:
    """The ``FunctionSchema`` of an operator, which says what is aliased and what is written; None for a function."""
    return getattr(target, "_schema", None)


def is_mutable(target: object) -> bool:
    """Whether an operator writes into one of its inputs."""
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def operator_names() -> frozenset[str]:
    """Every operator that the dispatcher knows, as ``namespace::name.overload``."""
    return frozenset(torch._C._dispatch_get_all_op_names())


def operator_named(name: str) -> Any | None:
    """The default overload of ``namespace::name`` where some library registered it; else None."""
    if name not in operator_names():
        return None
    namespace, _, short = name.partition("::")
    return getattr(getattr(torch.ops, namespace), short).default


def pair_operators() -> Any:
    """``torch.ops.quantized_decomposed``, registered: quantize and dequantize of a tensor by a fixed grid."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


def decomposition_of(target: object) -> Callable[..., Any] | None:
    """The rule by which torch spells an operator out in others; beyond `torch.export.default_decompositions`."""
    from torch._decomp import decomposition_table

    return decomposition_table.get(cast("Any", target))


def onednn_linear() -> Callable[..., Any] | None:
    """OneDNN's linear layer, ``(input, weight, bias, "none", [], "")``; None where this build of torch has none."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    call = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if call is None:
        return None
    probe = torch.eye(2)
    try:
        same = torch.equal(call(probe, probe, None, "none", [], ""), probe)
    except (RuntimeError, NotImplementedError, TypeError):
        # A build without it, or with another signature.
        return None
    return cast("Callable[..., Any]", call) if same else None


def decomposed(exported: ExportedProgram, table: Mapping[Any, Callable[..., Any]]) -> ExportedProgram:
    """`ExportedProgram.run_decompositions`, which keeps what is not in the table, in half the time."""
    with quick_decompositions():
        found: ExportedProgram = exported.run_decompositions(dict(table))
    return found


@contextmanager
def quick_decompositions() -> Iterator[None]:
    """Inside, ``run_decompositions`` does what it does for every graph, of one operator too, in half the time.

    It gives each of 500 operators twenty kernels and takes them away again, and before that looks through all
    operators once for each library that has some. Here the kernels are put in place without annotations being
    evaluated for each, and the operators are looked through once. It ends when torch does so.
    """
    plain = OperatorBase.py_impl

    def py_impl(operator: Any, key: Any) -> Callable[..., Any]:
        if not isinstance(key, DispatchKey) or key == DispatchKey.Python or key in operator.py_kernels:
            return plain(operator, key)

        def put(kernel: Any) -> Any:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()
            return kernel

        return put

    name = "_materialize_cpp_cia_ops"
    once = functools.cache(getattr(export_utils, name))
    with exchanged(OperatorBase, "py_impl", py_impl), exchanged(export_utils, name, once):
        yield


@contextmanager
def onnx_table_kept(opset: int) -> Iterator[None]:
    """Inside, ``torch.onnx.export`` takes the table of ONNX forms that this process has made before.

    The exporter makes the table in each call: a second of processor time, more than a small network takes. It ends when
    the exporter keeps its table.

    Args:
        opset: version of ONNX's operators, that of the export.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    kept = _onnx_table(opset)

    def from_torchlib(cls: type, opset_version: int = opset) -> Any:
        table = copy.copy(kept)
        # A caller's own forms are added to lists of its own.
        table.functions = {target: list(forms) for target, forms in kept.functions.items()}
        return table

    with exchanged(ONNXRegistry, "from_torchlib", classmethod(from_torchlib)):
        yield


@functools.cache
def _onnx_table(opset: int) -> Any:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from edgeship.compat.onnxscript import unread_functions

    with unread_functions():
        return ONNXRegistry.from_torchlib(opset_version=opset)


# Nested inputs and outputs


def leaves_of(tree: object) -> list[Any]:
    """What nested lists, tuples and dicts hold, in torch's order."""
    return _pytree.tree_leaves(tree)


def structure_of(tree: object) -> Any:
    """How nested lists, tuples and dicts are nested: a ``TreeSpec``."""
    return _pytree.tree_structure(tree)


def with_structure(leaves: Sequence[Any], structure: Any) -> Any:
    """Leaves nested as `structure_of` says."""
    return _pytree.tree_unflatten(list(leaves), structure)


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """The same nesting with each tensor replaced by what a function makes of it."""
    return _pytree.tree_map_only(torch.Tensor, function, tree)


# Exported programs


def replaced(
    exported: ExportedProgram,
    *,
    graph_module: GraphModule | None = None,
    graph_signature: ExportGraphSignature | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    module_call_graph: list[ModuleCallEntry] | None = None,
) -> ExportedProgram:
    """A shallow copy of a program with some of its parts exchanged; ``exported`` stays as it is.

    Parts that are not given are shared, the graph too: give a copy of it before changing it.
    """
    made = copy.copy(exported)
    if graph_module is not None:
        made._graph_module = graph_module
    if graph_signature is not None:
        made._graph_signature = graph_signature
    if state_dict is not None:
        made._state_dict = dict(state_dict)
    if module_call_graph is not None:
        made._module_call_graph = module_call_graph
    return made


# Archives of programs


def archive_schema() -> types.ModuleType:
    """The dataclasses of a ``.pt2``'s JSON."""
    return importlib.import_module("torch._export.serde.schema")


def name_of_node(node: Any) -> str | None:
    """The name that an archive gives a node itself; None where it gives none, as torch until 2.9 writes them all."""
    return cast("str | None", getattr(node, "name", None))


def is_union(kind: type) -> bool:
    """Whether a class of `archive_schema` holds one of several forms, made by its ``create``."""
    from torch._export.serde.union import _Union

    return issubclass(kind, _Union)


def deserialized(
    program: Any, weights: Mapping[str, torch.Tensor], constants: Mapping[str, Any], samples: Any
) -> ExportedProgram:
    """The program of an archive's records (`archive_schema`) and tensors. torch sees no file.

    Raises:
        Exception: of many types, where the records contradict each other.
    """
    from torch._export.serde.serialize import ExportedProgramDeserializer

    return ExportedProgramDeserializer().deserialize(program, dict(weights), dict(constants), samples)


def dtype_of_code(code: int) -> torch.dtype:
    """The dtype that an archive means by a number. Raises KeyError when it means none."""
    from torch._export.serde.serialize import deserialize_scalar_type

    return deserialize_scalar_type(cast("Any", code))


# Global state, changed for the length of a block


def quiet_shape_errors() -> AbstractContextManager[None]:
    """Inside, torch logs no traceback for each shape that does not fit: it raises an error as well."""
    return log_level("torch._subclasses.fake_tensor", logging.CRITICAL)


@contextmanager
def with_real_values() -> Iterator[None]:
    """Inside, tracing computes the values of the examples beside the shapes: a branch goes where they go.

    Whether a branch may, is for the caller to see: what was asked stands in the program as ``item`` operators.
    """
    import torch._functorch.config as settings

    quiet = log_level("torch.fx.experimental.symbolic_shapes", logging.CRITICAL)
    with quiet, settings.patch(fake_tensor_propagate_real_tensors=True):
        yield


def outside_of_tracing() -> AbstractContextManager[None]:
    """Inside, modules that are called while torch traces are plain calls: what one of them raises can be caught.

    The tracer notes which module it is in, and loses count where an error leaves one.
    """
    return exchanged(torch.nn.Module, "__call__", torch.nn.Module._wrapped_call_impl)


# Hooks are a table that torch walks while it makes modules: two blocks at once would change it meanwhile.
_HOOKED = threading.RLock()


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Parameters that this thread's modules get inside are on the meta device: making and initializing them takes
    neither memory nor time. Buffers are made as always, and so are other threads' modules."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    here = threading.get_ident()

    def without_numbers(module: torch.nn.Module, name: str, value: torch.nn.Parameter) -> torch.nn.Parameter | None:
        if threading.get_ident() != here:
            return None
        return torch.nn.Parameter(value.to("meta"), requires_grad=False)

    with _HOOKED:
        handle = register_module_parameter_registration_hook(without_numbers)  # type: ignore[arg-type]
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch start from ``seed`` inside, and go on afterwards as if nothing had been drawn.

    Those of CUDA devices too where they are in use; a device that is not is not touched.
    """
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count())) if used else []):
        torch.default_generator.manual_seed(seed)
        if used:
            torch.cuda.manual_seed_all(seed)
        yield
