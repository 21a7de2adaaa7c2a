import dataclasses
from collections import ChainMap

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeship.compression.folds import apply_fold, find_folds
from edgeship.core.model import TensorSpec
from edgeship.errors import DataError, EncodingError
from edgeship.program.compare import Comparison, Reference
from edgeship.program.export import make_program

IDS = [TensorSpec("ids", "i64", (1, 6), low=0, high=39)]


def llama(tied=True, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, tie_word_embeddings=tied, attention_bias=True, **options,
    )  # fmt: skip
    call = lambda model, ids: model(ids, use_cache=False).logits  # noqa: E731
    return make_program(lively(LlamaForCausalLM(config)), IDS, [torch.arange(6)[None]], call=call)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    call = lambda model, ids: model(ids).logits  # noqa: E731
    return make_program(lively(BertForSequenceClassification(config)), IDS, [torch.arange(6)[None]], call=call)


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    spec = [TensorSpec("image", "f32", (1, 3, 16, 16))]
    call = lambda model, image: model(image).logits  # noqa: E731
    return make_program(lively(ViTForImageClassification(config)), spec, [torch.randn(1, 3, 16, 16)], call=call)


def lively(model):
    """Norm weights and biases away from one and zero, as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.rand(parameter.shape, generator=generator) * 0.5
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def kinds(program, folds):
    """What is folded where: producing operators, and how many layers read each."""
    nodes = {node.name: node for node in program.exported.graph.nodes}
    return sorted((str(nodes[fold.producer].target).split(".")[1], len(fold.consumers)) for fold in folds)


CASES = {
    # a layer: norm -> q k v, v -> o, norm -> gate up, up -> down; at the end: norm -> head
    "llama": (llama, [("linear", 1)] * 4 + [("mul", 2)] * 2 + [("mul", 3)] * 2),
    "llama with a head of its own": (
        lambda: llama(tied=False), [("linear", 1)] * 4 + [("mul", 1)] + [("mul", 2)] * 2 + [("mul", 3)] * 2
    ),
    # Norms are read by the next sum too, but for the last, whose first token goes on; gelu lets nothing through: v -> o.
    "bert": (bert, [("layer_norm", 1)] + [("linear", 1)] * 2),
    # a layer: norm -> q k v, v -> o, norm -> up; at the end the norm is cut to one token before the classifier
    "vit": (vit, [("layer_norm", 1)] * 3 + [("layer_norm", 3)] * 2 + [("linear", 1)] * 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_folded_scales_leave_the_outputs_as_they_were(case):
    make, expected = CASES[case]
    program = make()
    folds = find_folds(program)
    assert kinds(program, folds) == expected
    generator = torch.Generator().manual_seed(1)
    weights = ChainMap({}, program.weights)
    for fold in folds:
        changed = apply_fold(weights, fold, torch.rand(fold.size, generator=generator).mul(4).exp2() / 4)
        assert all(not torch.equal(value, weights[name]) for name, value in changed.items())
        weights = weights.new_child(changed)
    folded = dataclasses.replace(program, weights=weights)
    result = Comparison()
    before, after = Reference(program), Reference(folded)
    for seed in range(2):
        inputs = {spec.name: draw(spec, seed) for spec in program.signature.inputs}
        result.add(before.run(inputs), after.run(inputs))
    assert result.has_signal
    assert result.snr_db > 100


def draw(spec, seed):
    generator = torch.Generator().manual_seed(seed)
    if spec.dtype == "i64":
        return torch.randint(0, 40, spec.shape, generator=generator).numpy()
    return torch.randn(spec.shape, generator=generator).numpy()


def test_grouped_attention_shares_one_scale_among_the_heads_that_read_it():
    program = llama()
    fold = next(fold for fold in find_folds(program) if "v_proj" in fold.weights[0])
    assert fold.weights == ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.v_proj.bias")
    assert fold.size == 16
    # two heads of 8 for each of the two that are stored
    assert fold.channels == (*range(8), *range(8), *range(8, 16), *range(8, 16))


class Branch(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.up, self.down, self.side = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        h = self.up(x)
        match self.kind:
            case "relu":
                return self.down(functional.relu(h).reshape(1, 2, 8))
            case "two":
                return self.down(h) + self.side(h)
            case "gelu":
                return self.down(functional.gelu(h))
            case "residual":
                return self.down(h + x)
            case "square":
                return self.down(h * h)
            case "output":
                return self.down(h), h
            case "mixed":
                return self.down(h.transpose(1, 2).reshape(1, 2, 8))
            case "reused":
                return self.down(h) + self.down(x)


@pytest.mark.parametrize(
    ("kind", "count"),
    [("relu", 1), ("two", 2), ("gelu", 0), ("residual", 0), ("square", 0), ("output", 0), ("mixed", 0), ("reused", 0)],
)
def test_a_reader_that_is_not_linear_in_the_channel_forbids_it(kind, count):
    torch.manual_seed(0)
    program = make_program(Branch(kind), [TensorSpec("x", "f32", (1, 2, 8))], [torch.randn(1, 2, 8)])
    folds = [fold for fold in find_folds(program) if fold.weights[0] == "up.weight"]
    assert sum(len(fold.consumers) for fold in folds) == count


def test_unfit_scales_are_refused():
    program = make_program(Branch("relu"), [TensorSpec("x", "f32", (1, 2, 8))], [torch.randn(1, 2, 8)])
    (fold,) = find_folds(program)
    with pytest.raises(EncodingError, match="8 channels"):
        apply_fold(program.weights, fold, torch.ones(4))
    with pytest.raises(DataError, match="not positive"):
        apply_fold(program.weights, fold, torch.zeros(8))
