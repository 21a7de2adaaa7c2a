"""Attention, as the fused call where its masks are plain, else as the specification writes it out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.registry import Result, op

Tensor = torch.Tensor


@op("Attention", since=23)
def attention(call: OpCall) -> Result:
    """Y alone, from float inputs without a softcap: scaled dot product attention."""
    q, k, v = call.x(0), call.x(1), call.x(2)
    mask = call.optional(3)
    causal = bool(call.attr_int("is_causal", 0))
    plain = (
        not any(call.given(index) for index in (4, 5, 6))
        and not any(call.wants(index) for index in (1, 2, 3))
        and call.attr_float("softcap", 0.0) == 0.0
        and call.attr_int("left_window_size", -1) < 0
        and call.attr_int("right_window_size", -1) < 0
        and q.dtype == torch.float32
        and not (causal and mask is not None)
        and not (causal and q.shape[-2] != k.shape[-2])
    )
    if not plain or (mask is not None and not _broadcasts(mask, q, k)):
        return call.expand()
    merged = q.dim() == 3
    if merged:
        q_heads, kv_heads = call.attr_int("q_num_heads"), call.attr_int("kv_num_heads")
        q, k, v = _split_heads(q, q_heads), _split_heads(k, kv_heads), _split_heads(v, kv_heads)
    scale = call.attr_float("scale") if call.has("scale") else None
    grouped = q.shape[1] != k.shape[1]
    if grouped:
        k, v = (torch.repeat_interleave(t, q.shape[1] // t.shape[1], 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    if merged:
        y = torch.reshape(torch.transpose(y, 1, 2), (y.shape[0], y.shape[2], y.shape[1] * y.shape[3]))
    return y


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads * width] -> [batch, heads, length, width]."""
    batch, length, width = x.shape
    return torch.transpose(torch.reshape(x, (batch, length, heads, width // heads)), 1, 2)


def _broadcasts(mask: Tensor, q: Tensor, k: Tensor) -> bool:
    """ONNX lets a mask be shorter than the keys; that case is written out. ``mask`` [..., queries or 1, keys]."""
    return mask.shape[-1] == k.shape[-2] and mask.shape[-2] in (1, q.shape[-2])
