"""How far the original's own answers move when its values are rounded: what no arithmetic of that width can do better.

Inputs that no app gives, a thousand times too large, say, can drive a network to where it decides between nearly equal
values; there another rounding is another answer, and comparing says nothing. So the float program is run once more
with every value that it computes moved by a random share of the width asked about (Higham 2002, Accuracy and
Stability of Numerical Algorithms, chapter 1: the condition of the problem bounds what any algorithm reaches).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from edgeship.core.records import from_plain, to_plain
from edgeship.program.answers import Answers

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch.fx import Node

    from edgeship.program.program import TorchProgram

    Array = npt.NDArray[Any]

# Half a unit in the last place, relative: float32, float16, 8-bit integers.
UNIT: dict[str, float] = {"f32": 2.0**-23, "f16": 2.0**-11, "int16": 2.0**-11, "int8": 2.0**-8, "dynamic": 2.0**-8}
LARGEST_HALF = 65504.0
WeightMoves = Literal["share", "step"] | None


@dataclass(frozen=True)
class Peak:
    """The largest value that the program reaches, and the operator that makes it; squares that are summed at once are
    left out, since every lowering scales them."""

    node: str = ""
    operator: str = ""
    value: float = 0.0


class Trembling:
    """The float program with every value moved by up to a share of itself, the same way in every run of one seed.

    Args:
        program: what is asked; its activation grids, if any, are left out.
        kept: what other steps of the build have asked it.
    """

    def __init__(self, program: TorchProgram, kept: Answers | None = None) -> None:
        self._program, self._signature = program, program.signature
        self._kept = kept or Answers(None)

    @cached_property
    def _module(self) -> Any:
        return self._program.filled().module()

    @cached_property
    def _normed(self) -> set[Node]:
        return _inside_norms(self._module.graph)

    def run(
        self, inputs: Mapping[str, Array], unit: float, *, weights: WeightMoves = None, seed: int = 0
    ) -> tuple[dict[str, Array], Peak]:
        """Outputs by name, and where the program is largest.

        Args:
            unit: relative, see `UNIT`.
            weights: whether weights are moved too: by a ``share`` of themselves, or by up to half a ``step`` of their
                row's 8-bit grid, as another rounding to it would.
            seed: of the shares.
        """

        def make() -> tuple[dict[str, Array], str]:
            outputs, peak = self._run(inputs, unit, weights, seed)
            return outputs, json.dumps(to_plain(peak))

        outputs, peak = self._kept.of(inputs, make, "moved", unit, weights, seed)
        return outputs, from_plain(Peak, json.loads(peak))

    def _run(
        self, inputs: Mapping[str, Array], unit: float, weights: WeightMoves, seed: int
    ) -> tuple[dict[str, Array], Peak]:
        import numpy as np
        import torch

        normed, peak = self._normed, Peak()
        generator = torch.Generator().manual_seed(seed)

        def moved(value: torch.Tensor) -> torch.Tensor:
            """Each number moved at random by at most ``unit`` of itself; any shape."""
            noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
            if not value.is_contiguous():
                # Views behind it count on its strides.
                noise = torch.empty_like(value).copy_(noise)
            # value * (1 + unit * (2 * noise - 1)), in the one new tensor
            return noise.mul_(2).sub_(1).mul_(unit).add_(1).mul_(value)

        def rounded(value: torch.Tensor) -> torch.Tensor:
            """Each weight [rows, ...] moved at random by at most half a step of 1/127 of the largest in its row."""
            # [rows, ...] -> [rows, 1, ...]
            step = value.abs().amax(tuple(range(1, value.dim())), keepdim=True) / 127
            noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
            return noise.sub_(0.5).mul_(step).add_(value)

        class Moving(torch.fx.Interpreter):
            def run_node(self, n: Node) -> Any:
                nonlocal peak
                value = super().run_node(n)
                if weights and n.op == "get_attr" and _is_float(value) and value.dim() > 1:
                    return moved(value) if weights == "share" else rounded(value)
                if n.op not in ("placeholder", "call_function") or not _is_float(value) or _is_moving(n):
                    return value
                largest = _largest(value)
                if largest > peak.value and n not in normed:
                    peak = Peak(n.name, str(getattr(n.target, "__name__", n.target)).split(".")[0], largest)
                return moved(value)

        tensors = [torch.from_numpy(np.asarray(inputs[spec.name], order="C")) for spec in self._signature.inputs]
        with torch.no_grad():
            results = Moving(self._module).run(*tensors)
        outputs = self._signature.outputs
        return {spec.name: result.numpy() for spec, result in zip(outputs, results, strict=True)}, peak


def _largest(value: torch.Tensor) -> float:
    """The largest finite magnitude in a tensor of any shape; 0 where there is none."""
    import torch

    if not value.numel():
        return 0.0
    low, high = (float(end) for end in torch.aminmax(value))
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    finite = value[torch.isfinite(value)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _is_float(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_moving(node: Node) -> bool:
    """Whether an operator only hands values on: rounding them again would move them twice."""
    import torch

    from edgeship.compat.torch import is_view

    if node.target in (torch.ops.aten.reshape.default, torch.ops.aten.cat.default, torch.ops.aten.clone.default):
        return True
    return is_view(node.target)


def _inside_norms(graph: Any) -> set[Node]:
    """Squares that are only summed, and the sums of them, up to the root."""
    import torch

    aten = torch.ops.aten
    summing = (aten.mean.dim, aten.sum.dim_IntList, aten.sum.default, aten.mean.default)
    guarding = (aten.add.Tensor, aten.add.Scalar, aten.clamp.default, aten.clamp_min.default, aten.maximum.default)
    found: set[Node] = set()
    for node in graph.nodes:
        summed = bool(node.users) and all(user.target in summing for user in node.users)
        if (_is_square(node) and summed) or (
            node.target in (*summing, *guarding) and any(arg in found for arg in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _is_square(node: Node) -> bool:
    import torch

    aten = torch.ops.aten
    if node.target == aten.pow.Tensor_Scalar:
        return bool(node.args[1] == 2)
    return node.target == aten.mul.Tensor and node.args[0] is node.args[1]
