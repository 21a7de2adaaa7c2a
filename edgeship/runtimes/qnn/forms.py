"""Which encodings Hexagon computes with exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from edgeship.core.encodings.family import Encoding
from edgeship.core.forms import ActivationMode, Form, Forms, Lacks
from edgeship.core.inventory import WeightOp
from edgeship.core.weights import MXFP4, Affine, Float, Palette, Sparse

GROUP_SIZES = (16, 32, 64, 128)
_NO_FORM = "Hexagon has no compressed form of it"


class Floats(Form[Float]):
    """Floats among floats: the whole graph in float16."""

    family: ClassVar[type[Encoding]] = Float
    how: ClassVar[str] = "float16 arithmetic of the whole graph"

    def refusal(self, op: WeightOp, encoding: Float, activations: ActivationMode) -> str:
        """A layer's weight is of the kind of its activations."""
        if activations == "float" or op == "other":
            return ""
        return "with integer activations Hexagon wants integer weights"


class Integers(Form[Affine]):
    """Integers in the QDQ graph, which the compiler takes as they are."""

    family: ClassVar[type[Encoding]] = Affine
    how: ClassVar[str] = "DequantizeLinear in the QDQ graph; groups as LPBQ: uint8 steps times a unit a channel"

    def refusal(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
        """Empty when Hexagon computes with exactly these integers; else why not."""
        if op == "other":
            return "biases, norms and shared tensors follow the activations"
        if activations == "float":
            return "integer weights want integer activations; profiles balanced and fast have them"
        if not encoding.symmetric and (encoding.bits != 8 or encoding.granularity != "tensor"):
            return "weights want zero point 0, or 8 bits with one for all"
        # Up to 75 steps of 65,535 in the emulator; those of linear layers are exact.
        if not encoding.symmetric and activations == "int16" and op != "linear":
            return "products of 16-bit activations with weights of another zero point than 0 are rounded"
        if encoding.bits == 2:
            return "2 bits are silently wrong on Hexagon"
        if op == "recurrent":
            fits = encoding.bits == 8 and encoding.granularity != "group"
            return "" if fits else "recurrent layers compute in float16, on weights that are widened from 8 bits"
        if op == "embedding":
            fits = encoding.bits == 8 and encoding.granularity != "group"
            return "" if fits else "rows are looked up in 8 bits, with one scale a row or a table"
        if encoding.granularity == "group":
            return _group_refusal(op, encoding, activations)
        if encoding.granularity == "tensor" and encoding.bits != 8 and op != "linear":
            return "short weights of convolutions want one scale a channel"
        return ""

    def container_bits(self, op: WeightOp, encoding: Affine) -> int:
        """8 bits, or 4 for anything shorter."""
        return 8 if encoding.bits == 8 else 4

    def scale_bits(self, encoding: Affine) -> int:
        """Scales are float32 in the file."""
        return 32


def _group_refusal(op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
    """Groups exist as multiples of a unit (`edgeship.compression.lpbq`); the lowering refuses other scales."""
    if op != "linear":
        return "groups are for linear layers; use one scale a channel"
    if encoding.bits == 8 or activations != "int16":
        return "groups are of 4-bit weights, with 16-bit activations"
    if encoding.group_size not in GROUP_SIZES:
        return f"group sizes are {', '.join(map(str, GROUP_SIZES))}"
    return ""


def refuses_scales(encoding: Encoding, options: Mapping[str, Mapping[str, Any]]) -> str:
    """Why groups are not held as they will be rounded; empty when they are, or when there are none.

    Args:
        options: ``--set`` values by pass name and field.
    """
    dense = encoding.dense
    grouped = isinstance(dense, Affine) and dense.granularity == "group"
    if not grouped or options.get("compress/quantize", {}).get("npu_block"):
        return ""
    return "scales of groups must be 1 to 15 times one a channel; add --set compress/quantize.npu_block=true"


FORMS = Forms((Floats(), Integers(), Lacks(Palette, _NO_FORM), Lacks(MXFP4, _NO_FORM), Lacks(Sparse, _NO_FORM)))
