"""Positions where experts are chosen by a hair are those where transformers' own routers say so."""

import numpy as np
import pytest
import torch
import transformers

from edgeship.program.compare import Reference
from edgeship.program.program import TorchProgram
from edgeship.program.routers import undecided

WITHIN = 0.02


def _margins(folder, tokens):
    """Of every router in transformers: how far the last chosen expert is before the next, ``[T]``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    margins = []

    def look(module, inputs, answer):
        shares = torch.softmax(answer[0].reshape(tokens.shape[1], -1), -1).sort(-1, descending=True).values
        chosen = model.config.num_experts_per_tok
        spread = shares[:, 0] - shares[:, -1]
        margins.append(((shares[:, chosen - 1] - shares[:, chosen]) / spread).numpy())

    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(look)
    with torch.no_grad():
        model(tokens)
    return np.stack(margins)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.heavy)])
def test_they_are_what_transformers_routers_say(name, family, decoder_model):
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(5))
    margins = _margins(family(name), tokens)
    assert len(margins) == 3
    found = Reference(TorchProgram.open(decoder_model(name))).undecided({"input_ids": tokens.numpy()}, WITHIN)
    # What lies on the edge of the bound itself may be on either side.
    sure = (np.abs(margins - WITHIN) > 1e-4).all(0)
    assert sure.sum() > 28
    assert 1 <= found.sum() < 16
    assert (found == (margins < WITHIN).any(0))[sure].all()


def test_a_model_without_experts_has_none(decoder_model):
    reference = Reference(TorchProgram.open(decoder_model("llama")))
    assert not reference.undecided({"input_ids": np.zeros((1, 32), np.int64)}, 1.0).any()


def test_experts_that_are_masked_out_and_smallest_first():
    class Router(torch.nn.Module):
        def forward(self, tokens, rows):
            masked = rows.masked_fill(torch.tensor([False, False, False, True]), -torch.inf)
            return masked.topk(1).indices, rows.topk(1, largest=False).indices

    # The two best of the first row and the two smallest of the last lie within a hundredth of its ends.
    rows = torch.tensor([[9.0, 8.99, 0.0, 5.0], [9.0, 5.0, 0.0, 7.0], [9.0, 5.0, 0.01, 0.0]])
    tokens = torch.zeros(1, 3)
    module = torch.export.export(Router(), (tokens, rows)).module()
    assert undecided(module, [tokens, rows], 0.01).tolist() == [True, False, True]
    assert undecided(module, [tokens, rows + 1000], 0.01).tolist() == [True, False, True]
    assert undecided(module, [tokens, rows], 0.001).tolist() == [False, False, False]
