"""States of fixed size in a cache: what a convolution reads, token by token."""

from __future__ import annotations

import pytest
import torch

from edgeship.errors import UnsupportedOpError
from edgeship.llm.cache import GrowingCache


def test_a_convolution_reads_the_same_token_by_token():
    torch.manual_seed(0)
    inputs, weight = torch.randn(1, 3, 7), torch.randn(3, 1, 4)
    # [1, 3, 7]: each token sees itself and three before it.
    wanted = torch.conv1d(torch.nn.functional.pad(inputs, (3, 0)), weight, groups=3)
    cache = GrowingCache({}, {}, 0)
    cache.states = {("conv", 0, 0): torch.zeros(1, 3, 4)}
    found = []
    for token in inputs.split(1, dim=-1):
        whole = cache.update_conv_state(token, 0)
        found.append(torch.conv1d(whole[..., -4:], weight, groups=3))
    torch.testing.assert_close(torch.cat(found, -1), wanted)
    torch.testing.assert_close(cache.get_conv_state(0), inputs[..., -4:])
    assert cache.has_previous_state()


def test_a_state_that_nobody_holds_is_refused_in_words():
    cache = GrowingCache({}, {}, 0)
    assert not cache.has_previous_state()
    with pytest.raises(UnsupportedOpError, match="a recurrent state from token to token"):
        cache.update_recurrent_state(torch.zeros(1, 2), 0)
    with pytest.raises(UnsupportedOpError, match="the last inputs of a convolution"):
        cache.get_conv_state(0)
