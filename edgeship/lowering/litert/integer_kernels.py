"""LiteRT's integer kernels that answer as the quantized reference does, within a step of their output's grid or two.

An operator that is not in these tables computes in float between DEQUANTIZE and QUANTIZE. Rows were measured against
the reference, in int8 and int16 (`tests/lowering/litert/test_integer.py` measures them again).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from edgeship.core.weights import ActivationEncoding

# Operators that only move numbers, or pick some of them: any grid, the same on both sides. Their data's input slot.
MOVERS: dict[str, int] = {
    "TRANSPOSE": 0, "RESHAPE": 0, "SQUEEZE": 0, "EXPAND_DIMS": 0, "SLICE": 0, "STRIDED_SLICE": 0, "SPLIT": 1,
    "UNPACK": 0, "PAD": 0, "GATHER": 0, "TILE": 0, "BROADCAST_TO": 0, "DEPTH_TO_SPACE": 0, "SPACE_TO_DEPTH": 0,
    "MAX_POOL_2D": 0, "REDUCE_MAX": 0, "RESIZE_NEAREST_NEIGHBOR": 0, "PADV2": 0, "MIRROR_PAD": 0, "REVERSE_V2": 0,
    "GATHER_ND": 0,
}  # fmt: skip

# Operators that can clip their own output: a RELU on the same grid joins them.
CLIPPERS = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "SUB", "MUL", "AVERAGE_POOL_2D"}
CLIPS = {"RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}

WEIGHTED: dict[str, tuple[int, int, int]] = {
    "CONV_2D": (0, 1, 2), "DEPTHWISE_CONV_2D": (0, 1, 2), "FULLY_CONNECTED": (0, 1, 2), "TRANSPOSE_CONV": (2, 1, 3),
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """An integer kernel.

    Args:
        slots: inputs that are activations; None means all. The others stay as they are.
        widths: bits of activations it takes.
        same_grid: whether every input must be on the output's grid (others are requantized first).
        fixed: ``unit`` or ``signed``: the output's grid is 0..1 or -1..1 and no other.
    """

    slots: tuple[int, ...] | None = (0,)
    widths: tuple[int, ...] = (8, 16)
    same_grid: bool = False
    fixed: str = ""


KERNELS: dict[str, Kernel] = {
    "ADD": Kernel((0, 1)),
    "SUB": Kernel((0, 1)),
    "MUL": Kernel((0, 1)),
    "SQUARED_DIFFERENCE": Kernel((0, 1), (8,)),
    "BATCH_MATMUL": Kernel((0, 1)),
    "AVERAGE_POOL_2D": Kernel(same_grid=True),
    "MEAN": Kernel(),
    "SUM": Kernel(),
    "CONCATENATION": Kernel(None, same_grid=True),
    "PACK": Kernel(None, same_grid=True),
    "MINIMUM": Kernel((0, 1), same_grid=True),
    "MAXIMUM": Kernel((0, 1), same_grid=True),
    "SELECT_V2": Kernel((1, 2), same_grid=True),
    "RESIZE_BILINEAR": Kernel(same_grid=True),
    "SELECT": Kernel((1, 2), same_grid=True),
    "RELU": Kernel(),
    "ABS": Kernel(),
    "RELU6": Kernel(),
    "LEAKY_RELU": Kernel(),
    "ELU": Kernel(widths=(8,)),
    "HARD_SWISH": Kernel(widths=(8,)),
    "GELU": Kernel(widths=(8,)),
    "EXP": Kernel(),
    "RSQRT": Kernel(widths=(8,)),
    "SOFTMAX": Kernel(fixed="unit"),
    "LOGISTIC": Kernel(fixed="unit"),
    "TANH": Kernel(fixed="signed"),
}

FIXED_GRIDS: dict[tuple[str, int], ActivationEncoding] = {
    ("unit", 8): ActivationEncoding(8, 1 / 256, -128),
    ("signed", 8): ActivationEncoding(8, 1 / 128, 0),
    ("unit", 16): ActivationEncoding(16, 1 / 32768, 0),
    ("signed", 16): ActivationEncoding(16, 1 / 32768, 0),
}

# The operator version from which a kernel takes integers (int8, int16), as the format's own version table has it.
VERSIONS: dict[str, tuple[int, int]] = {
    "CONV_2D": (3, 4), "DEPTHWISE_CONV_2D": (3, 5), "FULLY_CONNECTED": (5, 7), "TRANSPOSE_CONV": (3, 3),
    "ADD": (2, 4), "SUB": (2, 5), "MUL": (2, 4), "BATCH_MATMUL": (2, 3), "SQUARED_DIFFERENCE": (2, 2),
    "AVERAGE_POOL_2D": (2, 3), "MAX_POOL_2D": (2, 3), "MEAN": (2, 3), "SUM": (2, 2), "REDUCE_MAX": (2, 3),
    "CONCATENATION": (2, 3), "PACK": (2, 3), "MINIMUM": (2, 4), "MAXIMUM": (2, 4), "RESIZE_BILINEAR": (2, 3),
    "RESIZE_NEAREST_NEIGHBOR": (2, 4), "RELU": (2, 3), "RELU6": (2, 3), "LEAKY_RELU": (2, 2), "EXP": (2, 2),
    "RSQRT": (2, 3), "GELU": (2, 2), "SOFTMAX": (2, 3), "LOGISTIC": (2, 3), "TANH": (2, 3), "TRANSPOSE": (2, 4),
    "SLICE": (2, 4), "STRIDED_SLICE": (2, 4), "SPLIT": (2, 4), "UNPACK": (2, 4), "PAD": (2, 3), "GATHER": (2, 4),
    "TILE": (3, 3), "BROADCAST_TO": (2, 3), "DEPTH_TO_SPACE": (2, 2), "SPACE_TO_DEPTH": (2, 2), "QUANTIZE": (2, 2),
    "DEQUANTIZE": (2, 3), "MIRROR_PAD": (2, 3), "REVERSE_V2": (3, 3), "GATHER_ND": (2, 3), "ABS": (2, 2),
    "PADV2": (2, 2),
}  # fmt: skip


@functools.cache
def operator_names() -> dict[int, str]:
    """Builtin operator number -> its name in the schema."""
    from ai_edge_litert import schema_py_generated as schema

    return {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
