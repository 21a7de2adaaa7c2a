"""The exported graph for converters that are given encoded weights apart: their places are stride-0 tensors.

A converter then never drags float copies of the weights through its stages; peak memory is that of the encoded weights.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from edgeship.core.weights import FloatTensor
from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgeship.program.program import TorchProgram

# A mask needs no more than this to vanish in a softmax, and a score added to it stays finite in float16.
MASK = -1e4
FLOAT16_MAX = 65504.0


def hollow(program: TorchProgram, dtype: torch.dtype, *, keep_floats: bool = False) -> ExportedProgram:
    """A copy of the exported program whose encoded weights are stride-0 placeholders.

    Args:
        dtype: of the placeholders and of the weights that were not encoded.
        keep_floats: weights encoded as floats keep their values, for converters that take integers apart only.
    """
    exported = copy.copy(program.exported)
    state: dict[str, torch.Tensor] = {}
    for name, old in program.exported.state_dict.items():
        tied = program.record.aliases.get(name, name)
        tensor = program.encoded.get(tied)
        if tensor is not None and not (keep_floats and isinstance(tensor, FloatTensor)):
            value = torch.zeros((), dtype=dtype).expand(old.shape)
        else:
            value = program.weight(tied)
            value = value.to(dtype) if value.is_floating_point() else value
        state[name] = torch.nn.Parameter(value, requires_grad=False) if isinstance(old, torch.nn.Parameter) else value
    exported._state_dict = state
    return exported


def fit_float16(exported: ExportedProgram) -> None:
    """Make every number of the graph one that float16 has: masks filled with float32's smallest number become -1e4.

    Raises:
        LoweringError: a weight is larger than float16's 65504.
    """
    for name, value in exported.state_dict.items():
        if not value.is_floating_point() or (value.dim() and not any(value.stride())):
            continue
        if bool((value > FLOAT16_MAX).any()):
            raise LoweringError(
                f"{name} has values beyond float16's {FLOAT16_MAX:g}", fix="lower in float32: --set ...compute=float32"
            )
        if bool((value < -FLOAT16_MAX).any()):
            fitted = torch.where(value < -FLOAT16_MAX, MASK, value)
            parameter = isinstance(value, torch.nn.Parameter)
            exported.state_dict[name] = torch.nn.Parameter(fitted, requires_grad=False) if parameter else fitted
    for node in exported.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(
                MASK if isinstance(item, float) and item < -FLOAT16_MAX else item for item in node.args
            )
