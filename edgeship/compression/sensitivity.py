"""What the model loses by each layer's encoding: noise over signal at its outputs, one layer changed at a time.

As in HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680), but taken on the outputs themselves: the losses of several layers
add, as independent noise does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeship.compression.allocate import Option
from edgeship.errors import DataError

if TYPE_CHECKING:
    import torch

    from edgeship.core.weights import EncodedTensor
    from edgeship.program.program import TorchProgram


def measure_sensitivity(
    program: TorchProgram,
    candidates: Iterable[tuple[str, Iterable[EncodedTensor]]],
    batches: Sequence[Mapping[str, Any]],
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, list[Option]]:
    """Bytes and loss of every candidate.

    Args:
        candidates: (weight name, the ways it could be stored); taken one at a time, so that a generator holds one.
        batches: inputs by name, NumPy.

    Returns:
        Weight name -> one option a candidate; ``loss`` is noise power over signal power, summed over float outputs.

    Raises:
        DataError: no batches, or a reference that says nothing.
    """
    import torch

    if not batches:
        raise DataError("measuring sensitivity needs at least one sample", fix="give --calibration DATA")
    filled = program.filled()
    module = filled.module()
    weights = dict([*module.named_parameters(), *module.named_buffers()])
    inputs = [[torch.from_numpy(batch[spec.name].copy()) for spec in program.signature.inputs] for batch in batches]
    with torch.no_grad():
        wanted = [_floats(module(*tensors)) for tensors in inputs]
        signal = sum(float(item.double().square().sum()) for outputs in wanted for item in outputs)
        if signal <= 0:
            raise DataError("the model answers zero on the calibration data", fix="give data that it can answer")
        found: dict[str, list[Option]] = {}
        for name, tensors in candidates:
            progress(name)
            place = weights[name]
            original = place.detach().clone()
            options = []
            for tensor in tensors:
                place.copy_(torch.from_numpy(tensor.dequantize().copy()))
                noise = 0.0
                for given, reference in zip(inputs, wanted, strict=True):
                    answers = _floats(module(*given))
                    pairs = zip(answers, reference, strict=True)
                    noise += sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
                options.append(Option(tensor.encoding, tensor.stored_bytes, noise / signal))
            place.copy_(original)
            found[name] = options
    return found


def worst_first(losses: Mapping[str, float]) -> list[str]:
    """Layers in the order of what they cost, the worst first; ties by name."""
    return sorted(losses, key=lambda name: (-losses[name], name))


def _floats(outputs: Any) -> list[torch.Tensor]:
    return [item for item in outputs if item.is_floating_point()]
