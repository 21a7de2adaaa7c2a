"""How much of each layer is pruned, so that the whole loses a given share of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeship.compression.allocate import Option, allocate
from edgeship.core.weights import Float, FloatTensor

if TYPE_CHECKING:
    import torch

    from edgeship.compression.walk import Layer
    from edgeship.program.program import TorchProgram

LEVELS = 20
# No layer is emptied: a level of 0 means whole, one of 19 that a twentieth is kept.
_HIGHEST = LEVELS - 1


def global_shares(scores: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, float]:
    """Shares under one threshold over all layers, each layer's scores divided by their mean.

    Scores have the shapes of their weights.
    """
    import torch

    relative = {name: (score / score.mean().clamp(min=1e-30)).flatten() for name, score in scores.items()}
    everything = torch.cat(list(relative.values()))
    count = max(1, round(sparsity * everything.numel()))
    threshold = everything.kthvalue(min(count, everything.numel())).values
    shares = {name: float((score <= threshold).float().mean()) for name, score in relative.items()}
    return {name: min(share, _HIGHEST / LEVELS) for name, share in shares.items()}


def measured_shares(
    program: TorchProgram,
    sizes: Mapping[str, int],
    sparsity: float,
    prune: Callable[[str, float, Layer | None], torch.Tensor],
    batches: Sequence[Mapping[str, Any]],
    samples: int,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, float]:
    """Shares, in steps of a twentieth, whose measured losses sum to the least while ``sparsity`` of all is zero.

    Losses are the noise at the outputs with one layer pruned at a time (`edgeship.compression.sensitivity`); the sum is
    made smallest as an integer programme.

    Args:
        sizes: numbers in each weight that may be pruned.
        prune: (name, share, the layer as it is met) -> the weight as it will be with that share pruned.
        samples: how many of the batches losses are taken on.
    """
    from edgeship.compression.sensitivity import measure_sensitivity

    def ways(name: str) -> Callable[[Layer | None], Iterator[FloatTensor]]:
        return lambda layer: (FloatTensor(prune(name, level / LEVELS, layer).numpy()) for level in range(LEVELS))

    names = list(sizes)
    measured = measure_sensitivity(
        program,
        ((name, ways(name)) for name in names),
        batches,
        lambda name: progress(names.index(name), len(names), name),
        samples,
    )
    layers: dict[str, list[Option]] = {}
    for name, options in measured.items():
        # What is counted is weights that stay; the encoding says nothing here.
        layers[name] = [
            Option(Float(16), sizes[name] - round(sizes[name] * level / LEVELS), option.loss)
            for level, option in enumerate(options)
        ]
    total = sum(sizes.values())
    found = allocate(layers, total - round(sparsity * total))
    picked = {name: layers[name].index(option) for name, option in found.chosen.items()}
    return {name: level / LEVELS for name, level in picked.items()}
