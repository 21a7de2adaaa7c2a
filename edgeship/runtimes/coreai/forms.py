"""Which encodings Core AI holds; asked while planning and again while lowering.

Every form that is not refused was written, read back and run (tests/lowering/coreai). Some of them Apple's own
converter (coreai-torch 0.4.3) never writes, though the dialect describes them and the runtime computes them: palettes
of 3 bits, and zeros left out of palettes and of integers below 8 bits.
"""

from __future__ import annotations

from edgeship.core.inventory import WeightOp
from edgeship.core.runtimes import ActivationMode
from edgeship.core.weights import Affine, Encoding, Sparse
from edgeship.runtimes.apple import weight_refusal


def refusal(op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
    """Empty when Core AI holds this weight exactly; else why not, and what it has instead."""
    if activations == "int16":
        return "Core AI refuses int16 activations"
    if activations == "dynamic":
        return "Core AI has no dynamic activations from torch"
    return weight_refusal(op, encoding)


def container_bits(encoding: Encoding) -> int:
    """Bits of one weight in the file: there are no 3-bit integers, and 4 bits hold them exactly."""
    inner = encoding.inner if isinstance(encoding, Sparse) else encoding
    return 4 if isinstance(inner, Affine) and inner.bits == 3 else encoding.bits
