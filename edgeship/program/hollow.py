"""The exported graph for converters that are given encoded weights apart: their places are stride-0 tensors.

A converter then never drags float copies of the weights through its stages; peak memory is that of the encoded weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.compat.torch import replaced
from edgeship.core.weights import FloatTensor
from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Graph

    from edgeship.program.program import TorchProgram

# A mask needs no more than this to vanish in a softmax, and a score added to it stays finite in float16.
MASK = -1e4
FLOAT16_MAX = 65504.0


def hollow(
    program: TorchProgram, dtype: torch.dtype, *, for_float16: bool = False, keep_floats: bool = False
) -> ExportedProgram:
    """A copy of the exported program whose encoded weights are stride-0 placeholders.

    Args:
        program: not changed; the copy shares its graph.
        dtype: of the placeholders and of the weights that were not encoded.
        for_float16: make those weights fit float16: masks filled with float32's smallest number become -1e4.
        keep_floats: weights encoded as floats keep their values, for converters that take only integers apart.

    Raises:
        LoweringError: a weight is larger than float16's 65504.
    """
    state: dict[str, torch.Tensor] = {}
    for name, old in program.exported.state_dict.items():
        tied = program.record.aliases.get(name, name)
        tensor = program.encoded.get(tied)
        if tensor is not None and not (keep_floats and isinstance(tensor, FloatTensor)):
            value = torch.zeros((), dtype=dtype).expand(old.shape)
        else:
            value = program.weight(tied)
            if value.is_floating_point():
                value = (_fitted(tied, value) if for_float16 else value).to(dtype)
        state[name] = torch.nn.Parameter(value, requires_grad=False) if isinstance(old, torch.nn.Parameter) else value
    return replaced(program.exported, state_dict=state)


def _fitted(name: str, value: torch.Tensor) -> torch.Tensor:
    """A mask in float16's range; any shape."""
    if bool((value > FLOAT16_MAX).any()):
        raise LoweringError(
            f"{name} has values beyond float16's {FLOAT16_MAX:g}",
            fix="compute in float32 (--set lower/...compute=float32)",
        )
    return torch.where(value < -FLOAT16_MAX, MASK, value)


def fit_scalars(graph: Graph) -> None:
    """Replace numbers below float16's range in the graph's arguments, which fill masks, by -1e4."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = tuple(MASK if isinstance(item, float) and item < -FLOAT16_MAX else item for item in node.args)
