"""Write an ONNX model: one file, or a small file and one data file when weights would pass protobuf's 2 GB."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.errors import LoweringError, OutputError

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_INLINE_BYTES = 3 * 2**29


def save_model(model: ir.Model, path: Path, *, apart: bool = False, standard: bool = True) -> tuple[str, ...]:
    """Check and write the model; weights go into a second file when they are large, or must lie ``apart``.

    ``standard`` is False for graphs with operators that ONNX Runtime has in ONNX's own domain and ONNX has not, which
    the checker refuses. Returns the names of the files, relative to the folder of ``path``.

    Raises `LoweringError` when ONNX's own checker refuses the graph, `OutputError` when the disk does.
    """
    import onnx
    import onnx_ir as ir

    graph = model.graph
    total = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    data = f"{path.stem}.data" if apart or total > MAX_INLINE_BYTES else None
    _forget_shapes(model)
    _forget_defaults(model)
    try:
        ir.save(model, path, external_data=data, size_threshold_bytes=1024, max_workers=1)
        if standard:
            onnx.checker.check_model(os.fspath(path))
    except onnx.checker.ValidationError as error:
        raise LoweringError(
            f"the ONNX checker refuses the graph: {str(error)[:300]}", fix="report this as a bug"
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot write {path.name}: {error.strerror or error}", fix="check space and permissions"
        ) from error
    return (path.name,) if data is None else (path.name, data)


def _forget_shapes(model: ir.Model) -> None:
    """Shapes between operators follow from the inputs; noting them takes a twentieth of a small model's file."""
    kept = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in kept:
                value.shape = value.type = None


def _forget_defaults(model: ir.Model) -> None:
    """Attributes that say what the standard says anyway: there is a pair of these nodes for every activation."""
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for name, default in (("axis", 1), ("block_size", 0), ("saturate", 1), ("output_dtype", 0)):
                attribute = node.attributes.get(name)
                if attribute is not None and attribute.value == default:
                    del node.attributes[name]
