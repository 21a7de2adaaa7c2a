"""What the model loses by each layer's encoding: noise over signal at its outputs, one layer changed at a time.

As in HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680), but taken on the outputs themselves: the losses of several layers
add, as independent noise does. The model is walked once, and each way to store a layer is run from that layer on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from edgeship.compression.allocate import Option
from edgeship.compression.held import Batches
from edgeship.compression.walk import Layer, Operators, walk
from edgeship.errors import DataError

if TYPE_CHECKING:
    import torch

    from edgeship.core.weights import EncodedTensor
    from edgeship.program.program import TorchProgram

# The ways to store a weight; or what makes them from the layer as it is met (None: no operator reads it with data).
Ways: TypeAlias = "Iterable[EncodedTensor] | Callable[[Layer | None], Iterable[EncodedTensor]]"


def measure_sensitivity(
    program: TorchProgram,
    candidates: Iterable[tuple[str, Ways]],
    batches: Sequence[Mapping[str, Any]],
    progress: Callable[[str], None] = lambda what: None,
    held_out: int = 0,
) -> dict[str, list[Option]]:
    """Bytes and loss of every candidate.

    Args:
        candidates: (weight name, the ways it could be stored); taken one at a time, so that a generator holds one.
        batches: inputs by name, NumPy.
        held_out: how many of the batches, spread evenly, losses are taken on, and layers do not see: half of them at
            most. GPTQ fits what it sees, so its losses there say too little. 0 takes losses on all, which layers see.

    Returns:
        Weight name -> one option a candidate; ``loss`` is noise power over signal power, summed over float outputs.

    Raises:
        DataError: no batches, or a reference that says nothing.
    """
    import torch

    ways = dict(candidates)
    operators = Operators(program, batches)
    count = min(held_out, len(batches) // 2)
    numbers = [index * len(batches) // count for index in range(count)] or list(range(len(batches)))
    seen = [number for number in range(len(batches)) if number not in numbers] or numbers
    found: dict[str, list[Option]] = {}
    with torch.no_grad():
        wanted = operators.answers(0, operators.inputs(numbers), {})
        signal = sum(float(item.double().square().sum()) for outputs in wanted for item in outputs)
        if signal <= 0:
            raise DataError("the model answers zero on the calibration data", fix="give data that it can answer")

        def option(tensor: EncodedTensor, answers: Callable[[torch.Tensor], list[list[torch.Tensor]]]) -> Option:
            """Bytes and loss of one way to store the weight, in the weight's own shape."""
            made = answers(torch.from_numpy(tensor.dequantize().copy()))
            return Option(tensor.encoding, tensor.stored_bytes, _noise(made, wanted) / signal)

        def visit(layer: Layer) -> None:
            name = layer.use.name
            if name not in ways:
                return
            progress(name)
            answers = layer.answers
            assert answers is not None, "the walk is asked for them"
            shown = replace(layer, inputs=Batches(len(seen), lambda index: layer.inputs[seen[index]]))
            found[name] = [
                option(tensor, lambda weight: answers(weight, numbers)) for tensor in _made(ways[name], shown)
            ]

        walk(program, batches, visit, answers=True)
        for name in ways:
            if name in found:
                continue
            progress(name)

            def from_the_start(weight: torch.Tensor, name: str = name) -> list[list[torch.Tensor]]:
                """The outputs of the whole model with ``weight``, in its own shape, in place of the float one."""
                return operators.answers(0, operators.inputs(numbers), {name: weight})

            found[name] = [option(tensor, from_the_start) for tensor in _made(ways[name], None)]
    return {name: found[name] for name in ways}


def worst_first(losses: Mapping[str, float]) -> list[str]:
    """Layers in the order of what they cost, the worst first; ties by name."""
    return sorted(losses, key=lambda name: (-losses[name], name))


def _made(ways: Ways, layer: Layer | None) -> Iterable[EncodedTensor]:
    return ways(layer) if callable(ways) else ways


def _noise(made: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]]) -> float:
    """The squared error summed over all batches and float outputs; two lists of one shape."""
    pairs = [pair for outputs in zip(made, wanted, strict=True) for pair in zip(*outputs, strict=True)]
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
