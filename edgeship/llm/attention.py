"""Attention through transformers' own interface: one function that every engine's form is a setting of.

transformers looks up attention and masks by ``config._attn_implementation``, so a model runs here as its authors wrote
it, and only how scores and masks are computed is ours. Who computes them is an `Engine`; the innermost one that is
entered answers, so that what lowers a model holds whatever a step needs of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from edgeship.compat.transformers_attention import own_attention, register_attention
from edgeship.llm.real_numbers import RealNumbers

if TYPE_CHECKING:
    from edgeship.core.decoder import AttentionCall

NAME = "edgeship"
# The same, for steps whose attention hides tokens by itself: transformers makes no masks for it.
UNMASKED = "edgeship_unmasked"
# Vanishes in a softmax; a score added to it stays finite in float16. Minus infinity breaks Hexagon and float16 both.
MASK = -1e4

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Asked:
    """One attention as a model asks for it.

    Args:
        layer: the number by which a layer names itself, where it has one.
        query: ``[1, heads, T, D]``. key, value: ``[1, kv_heads, L, D]``.
        mask: ``[1, 1 or heads, T, L]``, added to the scores; None lets every token see every other.
        scaling: of scores. softcap: ``tanh(score / softcap) * softcap``. sinks: a score a head that mixes nothing.
        bias: by position, ``[1, heads, T, L]``, added to the scores.
        direct: whether torch's own function was asked for it.
        own: computes the same as the model's own file writes it, in plain operators; None where that is not known.
    """

    layer: int | None
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    bias: torch.Tensor | None
    own: Callable[[], torch.Tensor] | None = None
    direct: bool = False


def matmul_transposed(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``[1, H, T, D]`` and ``[1, H, L, D]`` to ``[1, H, T, L]``."""
    return torch.matmul(rows, keys.transpose(2, 3))


@dataclass(frozen=True)
class Form:
    """How an engine likes attention to be written. The numbers are the same in every form.

    Args:
        scaled: what the scale multiplies: scores, queries, or queries once those of a group are rows of one product.
            Large queries overflow float16 when scores are scaled.
        product: of rows of queries ``[1, H, T, D]`` and keys ``[1, H, L, D]``.
        one_row: a mask of one token is added as it is; else it is repeated for the heads of a group too.
    """

    scaled: Literal["scores", "queries", "rows"] = "scores"
    product: Product = matmul_transposed
    one_row: bool = False


PLAIN = Form()


def grouped(asked: Asked, form: Form = PLAIN) -> torch.Tensor:
    """Attention without repeating keys and values: the query heads of a group are rows of one product.

    Returns:
        ``[1, T, heads, D]``.
    """
    query, key, value = asked.query, asked.key, asked.value
    heads, tokens, width = (int(size) for size in query.shape[1:])
    kv_heads = int(key.shape[1])
    group = heads // kv_heads
    if form.scaled == "queries":
        query = query * asked.scaling
    # [1, heads, T, D] -> [1, kv_heads, group * T, D]
    rows = query.reshape(1, kv_heads, group * tokens, width)
    if form.scaled == "rows":
        rows = rows * asked.scaling
    scores = form.product(rows, key)
    if form.scaled == "scores":
        scores = scores * asked.scaling
    if asked.softcap is not None:
        scores = torch.tanh(scores / asked.softcap) * asked.softcap
    if asked.bias is not None:
        scores = scores + asked.bias.reshape(1, kv_heads, group * tokens, -1)
    if asked.mask is not None:
        if asked.mask.shape[1] != 1:
            # One for each head: [1, heads, T, L] -> [1, kv_heads, group * T, L]
            scores = scores + asked.mask.reshape(1, kv_heads, group * tokens, -1)
        else:
            scores = scores + (asked.mask if form.one_row and tokens == 1 else asked.mask.repeat(1, 1, group, 1))
    if asked.sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        # [heads] -> [1, kv_heads, group * T, 1]
        sinks = asked.sinks.reshape(1, kv_heads, group, 1).expand(1, kv_heads, group, tokens)
        column = sinks.reshape(1, kv_heads, group * tokens, 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    mixed = torch.matmul(weights, value)
    return mixed.reshape(1, heads, tokens, value.shape[-1]).transpose(1, 2)


def repeated(asked: Asked) -> torch.Tensor:
    """As `grouped`, with keys and values repeated for each query head: for numbers of tokens that are free."""
    group = asked.query.shape[1] // asked.key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) if group > 1 else part for part in (asked.key, asked.value))
    scores = torch.matmul(asked.query, key.transpose(2, 3)) * asked.scaling
    if asked.softcap is not None:
        scores = torch.tanh(scores / asked.softcap) * asked.softcap
    for added in (asked.bias, asked.mask):
        if added is not None:
            scores = scores + added
    if asked.sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        # [heads] -> [1, heads, T, 1]
        column = asked.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(weights, value).transpose(1, 2)


class Engine:
    """Who computes attention and masks while a model runs: in plain operators, unless a subclass does otherwise.

    Args:
        calls: what is known of the attentions, in order; the model's own function computes those that are not
            understood. Empty when nothing is known: all are computed here.
        form: how scores are written.
    """

    def __init__(self, calls: Sequence[AttentionCall] = (), form: Form = PLAIN) -> None:
        self.calls, self.form = tuple(calls), form
        self.count = 0

    def next_call(self) -> AttentionCall | None:
        """What is known of the attention that is asked for now."""
        call = self.calls[self.count] if self.count < len(self.calls) else None
        self.count += 1
        return call

    def attend(self, asked: Asked) -> torch.Tensor:
        """``[1, T, heads, D]`` of one attention."""
        call = self.next_call()
        if call is not None and call.own and asked.own is not None:
            return asked.own()
        return grouped(asked, self.form)

    def mask(self, **asked: Any) -> torch.Tensor | None:
        """The mask of a kind of layers; see `additive_mask` for what is asked."""
        return additive_mask(**asked)


_engines: list[Engine] = []


@contextmanager
def computed_by(engine: Engine) -> Iterator[Engine]:
    """Let an engine compute what a model asks for inside the block. A forward inside it is one step."""
    engine.count = 0
    _engines.append(engine)
    try:
        with _InRealOperators():
            yield engine
    finally:
        _engines.pop()


class _InRealOperators(RealNumbers):
    """Layers that attend in code of their own by torch's one function for it ask the engine too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and _engines:
            return _attend_as_torch(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _attend_as_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, ``[1, heads, T, D]``."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, MASK)
    engine = _engines[-1]
    if is_causal and attn_mask is None:
        attn_mask = engine.mask(
            q_length=query.shape[2], kv_length=key.shape[2], mask_function=lambda b, h, query, key: key <= query
        )
    scaling = query.shape[-1] ** -0.5 if scale is None else scale
    return engine.attend(Asked(None, query, key, value, attn_mask, scaling, None, None, None, direct=True)).transpose(
        1, 2
    )


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: ``[1, T, heads, D]`` and no weights.

    Args:
        indices: places ``[1, T, k]`` of the keys that each token was given to choose among.
    """
    if indices is not None:
        attention_mask = _chosen(indices, int(query.shape[2]), key.shape[2], attention_mask)
    written = own_attention(module)
    given = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
    settings = {**others, **{name: setting for name, setting in given.items() if setting is not None}}

    def own() -> torch.Tensor:
        assert written is not None
        mixed: torch.Tensor = written(module, query, key, value, attention_mask, **settings)[0]
        return mixed

    asked = Asked(
        getattr(module, "layer_idx", None),
        query,
        key,
        value,
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap,
        s_aux,
        position_bias,
        None if written is None else own,
    )
    engine = _engines[-1] if _engines else Engine()
    # Layers view the heads as one row, as transformers' own functions leave them.
    return engine.attend(asked).contiguous(), None


def _chosen(indices: torch.Tensor, tokens: int, length: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """A mask ``[1, 1, T, L]`` that also hides the keys that are not among ``indices`` [1, T, k]."""
    hidden = torch.full((1, tokens, length), MASK).scatter(-1, indices.long(), 0.0)[:, None]
    return hidden if mask is None else torch.minimum(mask, hidden)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor | None:
    engine = _engines[-1] if _engines else Engine()
    return engine.mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
    )


def register() -> None:
    """Make our names for attention known to transformers. Safe to call again."""
    register_attention(NAME, _attend, _mask)
    register_attention(UNMASKED, _attend)


def additive_mask(
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """A mask ``[1, 1, q_length, kv_length]``: 0 where a token may look, -1e4 where not.

    Args:
        q_offset: position of the first query; a tensor when it is known only at run time.
        mask_function: ``(batch, head, query position, key position) -> bool``: causal, or within a sliding window.
        attention_mask: ``[1, kv_length]``: keys that count, where the text is shorter than its tensor.
    """
    queries = torch.arange(q_length)[:, None] + q_offset
    keys = torch.arange(kv_length)[None, :] + kv_offset
    seen = mask_function(0, 0, queries, keys)
    if attention_mask is not None:
        seen = seen & attention_mask.bool()
    return torch.where(seen, 0.0, MASK)[None, None]
