"""Where a mixture of experts chooses by a hair: there rounding takes another expert, and the answer is another one.

Such a position says nothing of the arithmetic, in either direction. A router's values are what ``topk`` reads, a row
for each position of the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

# How close two experts may lie, as a share of what lies between a row's ends, before rounding decides between them. By
# the arithmetic; each is some times the error that the float16 and integer engines make in a router's input.
WITHIN: dict[str, float] = {"f32": 1e-4, "f16": 1e-2, "int16": 1e-2, "int8": 1e-1, "dynamic": 1e-1}


def undecided(module: Any, inputs: Sequence[torch.Tensor], within: float) -> npt.NDArray[Any]:
    """Whether the last chosen and the first left out lie ``within`` of each other, for each position; ``[T]``.

    Args:
        module: a program's graph module for texts; None when it cannot be run as a whole.
        inputs: the first is the text, ``[1, T]``.
    """
    import numpy as np
    import torch

    tokens = int(inputs[0].shape[-1])
    close = np.zeros(tokens, bool)
    if module is None or not chooses(module.graph):
        return close

    class Looking(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if _is_choice(n):
                source, count = cast("tuple[torch.fx.Node, int]", n.args[:2])
                values = self.env[source]
                largest = len(n.args) < 4 or bool(n.args[3])
                rows = (values if largest else -values).reshape(-1, values.shape[-1])
                if rows.shape[0] == tokens and rows.shape[1] > count:
                    # Groups of experts that are out of the question are masked with minus infinity.
                    least = rows.masked_fill(rows.isinf(), torch.inf).amin(-1)
                    best = rows.sort(-1, descending=True).values
                    margin = best[:, count - 1] - best[:, count]
                    close[(margin < within * (best[:, 0] - least)).numpy()] = True
            return super().run_node(n)

    with torch.no_grad():
        Looking(module).run(*inputs)
    return close


def chooses(graph: Any) -> bool:
    """Whether anything in a program's graph takes the best of some."""
    return any(_is_choice(node) for node in graph.nodes)


def _is_choice(node: Any) -> bool:
    return node.op == "call_function" and str(getattr(node.target, "__name__", "")).startswith("topk")
