"""Large packages: constants left in the file and inputs run together answer as the plain way does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeship.core.passes import Context
from edgeship.passes.lower.decoder_to_coreml import DecoderToCoreML
from edgeship.runtimes.coreml import constants, packed
from edgeship.runtimes.coreml.evaluator import Evaluator
from edgeship.runtimes.coreml.packed import Packed

ENCODINGS = [
    ("int4-g32", "generic"),
    *(pytest.param(name, "ane", marks=pytest.mark.heavy) for name in ("palette4-c8", "int8")),
]


def _states(*evaluators):
    return {name: torch.from_numpy(zeros) for e in evaluators for name, zeros in e.new_state().items()}


@pytest.mark.parametrize(("name", "form"), ENCODINGS)
def test_the_same_answers_with_constants_in_the_file(name, form, decoder_model, encoded_model, tmp_path, monkeypatch):
    model = encoded_model(decoder_model("llama"), name, tmp_path)
    path = DecoderToCoreML(64, 8, form=form).run(model, Context(tmp_path)).path
    texts = [
        {"input_ids": np.array([[t]], np.int32), "position": np.array([i], np.int32)}
        for i, t in enumerate([5, 9, 200, 7])
    ]
    plain = Evaluator(path, "decode")
    states = _states(plain)
    wanted = [plain.advance(text, states)["logits"] for text in texts]
    together, kept = _states(plain), states
    assert np.array_equal(np.stack([row["logits"] for row in plain.advance_all(texts, together)]), np.stack(wanted))
    assert all(torch.equal(together[name], kept[name]) for name in kept)

    monkeypatch.setattr(constants, "MAX_DECOMPRESSED_BYTES", 1000)
    monkeypatch.setattr(packed, "AT_ONCE", 1024)
    lean = Evaluator(path, "decode")
    beside = Evaluator(path, "prefill", lean)
    held = {id(value) for value in lean._constants.values() if isinstance(value, Packed)}
    assert held
    assert {id(value) for value in beside._constants.values() if isinstance(value, Packed)} <= held
    states = _states(lean)
    found = [lean.advance(text, states)["logits"] for text in texts]
    again = [row["logits"] for row in lean.advance_all(texts, _states(lean))]
    for one, two, three in zip(wanted, found, again, strict=True):
        # Sums of float32 in another order, rounded to float16.
        assert np.allclose(one, two, atol=4e-3)
        assert np.allclose(one, three, atol=4e-3)
    assert not np.allclose(wanted[0], wanted[1], atol=0.1)
