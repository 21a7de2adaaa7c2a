"""Whether inputs drive a program beyond the ranges that its static grids were calibrated for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch.fx import Node

    from edgeship.program.program import TorchProgram

    Array = npt.NDArray[Any]

# Calibration may clip the tails of what it saw; what lies this many grid widths outside was not in its data.
WIDTHS = 1.0
# A mask's values are far below every grid on purpose.
MASKED = -1e4
_CLIPPING = ("relu", "hardtanh", "clamp")


class Saturation:
    """A program with static activations, run in float to see which values leave their grids.

    Args:
        program: its weights are read once, whatever number of inputs is asked about.
    """

    def __init__(self, program: TorchProgram) -> None:
        self._signature, self._grids = program.signature, program.activations
        self._module = program.filled().module()

    def beyond(self, inputs: Mapping[str, Array]) -> str:
        """Where a value leaves its grid by more than its width, in words; empty when none does."""
        import numpy as np
        import torch

        grids = self._grids
        found = ""

        class Watching(torch.fx.Interpreter):
            def run_node(self, n: Node) -> Any:
                nonlocal found
                value = super().run_node(n)
                grid = grids.get(n.name)
                if found or grid is None or not isinstance(value, torch.Tensor) or _is_clipped(n):
                    return value
                low, high = (grid.low - grid.zero_point) * grid.scale, (grid.high - grid.zero_point) * grid.scale
                room = WIDTHS * (high - low)
                lowest, highest = float(value.min()), float(value.max())
                if highest > high + room or MASKED < lowest < low - room:
                    end = highest if highest > high + room else lowest
                    found = f"{n.name} reaches {end:.3g}, its grid holds {low:.3g} to {high:.3g}"
                return value

        tensors = [torch.from_numpy(np.asarray(inputs[spec.name], order="C")) for spec in self._signature.inputs]
        with torch.no_grad():
            Watching(self._module).run(*tensors)
        return found


def _is_clipped(node: Node) -> bool:
    """Whether all that reads it clips: a ReLU's input is on the ReLU's grid, which is the ReLU."""
    names = [str(getattr(user.target, "__name__", "")) for user in node.users]
    return bool(names) and all(name.startswith(_CLIPPING) for name in names)
