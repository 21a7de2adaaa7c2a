import numpy as np
import pytest
import torch

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.sensitivity import measure_sensitivity, worst_first
from edgeship.core.model import TensorSpec
from edgeship.core.weights import Affine
from edgeship.errors import DataError
from edgeship.program.export import make_program


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    return make_program(module, [TensorSpec("x", "f32", (1, 16))], [torch.randn(1, 16)])


@pytest.fixture(scope="module")
def batches():
    return [{"x": row} for row in np.random.default_rng(0).standard_normal((12, 1, 16)).astype(np.float32)]


def candidates(program):
    return {
        use.name: [quantize_nearest(program.weights[use.name], Affine(bits), name=use.name) for bits in (8, 4, 2)]
        for use in program.record.inventory.weights
        if use.op == "linear"
    }


def test_loss_is_the_noise_of_that_layer_alone_and_the_model_is_left_as_it_was(program, batches):
    found = measure_sensitivity(program, candidates(program).items(), batches)
    assert len(found) == 2
    for name, options in found.items():
        assert [option.encoding.bits for option in options] == [8, 4, 2]
        assert options[0].loss < options[1].loss < options[2].loss
        assert options[0].bytes > options[1].bytes > options[2].bytes
        changed = program.filled().module()
        dict(changed.named_parameters())[name].data = torch.from_numpy(candidates(program)[name][1].dequantize())
        plain, noisy = program.filled().module(), changed
        pairs = [(plain(torch.from_numpy(b["x"]))[0], noisy(torch.from_numpy(b["x"]))[0]) for b in batches]
        signal = sum(float(a.square().sum()) for a, _ in pairs)
        noise = sum(float((a - b).square().sum()) for a, b in pairs)
        assert options[1].loss == pytest.approx(noise / signal, rel=1e-3)
    again = measure_sensitivity(program, candidates(program).items(), batches)
    assert again == found


def test_losses_are_taken_on_samples_that_layers_do_not_see(program, batches):
    seen = {}

    def ways(name):
        def made(layer):
            seen[name] = len(layer.inputs)
            return candidates(program)[name]

        return made

    found = measure_sensitivity(program, [(name, ways(name)) for name in candidates(program)], batches, held_out=4)
    assert set(seen.values()) == {8}
    # Four of twelve, spread evenly.
    alone = measure_sensitivity(program, candidates(program).items(), batches[::3])
    for name, options in found.items():
        assert [item.loss for item in options] == pytest.approx([item.loss for item in alone[name]], rel=1e-5)


def test_the_worst_come_first_and_ties_by_name():
    assert worst_first({"a": 0.1, "c": 0.5, "b": 0.5}) == ["b", "c", "a"]


def test_no_data_is_an_error(program):
    with pytest.raises(DataError, match="at least one sample"):
        measure_sensitivity(program, candidates(program).items(), [])
