"""What the processor under the tests can do."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import pytest


@cache
def sums_pairs_in_16_bits() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 overflow here: x86 with AVX2 and without VNNI."""
    flags = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not flags.is_file():
        return False
    return "vnni" not in flags.read_text(encoding="utf-8")


needs_exact_products = pytest.mark.skipif(
    sums_pairs_in_16_bits(),
    reason="ONNX Runtime cuts off sums of uint8 and int8 products on processors without VNNI, and no option helps here",
)
