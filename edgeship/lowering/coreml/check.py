"""Whether layers rebuilt from their parts answer as the model does that they were taken from."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgeship.core.decoder import AttentionLayer
from edgeship.errors import LoweringError
from edgeship.llm.models import build_hollow
from edgeship.lowering.coreml.neural import NeuralStep
from edgeship.lowering.coreml.parts import GENERIC, find_roles, layers_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeship.lowering.coreml.parts import Parts, Roles

# Few tokens, and a window that they leave. The longest part goes through a chunk, the rest one by one.
TOKENS, CHUNK, CONTEXT, WINDOW, VOCABULARY = 12, 8, 16, 5, 64
# Of the largest logit; float32 in another order of sums.
TOLERANCE = 1e-3


def checked_roles(config: Any, sizes: Sequence[AttentionLayer]) -> list[Roles]:
    """The parts of every layer, compared with the model on the configuration's own layers, one of each kind, with
    random weights and a small vocabulary.

    Weights of full size take no memory: each is a random vector read from another place for every row.

    Raises:
        LoweringError: the layers have other parts, or those give other answers.
    """
    small = copy.deepcopy(config)
    small.vocab_size = VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    if getattr(small, "sliding_window", None) is not None:
        small.sliding_window = WINDOW
    model = build_hollow(small)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = _random(tuple(parameter.shape), generator)
    tokens = torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator)
    narrowed = [AttentionLayer(s.heads, s.kv_heads, s.head_dim, None if s.window is None else WINDOW) for s in sizes]
    layers = layers_of(model)
    roles = find_roles(model, narrowed, tokens)
    del layers[_enough([role.of(layer) for role, layer in zip(roles, layers, strict=True)], narrowed) :]
    parts = [role.of(layer) for role, layer in zip(roles, layers, strict=False)]
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits[0, CHUNK:]
        found = _through_steps(model, parts, narrowed[: len(layers)], tokens)
    error = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-9))
    if not error <= TOLERANCE:
        raise LoweringError(
            f"the layers rebuilt for the Neural Engine give other answers than {type(model).__name__} ({error:.1e})",
            fix=GENERIC,
        )
    return roles


def _enough(parts: Sequence[Parts], sizes: Sequence[AttentionLayer]) -> int:
    """How many layers from the first on hold every kind that there is, and at least two."""

    def kind(i: int) -> tuple[Any, ...]:
        linears = (*parts[i].projections, parts[i].out, *parts[i].inner, parts[i].down)
        plain = [
            value if value is None or isinstance(value, (int, float, str)) else type(value)
            for value in vars(parts[i]).values()
        ]
        return (sizes[i], *plain, *(linear.weight.shape for linear in linears))

    first: dict[tuple[Any, ...], int] = {}
    for i in range(len(parts)):
        first.setdefault(kind(i), i)
    return max(2, 1 + max(first.values()))


def _through_steps(
    model: nn.Module, parts: Sequence[Parts], sizes: Sequence[AttentionLayer], tokens: torch.Tensor
) -> torch.Tensor:
    steps = [
        NeuralStep(model, parts, sizes, CONTEXT, range(len(sizes)), logits=logits).eval() for logits in (False, True)
    ]
    prefill, decode = steps
    prefill(tokens[:, :CHUNK], torch.zeros(1, dtype=torch.int32))
    state = {name: value for name, value in prefill.named_buffers() if "_cache_" in name}
    for name, value in decode.named_buffers():
        if name in state:
            value.copy_(state[name])
    rows = [decode(tokens[:, i : i + 1], torch.tensor([i], dtype=torch.int32))[0, 0] for i in range(CHUNK, TOKENS)]
    return torch.stack(rows)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Different rows without memory for them: each begins one number later than the row before."""
    if len(shape) == 1:
        return 1 + 0.2 * torch.randn(shape, generator=generator)
    if len(shape) != 2:
        return torch.randn(shape, generator=generator)
    values = torch.randn(sum(shape), generator=generator) * shape[1] ** -0.5
    return torch.as_strided(values, shape, (1, 1))
