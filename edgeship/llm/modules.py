"""Put a transformers decoder into plain modules: linear layers are ``nn.Linear``, experts are apart, attention goes
through the interface. What it computes does not change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn


def make_plain(model: nn.Module) -> dict[str, str]:
    """Replace in place what converters and compression would not recognise as a layer.

    Works on hollow weights too: what is stored otherwise than it is used is only noted.

    Returns:
        Names of weights that lie transposed in checkpoints: name -> ``transposed``.
    """
    transposed: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind == "Conv1D":
            _replace(model, name, _linear_of(module.weight.T, module.bias))
            transposed[f"{name}.weight"] = "transposed"
        elif kind == "FalconLinear":
            _replace(model, name, _linear_of(module.weight, module.bias))
        elif kind == "FalconAttention":
            setattr(module, "forward", _falcon_forward.__get__(module))  # noqa: B010
        elif isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            _replace(model, name, Experts(module))
    return transposed


class Experts(nn.Module):
    """A layer's experts with their weights apart, each used on every token and weighted by the router.

    Args:
        fused: transformers' experts: ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        count = fused.gate_up_proj.shape[0]
        self.gate_up = nn.ModuleList(_linear_of(fused.gate_up_proj[i], None) for i in range(count))
        self.down = nn.ModuleList(_linear_of(fused.down_proj[i], None) for i in range(count))
        self.act_fn = fused.act_fn

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``hidden`` [T, H], the chosen experts ``index`` [T, k] and their ``weights`` [T, k]."""
        shares = []
        for i, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            share = torch.where(index == i, weights, 0.0).sum(-1, keepdim=True)
            gate, up = gate_up(hidden).chunk(2, dim=-1)
            shares.append(share * down(self.act_fn(gate) * up))
        return cast("torch.Tensor", sum(shares[1:], shares[0]))


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that attend, by the layer index they carry."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int) and "ttention" in type(module).__name__:
            yield name, module


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


def _falcon_forward(
    self: Any,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    layer_past: Any = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Falcon computes attention inside its module; this is the same through transformers' interface."""
    import sys

    from transformers import AttentionInterface

    from edgeship.errors import UnsupportedOpError

    if alibi is not None:
        raise UnsupportedOpError("Falcon with ALiBi biases has no form here", fix="use a Falcon with rotary positions")
    fused = self.query_key_value(hidden_states)
    if self.new_decoder_architecture:
        groups = self.num_heads // self.num_kv_heads + 2
        parts = fused.view(*fused.shape[:2], -1, groups, self.head_dim)
        query = parts[:, :, :, :-2].flatten(2, 3)
        key, value = parts[:, :, :, -2], parts[:, :, :, -1]
    else:
        query, key, value = self._split_heads(fused)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if position_embeddings is not None:
        rotate = cast("Any", sys.modules[type(self).__module__]).apply_rotary_pos_emb
        query, key = rotate(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    attend = AttentionInterface()[self.config._attn_implementation]
    mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)
    return self.dense(mixed.reshape(*mixed.shape[:2], -1)), None
