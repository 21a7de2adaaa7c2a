"""Scaled dot-product attention (iOS 18)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("scaled_dot_product_attention")
def scaled_dot_product_attention(call: Call) -> Outputs:
    """``softmax(Q K^T / sqrt(E) + mask) V``; where a bool mask is false, nothing is attended to."""
    query, key, value = (call.floats(name) for name in ("query", "key", "value"))
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    if call.has("attn_mask"):
        mask = call.numbers("attn_mask")
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1), value)
