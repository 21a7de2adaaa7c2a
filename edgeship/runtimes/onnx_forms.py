"""Which encodings ONNX files hold so that ONNX Runtime's CPU kernels compute exactly with them."""

from __future__ import annotations

from typing import ClassVar

from edgeship.core.encodings.family import Encoding
from edgeship.core.forms import STATIC_MODES, ActivationMode, Form, Forms, Lacks
from edgeship.core.inventory import WeightOp
from edgeship.core.weights import MXFP4, Affine, Float, Palette, Sparse

_NO_KERNEL = "ONNX Runtime's CPU has no kernel for its elements (FLOAT4E2M1); int4-g32 has as many bits"
_WIDENED = "ONNX has no form of it that stays small: it would be widened to float32 at load; use integers"


class Floats(Form[Float]):
    """Constants; float16 is widened at load."""

    family: ClassVar[type[Encoding]] = Float
    how: ClassVar[str] = "Cast"

    def resident_bits(self, op: WeightOp, encoding: Float, activations: ActivationMode) -> int:
        """Computed in float32."""
        return 32


class Integers(Form[Affine]):
    """Integers in one of four forms (docs/decisions/0007)."""

    family: ClassVar[type[Encoding]] = Affine
    how: ClassVar[str] = "MatMulNBits, GatherBlockQuantized, DequantizeLinear, or Cast and Mul (docs/decisions/0007)"

    def refusal(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
        """What its kernels do not load, or compute otherwise."""
        if op == "other":
            return "only weights of layers are stored as integers"
        if activations in STATIC_MODES and encoding.bits == 2:
            return "its integer kernels do not load with 2-bit weights"
        one_zero = encoding.bits == 8 and encoding.granularity == "tensor"
        if activations in STATIC_MODES and not encoding.symmetric and not one_zero:
            return "its integer kernels want zero point 0 in the weights, or 8 bits with one for all"
        if encoding.granularity == "group" and op not in ("linear", "embedding"):
            return "groups are for linear layers and embeddings"
        if op == "recurrent" and encoding.bits < 8:
            return "its recurrent layers compute in float, on weights that are widened at load, from 8 bits"
        return ""

    def container_bits(self, op: WeightOp, encoding: Affine) -> int:
        """Four bits for 3-bit integers: the format has none."""
        return 4 if encoding.bits == 3 else encoding.bits

    def resident_bits(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> int:
        """Layers of 8 bits with float activations are widened at load, and so are all convolutions of 8 bits that are
        not static, and recurrent layers always; rows are looked up as they are."""
        static = activations in STATIC_MODES and op != "recurrent"
        packed = op == "embedding" or static or (activations == "dynamic" and op == "linear")
        return 32 if encoding.bits == 8 and not packed else self.container_bits(op, encoding)

    def unpacks(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> bool:
        """Convolutions of 4, 3 and 2 bits, which have no kernel."""
        return encoding.bits < 8 and op not in ("linear", "embedding", "other") and activations not in STATIC_MODES


FORMS = Forms((Floats(), Integers(), Lacks(Palette, _WIDENED), Lacks(MXFP4, _NO_KERNEL), Lacks(Sparse, _WIDENED)))
