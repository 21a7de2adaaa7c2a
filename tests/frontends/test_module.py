"""Modules in memory: exported as they are, and left as they were."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.errors import EdgeshipError
from edgeship.frontends.module import examples_of, for_export, program_of_module


class Two(nn.Module):
    """Takes an image and a mask; the first input by more than its place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, image, mask, *, scale=None):
        answer = self.drop(self.layer(image)) * mask
        return answer if scale is None else answer * scale


def two() -> Two:
    torch.manual_seed(0)
    return Two()


IMAGE, MASK = torch.arange(4.0)[None], torch.tensor([[1.0, 0.0, 2.0]])


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        ((IMAGE, MASK), ["image", "mask"]),
        ([IMAGE.numpy(), MASK.numpy().astype(float)], ["image", "mask"]),
        ({"image": IMAGE, "mask": MASK}, ["image", "mask"]),
        ({"mask": MASK, "image": IMAGE}, ["mask", "image"]),
        ({"picture": IMAGE, "weights": MASK}, ["picture", "weights"]),
        ({"image": "f32[1,4]", "mask": MASK}, ["image", "mask"]),
        ("image:f32[1,4]", None),
        (["image:f32[1,4]", "mask:f32[1,3]"], ["image", "mask"]),
        ({"image": IMAGE, "mask": MASK, "scale": torch.tensor([2.0])}, ["image", "mask", "scale"]),
        ({"image": IMAGE.double(), "mask": MASK.half()}, ["image", "mask"]),
        ({"image": IMAGE.bfloat16().requires_grad_(), "mask": [[1.0, 0.0, 2.0]]}, ["image", "mask"]),
    ],
)
def test_inputs_in_every_form(inputs, names):
    if names is None:
        with pytest.raises(EdgeshipError, match=r"the model does not run on image:f32\[1,4\]"):
            program_of_module(two(), inputs, (), {}, note="")
        return
    program = program_of_module(two(), inputs, (), {}, note="")
    assert [spec.name for spec in program.signature.inputs] == names
    assert {spec.dtype for spec in program.signature.inputs} == {"f32"}


@pytest.mark.parametrize("order", [("image", "mask"), ("mask", "image")])
def test_names_of_parameters_decide_where_an_example_goes(order):
    """Against the module called by hand: an order of its own for the artifact's inputs changes no answer."""
    model, values = two().eval(), {"image": IMAGE, "mask": MASK}
    program = program_of_module(model, {name: values[name] for name in order}, (), {}, note="")
    (found,) = program.exported.module()(*(values[name] for name in order))
    torch.testing.assert_close(found, model(IMAGE, MASK))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"mask": MASK, "picture": IMAGE}, "the input mask is number 2 of forward, and is given as number 1"),
        ({}, "inputs is empty; give inputs=example"),
        ((), "inputs is empty"),
        ({"image": object(), "mask": MASK}, "the input image is of type object, not an example"),
        ({"image": IMAGE, "mask": torch.zeros(1, 3, dtype=torch.complex64)}, "the input mask holds complex64"),
        ({"image": IMAGE, "mask": "f99[1,3]"}, "no dtype f99"),
        ({"image": IMAGE}, "the model does not run on image:f32[1,4]"),
        ((IMAGE, MASK, IMAGE, IMAGE), "the model does not run on"),
        (torch.zeros(1, 5), "the model does not run on"),
    ],
)
def test_inputs_that_do_not_fit_get_one_line(inputs, says):
    with pytest.raises(EdgeshipError) as raised:
        program_of_module(two(), inputs, (), {}, note="")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def state_of(module):
    return {
        "training": [part.training for part in module.modules()],
        "tensors": {
            name: (value.data_ptr(), value.dtype, value.requires_grad, value.clone())
            for name, value in module.state_dict(keep_vars=True).items()
        },
        "attributes": {name: dict(part.__dict__) for name, part in module.named_modules()},
    }


def same(before, after):
    assert before["training"] == after["training"]
    for name, (place, dtype, gradient, value) in before["tensors"].items():
        now = after["tensors"][name]
        assert now[:3] == (place, dtype, gradient), name
        assert torch.equal(now[3], value), name
    assert before["attributes"].keys() == after["attributes"].keys()


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout()
    )
    layers[1].running_mean.uniform_(-1, 1)
    layers[1].weight.data.uniform_(0.5, 2)
    return layers


@pytest.mark.parametrize(
    ("training", "dtype"),
    [
        (True, torch.float32),
        ("partly", torch.float32),
        (True, torch.bfloat16),
        (False, torch.float16),
        (False, torch.float64),
    ],
)
def test_the_module_stays_as_it_was(training, dtype):
    """Folding a batch norm, evaluation and float32 happen to a copy; answers are those of the module evaluated."""
    model = network().to(dtype).train(bool(training))
    if training == "partly":
        model[1].eval()
    before = state_of(model)
    program = program_of_module(model, torch.zeros(1, 1, 4, 4), (), {}, note="")
    same(before, state_of(model))
    x = torch.randn(1, 1, 4, 4)
    want = copy.deepcopy(model).float().eval()(x)
    torch.testing.assert_close(program.exported.module()(x)[0], want, rtol=1e-4, atol=1e-5)


def test_tensors_that_fit_are_shared():
    """A copy of the structure alone: a model of gigabytes is not there twice."""
    model = network().train()
    with for_export(model) as copied:
        assert copied is not model
        assert copied[0].weight is model[0].weight
        assert copied[1].running_mean is model[1].running_mean
        copied.eval()
    assert all(part.training for part in model.modules())


def test_a_module_that_cannot_be_copied_is_evaluated_in_place_and_given_back():
    import threading

    model = network().train()
    model[1].eval()
    model.lock = threading.Lock()
    before = [part.training for part in model.modules()]
    program = program_of_module(model, torch.zeros(1, 1, 4, 4), (), {}, note="")
    assert [part.training for part in model.modules()] == before
    x = torch.randn(1, 1, 4, 4)
    torch.testing.assert_close(program.exported.module()(x)[0], model.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(EdgeshipError, match=r"cannot be copied to the CPU in float32.*give module"):
        program_of_module(model.half(), torch.zeros(1, 1, 4, 4), (), {}, note="")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.jit.script(nn.Linear(4, 4)), "is TorchScript, which torch.export does not take"),
        (lambda: nn.LazyLinear(4), "weight has no shape yet; run the module once"),
        (lambda: nn.Linear(4, 4, device="meta"), "weight is on the meta device and holds no numbers"),
    ],
)
def test_modules_without_numbers_are_refused(make, says):
    with pytest.raises(EdgeshipError) as raised:
        program_of_module(make(), torch.zeros(1, 4), (), {}, note="")
    assert says in str(raised.value)


def test_names_and_notes_reach_the_signature():
    program = program_of_module(
        two(), (IMAGE, MASK), ("scores",), {"image": {"name": "picture"}, "mask": {"low": 0.0, "high": 1.0}}, note=""
    )
    assert [spec.name for spec in program.signature.inputs] == ["picture", "mask"]
    assert (program.signature.inputs[1].low, program.signature.inputs[1].high) == (0.0, 1.0)
    assert [spec.name for spec in program.signature.outputs] == ["scores"]


def test_the_digest_is_over_graph_and_weights():
    def digest(model, inputs=(IMAGE, MASK), **more):
        return program_of_module(model, inputs, more.get("outputs", ()), {}, note="").content_digest()

    first = digest(two())
    assert digest(two()) == first, "equal modules, made elsewhere"
    assert digest(copy.deepcopy(two()).train()) == first
    changed = two()
    changed.layer.bias.data[0] += 1e-6
    assert digest(changed) != first
    assert digest(two(), outputs=("scores",)) != first
    assert digest(two(), {"picture": IMAGE, "mask": MASK}) != first

    class Other(Two):
        def forward(self, image, mask):
            return super().forward(image, mask) + 1

    other = Other()
    other.load_state_dict(two().state_dict())
    assert digest(other) != first


def test_examples_are_copies():
    """A model may write into what it is given; the user's own tensors are not that."""
    values = np.zeros((1, 4), np.float32)
    _, (tensor,) = examples_of(nn.Linear(4, 4), values)
    tensor += 1
    assert values.sum() == 0
