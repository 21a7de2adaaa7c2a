"""What edgeship takes from coremltools that it does not document. Written for coremltools 9.0.

It ends when `coremltools.convert` can leave the content of weights to its caller, merges only constants that are equal,
and says which torch operators it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from coremltools.converters.mil.backend.mil import helper
from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter, MILProtoExporter
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind
from coremltools.converters.mil.mil.passes.defs.cleanup.const_deduplication import const_deduplication
from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipeline, PassPipelineManager
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass
from coremltools.converters.mil.mil.scope import ScopeSource

from edgeship.compat.exchange import exchanged

__all__ = [
    "MILProtoExporter",
    "add_pass",
    "backend_pipeline",
    "debug_handles",
    "exact_conversion",
    "file_value",
    "inputs_of",
    "knows_operator",
    "model_proto",
    "run_passes",
]

NAMESPACE = "edgeship"


def knows_operator(name: str) -> bool:
    """Whether the torch front end lowers an operator: ``aten.add.Tensor``, or the name of a Python function."""
    return sanitize_op_kind(name) in _TORCH_OPS_REGISTRY


def inputs_of(context: Any, node: Any, expected: int) -> list[Any]:
    """The variables that an operator of the torch front end is given; an error when there are not so many."""
    return list(_get_inputs(context, node, expected=expected))


def debug_handles(operation: Any) -> list[Any]:
    """The ``debug_handle`` of each torch node that an operation was made of; None for one without."""
    return list(operation.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE) or [])


@contextmanager
def exact_conversion() -> Iterator[None]:
    """Inside, constants become one where they are equal; else coremltools takes 1e-12 for 0.

    Its passes draw numbers of numpy's for the patterns that they look for; afterwards numpy goes on as if they had not.
    """
    nothing = dict.fromkeys(const_deduplication.DTYPE2ATOL, 0.0)
    state = np.random.get_state()
    try:
        with exchanged(const_deduplication, "DTYPE2ATOL", nothing):
            yield
    finally:
        np.random.set_state(state)


def add_pass(name: str, kind: type) -> str:
    """Make a graph pass known under edgeship's own namespace; its whole name. Again is the same."""
    whole = f"{NAMESPACE}::{name}"
    if whole not in PASS_REGISTRY:
        register_pass(namespace=NAMESPACE, name=name)(kind)
    return whole


def backend_pipeline() -> Any:
    """The passes that coremltools runs before it writes an mlprogram."""
    return PassPipeline.get_pipeline("backend_mlprogram")


def run_passes(program: Any, pipeline: Any) -> None:
    """Run a `coremltools.PassPipeline` on a MIL program, in place."""
    PassPipelineManager.apply_pipeline(program, pipeline)


def file_value(var: Any, file_name: str, offset: int) -> Any:
    """The protobuf that says that a constant lies in a weight file, from a byte on."""
    return helper.create_file_value_tensor(
        file_name=file_name,
        offset=offset,
        dim=var.val.shape,
        data_type=helper.types_to_proto_primitive(var.sym_type.get_primitive()),
    )


def model_proto(program: Any, written: Any, version: int) -> Any:
    """The ``Model`` protobuf of a MIL program, around what `MILProtoExporter` wrote of it.

    Args:
        version: of the specification.
    """
    exporter = CoreMLProtoExporter(program, written, "", "", None, "mlprogram", "milinternal", version)
    return exporter.export(version)
