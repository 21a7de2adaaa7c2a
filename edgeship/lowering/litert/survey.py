"""Count what a finished model is made of, for the report."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from edgeship.lowering.litert.flatbuffer import builtin_code

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema


def survey(model: schema.ModelT) -> dict[str, str]:
    """Operator counts: all, and those that only move data (TRANSPOSE) or restore floats (DEQUANTIZE)."""
    from ai_edge_litert import schema_py_generated as schema

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    counts = Counter(names[builtin_code(model, item)] for graph in model.subgraphs for item in graph.operators)
    return {
        "operators": str(sum(counts.values())),
        "transposes": str(counts["TRANSPOSE"]),
        "dequantizes": str(counts["DEQUANTIZE"]),
    }
