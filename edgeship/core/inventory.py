"""What a program is made of: its weights by use, and what each operator costs. Made once at load, read by planner,
size check and estimate without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WeightOp = Literal["linear", "conv", "depthwise_conv", "conv_transpose", "embedding", "recurrent", "other"]


@dataclass(frozen=True)
class WeightUse:
    """One weight and the operator that consumes it.

    Args:
        channel_axis: axis of output channels (0 for linear, conv and embedding; 1 for transposed convolutions).
        op: ``recurrent`` for the products of an LSTM, GRU or RNN, which are read at every step; ``other`` for biases,
            norms and anything that must stay float.
        groups: groups of a convolution. nodes: the operators that read it.
        looked_up: rows of it are looked up (an embedding), whatever else it does.
        plain_bits: of one number of what is no float and stays as it is (masks, indices); 0 for floats.
        given: short name of the encoding that the source stores it in; empty where it stores floats.
    """

    name: str
    op: WeightOp
    shape: tuple[int, ...]
    channel_axis: int = 0
    groups: int = 1
    nodes: tuple[str, ...] = ()
    looked_up: bool = False
    plain_bits: int = 0
    given: str = ""

    @property
    def elements(self) -> int:
        """Number of scalars."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def bits_unencoded(self, *, halves: bool) -> int:
        """Bits of one number in a file when nothing encodes it; ``halves``: the runtime computes in float16."""
        if self.plain_bits:
            return min(self.plain_bits, 32) if halves else self.plain_bits
        return 16 if halves else 32


@dataclass(frozen=True)
class OpCost:
    """One operator of the normalised graph: arithmetic in multiply-accumulates, traffic in elements."""

    name: str
    op: str
    macs: int
    elements_in: int
    elements_out: int
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """Weights, operators and the largest sum of live activations, in elements, of one program.

    ``activations`` is how the source itself computes them where it is quantized (``int8``, ``int16``, ``dynamic``),
    else empty.
    """

    weights: tuple[WeightUse, ...]
    ops: tuple[OpCost, ...]
    peak_activation_elements: int
    activations: str = ""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        return sum(op.macs for op in self.ops)

    @property
    def parameters(self) -> int:
        """Scalars in all weights."""
        return sum(weight.elements for weight in self.weights)

    def weight(self, name: str) -> WeightUse:
        """The use of one weight by name."""
        return next(weight for weight in self.weights if weight.name == name)
