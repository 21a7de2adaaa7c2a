"""States of fixed size as onnxruntime-genai keeps them: pairs of one form each, all pairs of the same sizes.

    past_key_values.N.conv_state [1, 1, C], past_key_values.N.recurrent_state [1, 1, 1, R] -> present.N...

The engine finds them by these names, makes them zero before a text, and reads and writes each in one place. ``C`` and
``R`` are the most numbers that any state of the form has; what is shorter has zeros behind, and where one of a pair is
missing it is a single zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from edgeship.core.decoder import StateForm

if TYPE_CHECKING:
    from edgeship.core.decoder import Decoder

FORMS: tuple[StateForm, ...] = ("conv", "recurrent")
# Axes of a state of each form, as the engine counts them.
AXES = {"conv": 3, "recurrent": 4}


def state_names(decoder: Decoder) -> list[str]:
    """``N.conv_state`` and ``N.recurrent_state`` for each pair, in order."""
    return [f"{number}.{form}_state" for number in range(_pairs(decoder)) for form in FORMS]


def empty_states(decoder: Decoder) -> list[torch.Tensor]:
    """Zeros, one for each name: ``[1, 1, C]`` and ``[1, 1, 1, R]`` in turn."""
    made = {form: torch.zeros(*(1,) * (AXES[form] - 1), _numbers(decoder, form)) for form in FORMS}
    return [made[form].clone() for _ in range(_pairs(decoder)) for form in FORMS]


def unpacked(decoder: Decoder, packed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The engine's tensors as the states of `Decoder.states`, of their shapes."""
    found = []
    for state, place in zip(decoder.states, _places(decoder), strict=True):
        found.append(packed[place].reshape(-1)[: state.numbers].reshape(state.shape))
    return found


def packed(decoder: Decoder, states: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """States as the engine's tensors.

    Args:
        given: the engine's tensors before the step; what is no state stays as it was.
    """
    made = list(given)
    for state, held, place in zip(decoder.states, states, _places(decoder), strict=True):
        missing = _numbers(decoder, state.form) - math.prod(state.shape)
        flat = held.reshape(-1)
        flat = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
        made[place] = flat.reshape(given[place].shape)
    kept = set(_places(decoder))
    return [tensor if place in kept else tensor * 1.0 for place, tensor in enumerate(made)]


def _pairs(decoder: Decoder) -> int:
    forms = [state.form for state in decoder.states]
    return max((forms.count(form) for form in FORMS), default=0)


def _numbers(decoder: Decoder, form: StateForm) -> int:
    return max((state.numbers for state in decoder.states if state.form == form), default=1)


def _places(decoder: Decoder) -> list[int]:
    """For each state the place of its tensor among `state_names`."""
    forms = [state.form for state in decoder.states]
    return [len(FORMS) * forms[:i].count(form) + FORMS.index(form) for i, form in enumerate(forms)]
