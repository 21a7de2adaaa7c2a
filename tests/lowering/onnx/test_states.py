"""States of fixed size in the form that onnxruntime-genai keeps them in."""

from __future__ import annotations

import torch

from edgeship.core.decoder import Decoder, FixedState
from edgeship.lowering.onnx.states import empty_states, packed, state_names, unpacked


def decoder_with(*states):
    return Decoder("any", (), 8, 32, 64, states=states)


def test_states_of_any_shape_come_back_as_they_were():
    states = (
        FixedState("conv", 0, 0, (1, 3, 4)),
        FixedState("recurrent", 0, 0, (1, 2, 3, 5)),
        FixedState("conv", 2, 0, (1, 5, 2)),
        FixedState("conv", 2, 1, (1, 1, 2)),
    )
    decoder = decoder_with(*states)
    pairs = [f"{number}.{form}" for number in range(3) for form in ("conv_state", "recurrent_state")]
    assert state_names(decoder) == pairs
    empty = empty_states(decoder)
    # The engine allocates all of a form by the first.
    assert [tuple(held.shape) for held in empty] == [(1, 1, 12), (1, 1, 1, 30)] * 3
    held = [torch.randn(state.shape) for state in states]
    made = packed(decoder, held, empty)
    assert [tensor.shape for tensor in made] == [tensor.shape for tensor in empty]
    for found, wanted in zip(unpacked(decoder, made), held, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_form_that_no_layer_has_is_one_number():
    decoder = decoder_with(FixedState("conv", 1, 0, (1, 3, 4)))
    assert [tuple(held.shape) for held in empty_states(decoder)] == [(1, 1, 12), (1, 1, 1, 1)]


def test_a_decoder_without_states_has_no_names():
    assert state_names(decoder_with()) == []
