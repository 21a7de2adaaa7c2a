"""Whether data look like what a network was trained on.

A batch norm behind the first layer remembers the mean and variance of that layer's answers in training. It is folded
away, but what it remembered is kept (`Expected`): data whose first answers are far from it were scaled in another way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.program.expected import Expected

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch.fx import GraphModule, Node

    from edgeship.program.program import TorchProgram

    Batch = Mapping[str, npt.NDArray[Any]]

# Spread of the first layer's answers over that in training: beyond WRONG it was fed other numbers, 0..255 for 0..1,
# say; beyond DOUBTFUL it may be. Means are held against the spread in training.
WRONG, DOUBTFUL = 8.0, 2.5
SAMPLES = 16


@dataclass(frozen=True)
class Look:
    """How the first layer answers, beside training.

    Args:
        layer: its weight. spread: of its answers over that in training. shift: of their mean, in spreads of training.
    """

    layer: str
    spread: float
    shift: float

    @property
    def wrong(self) -> bool:
        """Whether these data cannot be what the network was trained on."""
        return self.spread > WRONG or self.shift > WRONG or self.spread < 1 / (2 * WRONG)

    @property
    def doubtful(self) -> bool:
        """Whether they may be scaled in another way."""
        return self.spread > DOUBTFUL or self.shift > DOUBTFUL or self.spread < 1 / DOUBTFUL

    def __str__(self) -> str:
        return (
            f"the first layer ({self.layer}) answers them with {self.spread:.3g} times the spread that it had in "
            f"training, its mean {self.shift:.3g} spreads away"
        )


def first_norms(module: GraphModule) -> dict[str, Expected]:
    """What the batch norms behind the first layers remember, by the layer's weight; before they are folded.

    Norms that never saw data (mean 0, variance 1 everywhere) say nothing.
    """
    import torch

    from edgeship.program.folding import fetch

    aten = torch.ops.aten
    found: dict[str, Expected] = {}
    for norm in module.graph.nodes:
        if norm.op != "call_function" or norm.target != aten.batch_norm.default or norm.args[5]:
            continue
        layer, scale, shift, mean, variance = norm.args[:5]
        if mean is None or not _reads_input(layer):
            continue
        remembered = [fetch(module, str(node.target)).double() for node in (mean, variance)]
        if not bool(remembered[0].any()) and bool((remembered[1] == 1).all()):
            continue
        ones = torch.ones_like(remembered[0])
        std = ones if scale is None else fetch(module, str(scale.target)).double().abs()
        centre = 0 * ones if shift is None else fetch(module, str(shift.target)).double()
        found[str(layer.args[1].target)] = Expected(tuple(centre.tolist()), tuple(std.tolist()))
    return found


def _reads_input(layer: Any) -> bool:
    """Whether it is a layer with a weight of its own, and what it reads is an input but for operators without one."""
    import torch

    aten = torch.ops.aten
    targets = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)
    if layer.op != "call_function" or layer.target not in targets or layer.args[1].op != "get_attr":
        return False
    node = layer.args[0]
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return bool(node.op == "placeholder")


def look_at(program: TorchProgram, batches: Sequence[Batch]) -> Look | None:
    """The look of data by the first layer that remembers training; None where none does.

    Args:
        batches: inputs by name, of which `SAMPLES` at most are run.
    """
    import contextlib

    import numpy as np
    import torch

    if not program.record.expected or not batches:
        return None
    module = program.filled().module()
    layer = next((node for node in module.graph.nodes if _weight(node) in program.record.expected), None)
    if layer is None:
        return None
    name = _weight(layer)
    answers: list[torch.Tensor] = []

    class Listening(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n is layer:
                answers.append(value.double())
                raise StopIteration
            return value

    for batch in batches[:SAMPLES]:
        tensors = [torch.from_numpy(np.asarray(batch[spec.name], order="C")) for spec in program.signature.inputs]
        with torch.no_grad(), contextlib.suppress(StopIteration):
            Listening(module).run(*tensors)
    expected = program.record.expected[name]
    axis = -1 if layer.target == torch.ops.aten.linear.default else 1
    # [N, C, ...] -> [C, N * ...]
    rows = torch.cat([item.movedim(axis, 0).flatten(1) for item in answers], 1)
    centre, std = torch.tensor(expected.mean).double(), torch.tensor(expected.std).double().clamp(min=1e-12)
    shift = ((rows.mean(1) - centre) / std).abs().median()
    spread = (rows.std(1) / std).median()
    return Look(name, float(spread), float(shift))


def _weight(node: Node) -> str:
    """The name of the weight that a layer's second argument is; empty for other operators."""
    weight: Any = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
    return str(weight.target) if getattr(weight, "op", "") == "get_attr" else ""
