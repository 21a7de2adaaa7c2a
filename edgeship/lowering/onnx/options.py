"""Session options that an app must set so that ONNX Runtime computes what was decided.

By default ONNX Runtime rounds the *activations* of every ``DequantizeLinear -> MatMul`` to int8 while running (accuracy
level 4, about 45 dB). That is what ``dynamic`` asks for, and not what ``float`` asks for. Measured for a 1024 x 1024
linear on one x86 core, one row (128 rows): float32 0.06 ms (2.9 ms), and

  - 8 bits: dynamic 0.03 (1.8); float by accuracy level 1: 1.7 (13); float by folding the weights at load: 0.06 (2.9);
  - 4 bits: dynamic 0.03 (2.2); float by accuracy level 1: 0.08 (3.0).

So 8-bit weights with float activations are widened at load, at float32's speed and memory; 4-bit ones stay packed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgeship.core.runtimes import ActivationMode
from edgeship.core.weights import Affine

if TYPE_CHECKING:
    from edgeship.core.weights import Encoding

ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
FOLD_WEIGHTS = "session.disable_quant_qdq"


def session_options(encodings: Iterable[Encoding], static: bool, activations: ActivationMode) -> dict[str, str]:
    """Session configuration entries for a model with these weight encodings.

    Args:
        encodings: of the weights that compression decided.
        static: whether activations have static integers.
        activations: what the profile chose.
    """
    integers = [encoding for encoding in encodings if isinstance(encoding, Affine)]
    if not integers:
        return {}
    if activations == "dynamic" and not static:
        return {ACCURACY_LEVEL: "4"}
    if not static and any(encoding.bits == 8 for encoding in integers):
        return {FOLD_WEIGHTS: "1"}
    return {ACCURACY_LEVEL: "1"}
