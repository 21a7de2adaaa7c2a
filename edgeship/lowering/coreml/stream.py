"""Write an mlprogram whose weights are places without content: each is read, written into the package, and forgotten.

coremltools keeps a whole program in memory and writes it into a temporary folder that it copies twice. Its exporter is
used here (``MILProtoExporter``, ``CoreMLProtoExporter`` and ``weight_id`` of coremltools 9.0), with the content of each
constant from elsewhere, straight into the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from coremltools.converters.mil.mil import Program, types

from edgeship.compat.coremltools import MILProtoExporter, file_value, model_proto
from edgeship.errors import LoweringError
from edgeship.lowering.coreml.package import write_package
from edgeship.lowering.coreml.places import PART, Piece, Reader, parts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgeship.core.weights import Array, EncodedTensor

WEIGHTS = "@model_path/weights/weight.bin"


def write(
    functions: Mapping[str, Any],
    pieces: Mapping[str, Piece],
    read: Reader,
    path: Path,
    version: int,
    facts: Mapping[str, str],
) -> None:
    """Write a package of several functions that share their weights.

    Args:
        functions: name -> program with one function; the first is the package's own.
        pieces: what the places in them stand for, by stored name.
        read: a weight by name, its floats in the width that the program has.
        version: of the specification. facts: strings for the package's metadata.
    """
    program = Program()
    for name, unit in functions.items():
        program.add_function(name, unit.functions["main"])
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = True
    weights = path / "Data" / "com.apple.CoreML" / "weights"
    weights.mkdir(parents=True)
    exporter = _Exporter(program, str(weights), version, pieces, read)
    written = exporter.export()
    exporter.blob_writers.clear()
    write_package(model_proto(program, written, version), path, facts)


class _Exporter(MILProtoExporter):  # type: ignore[misc]
    """coremltools' exporter, that asks for the content of a constant when its turn comes."""

    def __init__(self, program: Any, folder: str, version: int, pieces: Mapping[str, Piece], read: Reader) -> None:
        super().__init__(program, folder, version)
        self._pieces, self._read = pieces, read
        # Of one weight there may be many pieces, one after the other.
        self._kept: tuple[str, EncodedTensor] | None = None

    def create_file_value(self, var: Any) -> Any:
        """Where the content of ``var`` lies in the weight file; equal constants lie there once."""
        content: Array | None = None
        key = var.op.weight_id
        if key is None:
            content = np.ascontiguousarray(var.val)
            kind = types.builtin_to_string(var.dtype)
            key = f"{kind}{content.shape}{hashlib.sha256(content.tobytes()).hexdigest()}"
        if key not in self.weight_id_to_file_value:
            if content is None:
                content = self._part(key, var.val)
            writer = self.get_blob_writer(self.get_weight_path(var.op))
            offset = _written(content, types.builtin_to_string(var.dtype), writer)
            self.weight_id_to_file_value[key] = file_value(var, WEIGHTS, offset)
        return self.weight_id_to_file_value[key]

    def _part(self, key: str, place: Array) -> Array:
        name, _, part = key.rpartition(PART)
        piece = self._pieces[name]
        if self._kept is None or self._kept[0] != piece.weight:
            self._kept = None
            self._kept = (piece.weight, self._read(piece.weight))
        content = parts(self._kept[1], piece)[part]
        if content.size != place.size:
            raise LoweringError(f"{name} has {content.size} numbers for {place.size} places", fix="report it")
        return content


def _written(content: Array, kind: str, writer: Any) -> int:
    """Append to the weight file; the offset of the record."""
    flat = np.ascontiguousarray(content).reshape(-1)
    if kind in ("fp16", "fp32"):
        flat = flat.astype(np.float16 if kind == "fp16" else np.float32, copy=False)
        if kind == "fp16":
            flat = flat.view(np.uint16)
    put: Callable[[Array], int] = getattr(writer, f"write_{ {'fp32': 'float'}.get(kind, kind) }_data")
    return put(flat)
