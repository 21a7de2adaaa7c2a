"""Run a float16 program on the CPU as accelerators do: products summed in float32 and rounded once.

Core AI's CPU runtime sums float16 products in float16, one by one: a hundred times slower than in float32, and some
20 dB noisier than the Neural Engine, which sums in float32. A copy of the saved program computes its matrix products
and convolutions in float32 and rounds their results to float16. Weights and all else are those of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coreai.authoring

from edgeship.compat.coreai import dialect, ir, module_of

PRODUCTS = frozenset(
    {
        "coreai.batch_matmul",
        "coreai.decomposable.broadcasting_batch_matmul",
        "coreai.conv2d",
        "coreai.conv3d",
        "coreai.conv_transpose2d",
        "coreai.conv_transpose3d",
    }
)


def runnable(asset: Path, folder: Path) -> Any:
    """The asset to run: itself, or its widened copy in ``folder`` when it multiplies in float16."""
    loaded = coreai.authoring.AIModelAsset.load(asset)
    program = loaded.program
    if not _widen(module_of(program)):
        return loaded
    return program.save_asset(folder / "widened.aimodel")


def _widen(module: Any) -> int:
    """Widen every product of a module; how many there were."""
    count = 0
    with module.context, ir.Location.unknown(module.context):
        half, single = ir.F16Type.get(), ir.F32Type.get()
        for operation in [item for item in walk(module.operation) if item.name in PRODUCTS]:
            kind = ir.RankedTensorType(operation.results[0].type)
            if kind.element_type != half:
                continue
            with ir.InsertionPoint(operation):
                operands = [_cast(value, half, single) for value in operation.operands]
                wide = ir.RankedTensorType.get(list(kind.shape), single)
                attributes = {item.name: item.attr for item in operation.attributes}
                product = ir.Operation.create(operation.name, [wide], operands, attributes)
                rounded = dialect.cast(product.results[0], half)
            operation.results[0].replace_all_uses_with(rounded)
            operation.erase()
            count += 1
    return count


def _cast(value: Any, half: Any, single: Any) -> Any:
    kind = value.type
    return dialect.cast(value, single) if getattr(kind, "element_type", None) == half else value


def walk(operation: Any) -> Iterator[Any]:
    """Every operation inside one, those of nested graphs included."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from walk(inner.operation)
