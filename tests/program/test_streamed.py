"""A program run weight by weight answers as the whole one does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgeship.compression.affine import quantize_nearest
from edgeship.core.weights import Affine
from edgeship.program import streamed
from edgeship.program.compare import Reference
from edgeship.program.program import TorchProgram


@pytest.mark.parametrize("encoding", [None, Affine(8), Affine(4, False, "group", 16)])
def test_answers_are_those_of_the_whole_program(decoder_model, monkeypatch, encoding) -> None:
    program = TorchProgram.open(decoder_model("llama"))
    if encoding is not None:
        encoded = {
            use.name: quantize_nearest(program.weights[use.name], encoding)
            for use in program.record.inventory.weights
            if use.op in ("linear", "embedding")
        }
        record = dataclasses.replace(program.record, encodings=dict.fromkeys(encoded, encoding))
        program = dataclasses.replace(program, encoded=encoded, record=record)
    batches = [{"input_ids": np.random.default_rng(seed).integers(0, 256, (1, 32))} for seed in range(2)]
    whole = Reference(program)
    wanted = [whole.run(batch)["logits"] for batch in batches]
    # Small parts: tables and products are taken some rows at a time.
    monkeypatch.setattr(streamed, "LARGE_ELEMENTS", 1000)
    monkeypatch.setattr(streamed, "STREAMED_BYTES", 0)
    apart = Reference(program, ahead=batches[:1])
    for batch, want in zip(batches, wanted, strict=True):
        assert np.allclose(apart.run(batch)["logits"], want, atol=1e-4)
