"""Put a transformers decoder into plain modules: linear layers are ``nn.Linear``, experts are apart. What a module is
is found by asking it: each replacement is compared with what it replaces, on random weights of its own shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from edgeship.compat.transformers_attention import gate_of
from edgeship.llm.probing import answers_alike, random_tensor

# Rows of a probe: enough that no two experts are chosen alike.
ROWS = 5
EXPERT_WEIGHTS = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}


def make_plain(model: nn.Module) -> dict[str, str]:
    """Replace in place what converters and compression would not recognise as a layer.

    Works on hollow weights too: what is stored otherwise than it is used is only noted.

    Returns:
        Names of weights that lie transposed in checkpoints: name -> ``transposed``.
    """
    transposed: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        turned = is_product(module)
        if turned is not None:
            _replace(model, name, _linear_of(module.weight.T if turned else module.weight, module.bias))  # type: ignore[arg-type, union-attr, operator]
            if turned:
                transposed[f"{name}.weight"] = "transposed"
        elif holds_experts(module):
            apart = experts_of(module)
            if apart is not None:
                _replace(model, name, apart)
    return transposed


def is_product(module: nn.Module) -> bool | None:
    """Whether a module of another class than ``nn.Linear`` computes ``x weight^T + bias`` (False) or ``x weight +
    bias`` (True); None when it does neither."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if plain or isinstance(module, nn.Embedding) or list(module.children()):
        return None
    held = dict(module.named_parameters(recurse=False))
    weight, bias = held.get("weight"), held.get("bias")
    if weight is None or weight.dim() != 2 or not set(held) <= {"weight", "bias"}:
        return None
    if type(module).forward is nn.Module.forward:
        return None
    # What a square matrix does shows only on numbers.
    for turned in (False, True):
        inner = int(weight.shape[0] if turned else weight.shape[1])
        out = int(weight.shape[1] if turned else weight.shape[0])
        if bias is not None and tuple(bias.shape) != (out,):
            continue

        def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, turned: bool = turned) -> Any:
            return nn.functional.linear(x, weight.T if turned else weight, bias)

        values = {name: random_tensor(tuple(parameter.shape)) for name, parameter in held.items()}
        x = random_tensor((1, ROWS, inner), seed=1)
        if answers_alike(module, values, (x,), product(x, values["weight"], values.get("bias"))):
            return turned
    return None


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts, one behind the other."""
    held = dict(module.named_parameters(recurse=False))
    inner = held.get("gate_up_proj", held.get("up_proj"))
    down = held.get("down_proj")
    return (
        set(held) <= EXPERT_WEIGHTS
        and inner is not None
        and down is not None
        and inner.dim() == 3
        and down.dim() == 3
        and inner.shape[0] >= down.shape[0]
    )


class Experts(nn.Module):
    """A layer's experts with their weights apart, each used on every token and weighted by the router.

    Where there are more first than second products, the experts without the latter give what they are given.

    Args:
        weights: ``gate_up_proj`` (or ``up_proj``) ``[E, I, H]`` and ``down_proj`` ``[E, H, J]``, perhaps with biases
            ``[E, I]`` and ``[E, H]``.
        turned: whether each matrix lies as ``[in, out]``.
        activation: of the gate, which then multiplies the rest, or of all where there is no gate.
        gate: of what the first product gives, instead.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], turned: bool, activation: Any, gate: Any = None) -> None:
        super().__init__()
        self.gated = "gate_up_proj" in weights
        inner = "gate_up_proj" if self.gated else "up_proj"
        count = int(weights["down_proj"].shape[0])
        self.idle = int(weights[inner].shape[0]) - count
        self.gate_up = nn.ModuleList(_layers(weights[inner][:count], weights.get(f"{inner}_bias"), turned))
        self.down = nn.ModuleList(_layers(weights["down_proj"], weights.get("down_proj_bias"), turned))
        self.act_fn, self.gate = activation, gate

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``hidden`` [T, H], the chosen experts ``index`` [T, k] and their ``weights`` [T, k]."""
        shares = []
        for i, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            share = torch.where(index == i, weights, 0.0).sum(-1, keepdim=True)
            shares.append(share * down(self._mixed(gate_up, hidden)))
        if self.idle:
            shares.append(torch.where(index >= len(self.down), weights, 0.0).sum(-1, keepdim=True) * hidden)
        return cast("torch.Tensor", sum(shares[1:], shares[0]))

    def _mixed(self, gate_up: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if self.gate is not None:
            return self.gate(gate_up(hidden))  # type: ignore[no-any-return]
        if not self.gated:
            return self.act_fn(gate_up(hidden))  # type: ignore[no-any-return]
        gate, up = gate_up(hidden).chunk(2, dim=-1)
        return self.act_fn(gate) * up  # type: ignore[no-any-return]


def experts_of(fused: nn.Module) -> Experts | None:
    """The experts of a module apart, once they answer as it does on random weights; None when none of the forms that
    are known here does."""
    held = dict(fused.named_parameters(recurse=False))
    values = {name: random_tensor(tuple(parameter.shape)) for name, parameter in held.items()}
    activation, own = getattr(fused, "act_fn", None), gate_of(fused)
    gates: list[tuple[Any, Any]] = [(activation, None)] if activation is not None else []
    if own is not None:
        gates.append((None, own))
    for turned in (False, True):
        if not _fits(held, turned):
            continue
        for activation, gate in gates:
            if _answers_as(fused, values, Experts(values, turned, activation, gate)):
                return Experts(held, turned, activation, gate)
    return None


def _fits(held: Mapping[str, torch.Tensor], turned: bool) -> bool:
    """Whether two products fit one behind the other so."""
    inner = held.get("gate_up_proj", held.get("up_proj"))
    down = held["down_proj"]
    assert inner is not None
    width, out = (inner.shape[1], inner.shape[2]) if turned else (inner.shape[2], inner.shape[1])
    taken, given = (down.shape[1], down.shape[2]) if turned else (down.shape[2], down.shape[1])
    return bool(width == given and out in (taken, 2 * taken))


def _answers_as(fused: nn.Module, values: Mapping[str, torch.Tensor], apart: Experts) -> bool:
    """With some experts for each token, as they are chosen in a model."""
    count = len(apart.gate_up) + apart.idle
    hidden = random_tensor((ROWS, cast("nn.Linear", apart.gate_up[0]).in_features), seed=1)
    chosen = min(2, count)
    index = torch.stack([(torch.arange(ROWS) + k) % count for k in range(chosen)], -1)
    weights = torch.rand((ROWS, chosen), generator=torch.Generator().manual_seed(2))
    try:
        with torch.no_grad():
            wanted = apart(hidden, index, weights)
    except Exception:  # a gate may be anything, and raise anything
        return False
    return answers_alike(fused, values, (hidden, index, weights), wanted)


def _layers(weight: torch.Tensor, bias: torch.Tensor | None, turned: bool) -> list[nn.Linear]:
    """``[E, out, in]``, or ``[E, in, out]`` when ``turned``, as linear layers."""
    return [
        _linear_of(weight[i].T if turned else weight[i], None if bias is None else bias[i])
        for i in range(weight.shape[0])
    ]


def _linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    out, inner = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(inner, out, bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
