"""The step with explicit caches writes what transformers writes."""

from __future__ import annotations

import pytest
import torch

from edgeship.core.model import TorchModel
from edgeship.llm.cache import KeysAndValues
from edgeship.llm.generation import Stepper, generate, score
from edgeship.llm.models import build_hollow, read_config
from edgeship.llm.names import program_names
from edgeship.llm.step import Step, holding
from edgeship.program.program import TorchProgram

QUICK = ["llama", "gemma3", "falcon", "gpt2", "openelm", "qwen3_moe"]
SLOW = ["mistral", "qwen2", "qwen3", "gemma2", "phi3", "smollm3", "olmo2", "mixtral"]
FAMILIES = [*QUICK, *(pytest.param(name, marks=pytest.mark.heavy) for name in SLOW)]


class EagerStepper(Stepper):
    """The step run by torch, with the weights that a program says."""

    chunk, context = 8, 64

    def __init__(self, model: TorchModel) -> None:
        program = TorchProgram.open(model)
        assert program.origin is not None
        assert program.record.decoder is not None
        module = build_hollow(read_config(program.origin))
        names = program_names(module, program)
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            owner, _, leaf = name.rpartition(".")
            value = torch.nn.Parameter(program.weight(names[name]).reshape(parameter.shape), requires_grad=False)
            setattr(module.get_submodule(owner), leaf, value)
        self.layers = program.record.decoder.layers
        self.step = Step(module, program.record.decoder)
        self.reset()

    def reset(self) -> None:
        shapes = [(1, layer.kv_heads, self.context, layer.head_dim) for layer in self.layers]
        # What lies beyond the position must not matter.
        self.caches = [torch.full(shape, 7.0) for shape in shapes * 2]
        self.position = 0

    def prefill(self, tokens) -> None:
        self.take(tokens)

    def decode(self, token):
        return self.take([token])[0, -1].numpy()

    def take(self, tokens) -> torch.Tensor:
        with torch.no_grad():
            logits, *caches = self.step(torch.tensor([tokens]), torch.tensor([self.position]), *self.caches)
        self.caches, self.position = caches, self.position + len(tokens)
        return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_writes_what_transformers_writes(name, decoder_model, continued) -> None:
    prompt, wanted = continued(name)
    assert len(set(wanted)) > 4, "a model that repeats itself proves nothing"
    assert list(generate(EagerStepper(decoder_model(name)), prompt, 32)) == wanted


def test_a_text_is_scored_as_the_program_without_a_cache_scores_it(decoder_model) -> None:
    model = decoder_model("gemma3")
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = TorchProgram.open(model).module()(tokens)[0]
    found = torch.from_numpy(score(EagerStepper(model), tokens[0].tolist()))
    assert torch.allclose(found, wanted[0], atol=1e-4)


def test_scoring_goes_through_prefill(decoder_model) -> None:
    class Broken(EagerStepper):
        def prefill(self, tokens) -> None:
            self.take([*tokens[:-1], 0])

    tokens = list(range(20, 52))
    model = decoder_model("llama")
    right, wrong = score(EagerStepper(model), tokens), score(Broken(model), tokens)
    assert abs(right[:8] - wrong[:8]).max() == 0
    assert abs(right[9:] - wrong[9:]).max() > 0.01


def test_layers_hold_the_states_of_a_cache_for_a_step_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].sum, model[0].other = None, torch.zeros(2)
    cache, key = KeysAndValues(), ("recurrent", -1, 0)
    cache.states, cache.held = {key: torch.ones(1, 2)}, {key: "0.sum"}
    other = model[0].other
    with holding(model, cache):
        model[0].sum = model[0].sum + 2
        model[0].other, model[0].made = torch.ones(2), torch.ones(3)
    assert cache.states[key].tolist() == [[3.0, 3.0]]
    assert model[0].sum is None
    assert model[0].other is other
    assert not hasattr(model[0], "made")
