"""One attention in every engine's form, against attention written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.llm.attention import MASK, Asked, Form, additive_mask, grouped, repeated
from edgeship.llm.real_numbers import RealNumbers, inverse_error

# Far from the smallest, where both types have fewer bits.
NORMAL = st.floats(2**-40, 2**30, width=32) | st.floats(-(2**30), -(2**-40), width=32)
FORMS = [Form(), Form(scaled="queries", one_row=True), Form(scaled="rows")]


def written_out(asked: Asked) -> torch.Tensor:
    """Head by head, token by token."""
    heads, tokens = asked.query.shape[1:3]
    group = heads // asked.key.shape[1]
    answer = torch.zeros(1, tokens, heads, asked.value.shape[-1])
    for head in range(heads):
        keys, values = asked.key[0, head // group], asked.value[0, head // group]
        for token in range(tokens):
            scores = keys @ asked.query[0, head, token] * asked.scaling
            if asked.softcap is not None:
                scores = asked.softcap * (scores / asked.softcap).tanh()
            if asked.bias is not None:
                scores = scores + asked.bias[0, head, token]
            if asked.mask is not None:
                scores = scores + asked.mask[0, head if asked.mask.shape[1] > 1 else 0, token]
            shares = scores.exp()
            total = shares.sum() + (0 if asked.sinks is None else asked.sinks[head].exp())
            answer[0, token, head] = (shares / total) @ values
    return answer


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=st.integers(1, 3), group=st.integers(1, 3), tokens=st.integers(1, 4), past=st.integers(0, 4),
    width=st.sampled_from([4, 6]), wide=st.sampled_from([4, 8]), softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(), bias=st.booleans(), by_head=st.booleans(), window=st.sampled_from([None, 2]),
    form=st.sampled_from(FORMS), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_form_is_attention(
    kv_heads, group, tokens, past, width, wide, softcap, sinks, bias, by_head, window, form, seed
):
    torch.manual_seed(seed)
    length, heads = tokens + past, kv_heads * group

    def hides(batch, head, query, key):
        seen = key <= query
        return seen if window is None else seen & (key > query - window)

    mask = additive_mask(tokens, length, q_offset=past, mask_function=hides)
    assert set(mask.unique().tolist()) <= {0.0, MASK}
    if by_head:
        mask = mask - torch.rand(1, heads, tokens, length)
    asked = Asked(
        0,
        torch.randn(1, heads, tokens, width),
        torch.randn(1, kv_heads, length, width),
        torch.randn(1, kv_heads, length, wide),
        mask,
        0.7,
        softcap,
        torch.randn(heads) if sinks else None,
        torch.randn(1, heads, tokens, length) if bias else None,
    )
    wanted = written_out(asked)
    assert torch.allclose(grouped(asked, form), wanted, atol=1e-5)
    assert torch.allclose(repeated(asked), wanted, atol=1e-5)


def test_complex_rotations_are_made_of_real_numbers():
    x, angles = torch.randn(2, 3, 4, 2), torch.randn(3, 4)

    def rotated():
        turn = torch.polar(torch.ones_like(angles), angles)[None] * 1.5
        return torch.view_as_real(torch.view_as_complex(x) * turn.to(x.device)).flatten(2)

    wanted = rotated()
    with RealNumbers():
        found = rotated()
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_inverse_error_function_is_torchs():
    x = torch.tensor([-0.9999, -0.95, -0.5, -1e-4, 0.0, 1e-3, 0.3, 0.9, 0.999])
    assert torch.allclose(inverse_error(x), torch.erfinv(x), rtol=2e-6, atol=1e-7)
    with RealNumbers():
        assert torch.equal(torch.erfinv(x), inverse_error(x))


@pytest.mark.parametrize("bias", [None, "mask"])
def test_torchs_own_attention_is_asked_of_the_engine(bias):
    from edgeship.llm.attention import Engine, computed_by

    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8)
    given = (
        {"is_causal": True} if bias is None else {"attn_mask": torch.ones(3, 3, dtype=torch.bool).tril()[None, None]}
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, key, **given)
    with computed_by(Engine()) as engine:
        found = torch.nn.functional.scaled_dot_product_attention(query, key, key, **given)
    assert engine.count == 1
    assert torch.allclose(found, wanted, atol=1e-5)


@given(numbers=st.lists(NORMAL, min_size=1, max_size=5), start=st.integers(0, 1 << 20))
def test_products_in_bfloat16_are_torchs_to_the_last_bit(numbers, start):
    def biased():
        slopes, places = torch.tensor(numbers), start + torch.arange(7)
        made = slopes[:, None].bfloat16() * places[None]
        # [slopes, positions] -> [slopes, 1, positions]
        return (places * made * 0.3).reshape(len(numbers), 1, 7).to(torch.float32), made.float() * torch.ones(7)

    wanted = biased()
    with RealNumbers():
        found = biased()
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one, two)


def test_other_steps_in_bfloat16_are_refused_in_words():
    from edgeship.errors import UnsupportedOpError

    with RealNumbers(), pytest.raises(UnsupportedOpError, match="bfloat16"):
        torch.ones(3).bfloat16() @ torch.ones(3)
    with RealNumbers(), pytest.raises(UnsupportedOpError, match="bfloat16"):
        torch.ones(3).bfloat16().exp()
