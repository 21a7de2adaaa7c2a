"""The normal form: constants and batch norms folded, names kept, nothing left that computes nothing."""

import re
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeship.core.model import TensorSpec, TorchModel
from edgeship.errors import SourceError, UsageError, WeightsError
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram

IMAGE = TensorSpec("image", "f32", (1, 3, 8, 8))
X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            low = 0.5 if name.endswith("var") else -0.5
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + low)
    return model.eval()


def operators(program) -> list[str]:
    return [
        str(node.target).removeprefix("aten.") for node in program.exported.graph.nodes if node.op == "call_function"
    ]


def answer(program, *inputs):
    with torch.no_grad():
        return program.module()(*inputs)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (1, 3, 8, 8)),
        ((nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (1, 3, 8, 8)),
        ((nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6, affine=False)), (1, 3, 8, 8)),
        ((nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, eps=0.1)), (1, 3, 8)),
        ((nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4)), (2, 8)),
    ],
)
def test_a_batch_norm_behind_a_layer_is_merged_exactly(layers, shape):
    model = seeded(nn.Sequential(*layers))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    program = make_program(model, [TensorSpec("x", "f32", shape)], [x])
    assert len(operators(program)) == 1
    torch.testing.assert_close(answer(program, x)[0], model(x), rtol=1e-5, atol=1e-5)
    assert {use.name for use in program.record.inventory.weights} == {"0.weight", "0.bias"}


def test_a_batch_norm_stays_where_merging_would_change_other_users():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y + self.conv(x * 2)

    model = seeded(Shared())
    program = make_program(model, [IMAGE], [X])
    torch.testing.assert_close(answer(program, X)[0], model(X), rtol=1e-5, atol=1e-5)


def test_a_batch_norm_without_a_layer_before_it_stays():
    model = seeded(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)))
    program = make_program(model, [IMAGE], [X])
    assert len(operators(program)) > 1
    torch.testing.assert_close(answer(program, X)[0], model(X), rtol=1e-5, atol=1e-5)


def test_constants_are_computed_once_and_only_the_input_is_left():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(16, 8)

        def forward(self, x):
            angles = torch.arange(8).float()[:, None] * torch.exp(torch.arange(8) * -0.3)
            return x + angles.sin() + self.table(torch.arange(8))

    program = make_program(seeded(Positions()), [TensorSpec("x", "f32", (1, 8, 8))], [torch.ones(1, 8, 8)])
    assert set(operators(program)) == {"add.Tensor"}


def test_a_view_behind_what_keeps_the_strides_of_a_copy_still_runs():
    class Turned(nn.Module):
        def forward(self, image):
            rows = image.transpose(1, 3).contiguous() * 2.0
            return (rows + rows.sigmoid()).view(1, -1)

    program = make_program(Turned(), [IMAGE], [X])
    torch.testing.assert_close(program.module()(X)[0], Turned()(X))


def test_what_computes_nothing_at_inference_is_gone():
    class Idle(nn.Module):
        def forward(self, x):
            y = functional.dropout(x.contiguous().clone().detach(), 0.5, self.training)
            y = y.to(torch.float32).reshape(x.shape).expand(x.shape).permute(0, 1, 2, 3)
            return torch.relu(y)

    assert operators(make_program(Idle(), [IMAGE], [X])) == ["relu.default"]


def test_joining_with_nothing_is_gone_and_views_behind_it_still_run():
    class Rest(nn.Module):
        def forward(self, x):
            whole = torch.cat([x.transpose(1, 2), x.transpose(1, 2)[..., 8:]], dim=-1)
            return whole.view(1, 64) + 1, torch.cat([x, x[..., 8:], x], dim=-1)

    program = make_program(Rest(), [TensorSpec("x", "f32", (1, 8, 8))], [torch.randn(1, 8, 8)])
    assert "slice.Tensor" not in operators(program)
    joined = [node for node in program.exported.graph.nodes if node.target == torch.ops.aten.cat.default]
    assert [len(node.args[0]) for node in joined] == [2]


def test_layers_stay_whole():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            y = functional.gelu(self.first(self.norm(x)))
            return functional.scaled_dot_product_attention(y, y, y)

    program = make_program(seeded(Block()), [TensorSpec("x", "f32", (1, 2, 4, 8))], [torch.randn(1, 2, 4, 8)])
    assert operators(program) == [
        "layer_norm.default", "linear.default", "gelu.default", "scaled_dot_product_attention.default",
    ]  # fmt: skip


def test_weights_keep_the_names_of_the_model():
    model = seeded(nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"head": nn.Linear(8, 2)})["head"]))
    program = make_program(model, [TensorSpec("x", "f32", (1, 8))], [torch.ones(1, 8)])
    assert set(program.weights) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(program.weights["1.weight"], model[1].weight)


def test_tied_weights_are_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.words(ids) * 2)

    model = seeded(Tied())
    ids = torch.tensor([[1, 2, 3]])
    program = make_program(model, [TensorSpec("ids", "i64", (1, 3), low=0, high=15)], [ids])
    assert len(program.weights) == 1
    (use,) = [
        use for use in program.record.inventory.weights if use.op != "other" and use.name not in program.record.aliases
    ]
    assert use.op == "linear"
    torch.testing.assert_close(answer(program, ids)[0], model(ids))


@pytest.mark.parametrize(
    "names", [("x", "x.y"), ("class", "1"), ("a/b", "a_b"), ("weight", "conv"), ("self", "args"), ("größe", "gr_ße")]
)
def test_inputs_may_have_awkward_names(names, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, one, two):
            return self.conv(one) - two * self.weight

    model = seeded(Two())
    specs = [TensorSpec(name, "f32", (1, 4)) for name in names]
    one, two = torch.randn(1, 4), torch.randn(1, 4)
    program = make_program(model, specs, [one, two])
    assert [spec.source or spec.name for spec in program.signature.inputs] == list(names)
    program.save(tmp_path / "p")
    opened = TorchProgram.open(TorchModel(tmp_path / "p", program.signature))
    torch.testing.assert_close(answer(opened, one, two)[0], model(one, two))


def test_a_weight_named_like_an_input_does_not_clash():
    class Clash(nn.Module):
        def __init__(self):
            super().__init__()
            self.image = nn.Parameter(torch.full((1,), 3.0))

        def forward(self, image):
            return image * self.image

    program = make_program(Clash(), [IMAGE], [X])
    torch.testing.assert_close(answer(program, X)[0], X * 3)


def test_outputs_are_flat_and_named():
    class Nested(nn.Module):
        def forward(self, image):
            return {"a": image + 1, "rest": [image * 2, (image.argmax(1),)]}

    program = make_program(Nested(), [IMAGE], [X], output_names=["a", "b", "c"])
    assert [str(spec) for spec in program.signature.outputs] == [
        "a:f32[1,3,8,8]", "b:f32[1,3,8,8]", "c:i64[1,8,8]",
    ]  # fmt: skip
    unnamed = make_program(Nested(), [IMAGE], [X])
    assert [spec.name for spec in unnamed.signature.outputs] == ["output", "output_1", "output_2"]


class _Scores(NamedTuple):
    logits: torch.Tensor
    shares: torch.Tensor


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: {"logits": x, "count": 3, "none": None, "image": x + 1}, ["logits", "image_2"]),
        (lambda x: {"b": x, "a": x + 1}, ["b", "a"]),
        (lambda x: _Scores(x + 1, x.softmax(1)), ["logits", "shares"]),
        (lambda x: {0: x + 1, 1: x + 2}, ["output", "output_1"]),
        (lambda x: {"a": (x + 1,), "b": x + 2}, ["output", "output_1"]),
        (lambda x: x + 1, ["output"]),
    ],
)
def test_outputs_keep_the_names_that_the_model_gives(function, names):
    program = make_program(nn.Identity(), [IMAGE], [X], call=lambda _, x: function(x))
    assert [spec.name for spec in program.signature.outputs] == names
    for spec, want in zip(program.signature.outputs, answer(program, X), strict=True):
        given = function(X)
        given = given if isinstance(given, dict) else getattr(given, "_asdict", dict)()
        if spec.name in given:
            torch.testing.assert_close(want, given[spec.name])


@pytest.mark.parametrize("names", [["a"], ["a", "a"]])
def test_output_names_must_fit(names):
    class Two(nn.Module):
        def forward(self, image):
            return image + 1, image + 2

    with pytest.raises(UsageError):
        make_program(Two(), [IMAGE], [X], output_names=names)


def test_an_output_is_renamed_by_its_own_name():
    class Two(nn.Module):
        def forward(self, image):
            return {"a b": image + 1, "c": image + 2, "d=e": image + 3}

    program = make_program(Two(), [IMAGE], [X], output_names=["a_b=first", '"d=e"=last'])
    found = [(spec.name, spec.source) for spec in program.signature.outputs]
    assert found == [("first", "a b"), ("c", None), ("last", "d=e")]
    assert any('"a b" is first' in line for line in program.record.history)


def test_half_precision_models_are_taken_in_float32():
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3))).half()
    program = make_program(model, [IMAGE], [X])
    assert {value.dtype for value in program.weights.values()} == {torch.float32}


def test_masks_of_minus_infinity_are_no_damage_but_weights_of_it_are():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, image):
            return torch.softmax(image + self.mask.clamp(min=-1e4), -1) * self.weight

    model = Masked()
    make_program(model, [IMAGE], [X])
    model.weight.data[2] = float("-inf")
    with pytest.raises(WeightsError, match="weight weight holds NaN or infinity"):
        make_program(model, [IMAGE], [X])


def test_answers_that_are_not_finite_are_refused():
    class Log(nn.Module):
        def forward(self, image):
            return torch.log(-image.abs())

    with pytest.raises(SourceError, match="is not finite on example inputs"):
        make_program(Log(), [IMAGE], [X])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.rand(4),
        lambda x: x + torch.rand_like(x),
        lambda x: functional.dropout(x, 0.5),
        lambda x: torch.bernoulli(torch.full_like(x, 0.5)) * x,
        lambda x: (torch.rand(1, 1000) * 100).to(torch.int32) + x.sum().to(torch.int32),
    ],
)
def test_models_that_draw_random_numbers_are_refused_by_that_name(function):
    class Noisy(nn.Module):
        def forward(self, x):
            return function(x)

    state = torch.random.get_rng_state()
    with pytest.raises(SourceError, match="uses random numbers: output output differs between two runs") as raised:
        make_program(Noisy(), [TensorSpec("x", "f32", (1, 4))], [torch.ones(1, 4)])
    assert "switch dropout and noise off" in raised.value.fix
    torch.random.set_rng_state(state)


def test_a_model_that_keeps_something_from_call_to_call_is_refused_by_that_name():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(x.sum())
            return x * len(self.seen)

    with pytest.raises(SourceError, match="keeps something from call to call: output output differs") as raised:
        make_program(Keeping(), [TensorSpec("x", "f32", (1, 4))], [torch.ones(1, 4)])
    assert "no list it appends to" in raised.value.fix


def test_noise_that_changes_nothing_is_no_reason_to_refuse():
    class Quiet(nn.Module):
        def forward(self, x):
            return x + 0 * torch.rand(4)

    make_program(Quiet(), [TensorSpec("x", "f32", (1, 4))], [torch.ones(1, 4)])


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: None, "the model returns no tensor; let forward return"),
        (lambda x: {"count": 3}, "the model returns no tensor; let forward return"),
        (lambda x: torch.complex(x, x), "a tensor of dtype complex64 cannot be"),
        (torch.unique, "what aten._unique2.default returns has a size that depends on the values of the input"),
        (lambda x: x[x > 0].std(), "std takes rows that values chose"),
    ],
)
def test_answers_that_no_artifact_gives_are_refused(function, says):
    with pytest.raises(SourceError, match=re.escape(says)):
        make_program(
            nn.Identity(), [TensorSpec("x", "f32", (1, 4))], [torch.randn(1, 4)], call=lambda _, x: function(x)
        )


def test_an_export_that_answers_otherwise_is_our_own_fault(monkeypatch):
    monkeypatch.setattr("edgeship.program.fixing.MIN_EXPORT_SNR_DB", 500.0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].running_mean.uniform_(-1, 1)
    with pytest.raises(SourceError, match="output output changed when the model was exported; report this as a bug"):
        make_program(model, [TensorSpec("x", "f32", (2, 4))], [torch.randn(2, 4)])


def test_the_example_inputs_are_left_as_they_were():
    before = X.clone()
    make_program(seeded(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1))), [IMAGE], [X])
    assert torch.equal(X, before)


def test_an_output_behind_what_does_nothing_is_known_by_its_new_name():
    class Ends(nn.Module):
        def forward(self, x):
            return x * 2, (x + 1).permute(0, 1), (x - 1).reshape(2, 3)

    x = torch.randn(2, 3)
    program = make_program(Ends(), [TensorSpec("x", "f32", (2, 3))], [x])
    names = [node.name for node in program.exported.graph.output_node().args[0]]
    assert list(program.exported.graph_signature.user_outputs) == names
    # It checks that they are.
    again = program.exported.run_decompositions()
    for found, wanted in zip(again.module()(x), Ends()(x), strict=True):
        assert torch.equal(found, wanted)
