"""Static grids of activations, as a saved package holds them.

The lowering names the two operations of each grid after the activation. Core ML's converter may drop one of them: where
an operation takes integers, the restored value before it and the quantize operation after it go, and its integers get
the name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from edgeship.core.weights import ActivationEncoding
from edgeship.errors import ArtifactError
from edgeship.runtimes.coreml.program import Constant, Reference, load_program

if TYPE_CHECKING:
    from pathlib import Path

    from edgeship.runtimes.coreml.program import Operand, Operation

# Converters add what they cast to, and a number to a name that is there twice.
_NAMED = re.compile(r"(.+)__(?:int8|restored)(?:_cast_fp16|_to_fp16)*(?:_\d+)?")


def activation_grids(package: Path) -> dict[str, ActivationEncoding]:
    """Graph node -> its grid, of the package's default function.

    Raises:
        ArtifactError: an activation has two grids, or one that is no int8 grid.
    """
    program = load_program(package)
    constants: dict[str, Operand] = {}
    grids: dict[str, ActivationEncoding] = {}
    found: dict[str, ActivationEncoding] = {}
    for operation in program.functions[program.default_function].block.walk():
        grid = None
        if operation.kind == "const":
            constants[operation.outputs[0].name] = operation.inputs["val"][0]
        elif operation.kind in ("quantize", "dequantize"):
            grid = _grid(package, operation, constants)
        elif operation.outputs and operation.outputs[0].type.dtype == "int8":
            # Views of integers keep the grid of what they view.
            given = (operand for operands in operation.inputs.values() for operand in operands)
            grid = next(
                (grids[item.name] for item in given if isinstance(item, Reference) and item.name in grids), None
            )
        if grid is None:
            continue
        name = operation.outputs[0].name
        if operation.kind != "dequantize":
            grids[name] = grid
        named = _NAMED.fullmatch(name)
        if named is not None and found.setdefault(named.group(1), grid) != grid:
            raise ArtifactError(f"{package} has two grids for activation {named.group(1)}", fix="build it again")
    return found


def _grid(package: Path, operation: Operation, constants: dict[str, Operand]) -> ActivationEncoding | None:
    """None for grids that are no activation's: one number for each channel, or unsigned."""

    def number(name: str) -> float | None:
        operand = operation.inputs.get(name, (None,))[0]
        if isinstance(operand, Reference):
            operand = constants.get(operand.name)
        value = operand.read() if isinstance(operand, Constant) else 0
        array = np.asarray(value)
        return float(array.reshape(())) if array.size == 1 and array.dtype.kind in "fiu" else None

    scale, zero = number("scale"), number("zero_point")
    if scale is None or zero is None:
        return None
    if not scale > 0:
        raise ArtifactError(f"{package}: {operation.label} has the scale {scale}", fix="build it again")
    return ActivationEncoding(8, scale, int(zero))
