"""Layers of transformers as one operator each, as ONNX Runtime's transformer optimizer and its quantizers write them.

Specification: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.ops.linear import linear_weight
from edgeship.frontends.onnx.ops.quantization import restored, restored_input
from edgeship.frontends.onnx.registry import Result, op

Tensor = torch.Tensor

_MS = "com.microsoft"
_MASKED = -10000.0


@op("Attention", domain=_MS)
def attention(call: OpCall) -> Result:
    """Self-attention with its projections: input, weights [in, 3 * hidden], bias, mask, past, a sum on the scores."""
    if call.attr_int("do_rotary", 0) or call.attr_int("past_present_share_buffer", 0):
        raise call.refuse("rotations and shared buffers inside it are not imported")
    sizes = call.attr_ints("qkv_hidden_sizes", ())
    # [batch, length, in] -> [batch, length, 3 * hidden]
    projected = F.linear(call.x(0), linear_weight(call, call.weight(1)), call.optional_weight(2))
    return _attend(call, projected, sizes, mask=call.optional(3), past=call.optional(4), added=call.optional(5))


@op("QAttention", domain=_MS)
def quantized_attention(call: OpCall) -> Result:
    """The same with an integer input and integer weights; scales and zero points are inputs 3, 4, 6 and 7."""
    if call.attr_int("do_rotary", 0) or call.attr_int("past_present_share_buffer", 0):
        raise call.refuse("rotations and shared buffers inside it are not imported")
    x = restored_input(call, 0, 3, 6)
    matrix = restored(call, 1, axis=1, scale=4, zero=7)
    call.constants.mark_weight(matrix)
    projected = F.linear(x, linear_weight(call, matrix), call.weight(2))
    return _attend(call, projected, (), mask=call.optional(5), past=call.optional(8), added=None)


@op("MultiHeadAttention", domain=_MS)
def multi_head_attention(call: OpCall) -> Result:
    """Attention of queries, keys and values that are projected already, each [batch, length, heads * width]."""
    if any(call.given(index) for index in (6, 7, 8, 9)) or any(call.wants(index) for index in (1, 2, 3)):
        raise call.refuse("caches of keys and values are not imported", fix="export the model without a cache")
    if not call.given(1) or not call.given(2) or call.x(0).dim() != 3 or call.x(1).dim() != 3:
        raise call.refuse("packed or transposed keys and values are not imported")
    parts = [call.x(index) for index in range(3)]
    if call.given(3):
        widths = [part.shape[-1] for part in parts]
        parts = [torch.add(part, bias) for part, bias in zip(parts, torch.split(call.x(3), widths), strict=True)]
    heads = call.attr_int("num_heads")
    q, k, v = (_split_heads(part, heads) for part in parts)
    scores = _scores(call, q, k, call.optional(4), call.optional(5))
    return _merged(torch.matmul(torch.softmax(scores, -1), v))


def _attend(
    call: OpCall, projected: Tensor, sizes: list[int] | tuple[int, ...], *, mask: Tensor | None, past: Tensor | None,
    added: Tensor | None,
) -> Result:  # fmt: skip
    """[batch, length, q + k + v] -> [batch, length, v], and keys and values [2, batch, heads, length, width]."""
    heads = call.attr_int("num_heads")
    widths = list(sizes) or [projected.shape[-1] // 3] * 3
    q, k, v = (_split_heads(part, heads) for part in torch.split(projected, widths, -1))
    if past is not None:
        k, v = (torch.cat((past[place], part), 2) for place, part in enumerate((k, v)))
    scores = _scores(call, q, k, mask, added)
    output = _merged(torch.matmul(torch.softmax(scores, -1), v))
    return (output, torch.stack((k, v), 0)) if call.wants(1) else output


def _scores(call: OpCall, q: Tensor, k: Tensor, mask: Tensor | None, added: Tensor | None) -> Tensor:
    """[batch, heads, queries, width] x [batch, heads, keys, width] -> [batch, heads, queries, keys]."""
    scale = call.attr_float("scale", 0.0) or 1.0 / math.sqrt(q.shape[-1])
    scores = torch.mul(torch.matmul(q, torch.transpose(k, -1, -2)), scale)
    queries, keys = q.shape[-2], k.shape[-2]
    hidden = call.attr_float("mask_filter_value", _MASKED)
    if mask is not None:
        scores = torch.add(scores, _mask(call, mask, q.shape[0], keys, hidden))
    if call.attr_int("unidirectional", 0):
        later = torch.ones(queries, keys).triu(keys - queries + 1).bool()
        scores = torch.masked_fill(scores, later, torch.finfo(torch.float32).min)
    return scores if added is None else torch.add(scores, added)


def _mask(call: OpCall, mask: Tensor, batch: int, keys: int, hidden: float) -> Tensor:
    """What is added to the scores [batch, heads, queries, keys] where a key is hidden."""
    if mask.dim() == 1:
        places = torch.arange(keys)
        # [batch] ends, or ends and then starts
        end = torch.reshape(mask[:batch], (batch, 1))
        seen = torch.lt(places, end)
        if mask.shape[0] == 2 * batch:
            seen = torch.logical_and(seen, torch.ge(places, torch.reshape(mask[batch:], (batch, 1))))
        elif mask.shape[0] != batch:
            raise call.refuse(f"a mask of shape {list(mask.shape)} is not imported")
        seen = torch.reshape(seen, (batch, 1, 1, keys))
    elif mask.dim() == 2:
        seen = torch.reshape(torch.ne(mask, 0), (mask.shape[0], 1, 1, mask.shape[1]))
    elif mask.dim() == 3:
        seen = torch.unsqueeze(torch.ne(mask, 0), 1)
    else:
        raise call.refuse(f"a mask of {mask.dim()} dimensions is not imported")
    return torch.where(seen, torch.zeros(()), torch.full((), hidden))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads * width] -> [batch, heads, length, width]."""
    batch, length, width = x.shape
    return torch.transpose(torch.reshape(x, (batch, length, heads, width // heads)), 1, 2)


def _merged(x: Tensor) -> Tensor:
    """[batch, heads, length, width] -> [batch, length, heads * width]."""
    batch, heads, length, width = x.shape
    return torch.reshape(torch.transpose(x, 1, 2), (batch, length, heads * width))


@op("EmbedLayerNormalization", domain=_MS)
def embed_layer_norm(call: OpCall) -> Result:
    """Words, positions and segments summed and normalised; where a mask is given, how many places it counts."""
    ids = call.x(0)
    total = F.embedding(ids.to(torch.int64), call.weight(2))
    positions = call.optional(8)
    table = call.weight(3)
    if positions is None:
        total = torch.add(total, table[: ids.shape[-1]])
    else:
        total = torch.add(total, F.embedding(positions.to(torch.int64), table))
    if call.given(1) and call.given(4):
        total = torch.add(total, F.embedding(call.x(1).to(torch.int64), call.weight(4)))
    return _normalised(call, total, call.weight(5), call.weight(6), call.optional(7))


@op("QEmbedLayerNormalization", domain=_MS)
def quantized_embed_layer_norm(call: OpCall) -> Result:
    """The same with tables, scale and shift in integers; scales are inputs 8 to 12, zero points 13 to 17."""
    words, positions, gamma, beta = (_table(call, index) for index in (2, 3, 5, 6))
    ids = call.x(0)
    total = torch.add(F.embedding(ids.to(torch.int64), words), positions[: ids.shape[-1]])
    if call.given(1) and call.given(4):
        total = torch.add(total, F.embedding(call.x(1).to(torch.int64), _table(call, 4)))
    return _normalised(call, total, gamma, beta, call.optional(7))


def _table(call: OpCall, index: int) -> Tensor:
    """One of the five integer constants as the float weight that it is. In its own shape."""
    value = restored(call, index, scale=index + 6, zero=index + 11)
    call.constants.mark_weight(value)
    return value


def _normalised(call: OpCall, total: Tensor, gamma: Tensor | None, beta: Tensor | None, mask: Tensor | None) -> Result:
    """[batch, length, hidden], the places that count [batch], and the sum before the norm."""
    output = F.layer_norm(total, (total.shape[-1],), gamma, beta, call.attr_float("epsilon", 1e-12))
    counted = torch.zeros(total.shape[0], dtype=torch.int32)
    if mask is not None:
        counted = torch.sum(mask.to(torch.int32), 1, dtype=torch.int32)
    return output, counted, total
