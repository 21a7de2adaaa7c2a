"""Saved programs open again with the same numbers; references compute with what was decided."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.compression.affine import quantize_nearest, to_float16
from edgeship.core.model import TensorSpec, TorchModel
from edgeship.core.weights import ActivationEncoding, Affine, same_numbers
from edgeship.errors import ArtifactError, LoweringError
from edgeship.program.activations import insert_pairs
from edgeship.program.compare import MAX_SNR_DB, Comparison, OutputError, Reference
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram, read_record


@pytest.fixture(scope="module")
def program() -> TorchProgram:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return make_program(model, [TensorSpec("x", "f32", (1, 3, 8, 8))], [torch.randn(1, 3, 8, 8)], note="test")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def encoded(program, with_encoded) -> TorchProgram:
    tensors = {
        "0.weight": quantize_nearest(program.weights["0.weight"], Affine(4)),
        "3.weight": quantize_nearest(program.weights["3.weight"], Affine(8, False, "group", 16)),
        "3.bias": to_float16(program.weights["3.bias"]),
    }
    return with_encoded(program, tensors)


def test_a_saved_program_opens_with_the_same_answer(program, x, tmp_path):
    program.save(tmp_path / "p")
    opened = TorchProgram.open(TorchModel(tmp_path / "p", program.signature))
    torch.testing.assert_close(opened.module()(x)[0], program.module()(x)[0], rtol=1e-6, atol=1e-6)
    assert opened.record == program.record
    assert opened.signature == program.signature


def test_decided_numbers_survive_exactly(encoded, x, tmp_path):
    encoded.save(tmp_path / "p")
    opened = TorchProgram.open(TorchModel(tmp_path / "p", encoded.signature))
    assert opened.encoded.keys() == encoded.encoded.keys()
    for name, tensor in encoded.encoded.items():
        assert same_numbers(tensor, opened.encoded[name]) == ""
        assert opened.encoded[name].encoding == tensor.encoding
    torch.testing.assert_close(opened.module()(x)[0], encoded.module()(x)[0], rtol=1e-6, atol=1e-6)


def test_saving_twice_writes_the_same_bytes(encoded, tmp_path):
    encoded.save(tmp_path / "a")
    TorchProgram.open(TorchModel(tmp_path / "a", encoded.signature)).save(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        if path.name != "program.pt2":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_weight_without_numbers_is_saved(tmp_path):
    class Extended(nn.Module):
        # As vision transformers have it whose configuration asks for no tokens beside those of the image.
        def __init__(self):
            super().__init__()
            self.extra, self.last = nn.Parameter(torch.zeros(1, 0, 4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(torch.cat([self.extra, x], 1))

    model, x = Extended().eval(), torch.randn(1, 3, 4)
    program = make_program(model, [TensorSpec("x", "f32", (1, 3, 4))], [x])
    program.save(tmp_path / "program")
    opened = TorchProgram.open(TorchModel(tmp_path / "program", program.signature))
    torch.testing.assert_close(opened.module()(x)[0], model(x))


def test_the_saved_graph_holds_no_weights(program, tmp_path):
    program.save(tmp_path / "p")
    assert (tmp_path / "p" / "program.pt2").stat().st_size < 40_000
    assert (tmp_path / "p" / "weights.safetensors").stat().st_size > 4 * 720


def test_the_reference_computes_with_the_dequantized_weights(encoded, program, x):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    state = {name: encoded.weight(name) for name in ("0.weight", "0.bias", "3.weight", "3.bias")}
    module.load_state_dict(state)
    torch.testing.assert_close(encoded.module()(x)[0], module(x))
    assert not torch.allclose(encoded.module()(x)[0], program.module()(x)[0])
    assert torch.equal(state["0.weight"], torch.from_numpy(encoded.encoded["0.weight"].dequantize()))


def test_the_record_reads_without_torch(program, tmp_path):
    program.save(tmp_path / "p")
    assert read_record(TorchModel(tmp_path / "p", program.signature)).history == ("test",)


@pytest.mark.parametrize("name", ["program.pt2", "encoded.safetensors", "program.json"])
def test_a_damaged_program_is_named(program, tmp_path, name):
    program.save(tmp_path / "p")
    path = tmp_path / "p" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtifactError):
        TorchProgram.open(TorchModel(tmp_path / "p", program.signature))


def test_a_record_with_a_key_too_many_is_named(program, tmp_path):
    program.save(tmp_path / "p")
    path = tmp_path / "p" / "program.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra": 1}))
    with pytest.raises(ArtifactError, match="unknown key 'extra'"):
        read_record(TorchModel(tmp_path / "p", program.signature))


@pytest.mark.parametrize("encoding", [ActivationEncoding(8, 0.05, -3), ActivationEncoding(16, 0.001, 0)])
def test_activations_are_rounded_where_they_were_decided(program, x, encoding):
    nodes = [node.name for node in program.exported.graph.nodes if str(node.target) == "aten.relu.default"]
    record = dataclasses.replace(program.record, activations={nodes[0]: encoding, "x": encoding})
    decided = dataclasses.replace(program, record=record)

    def rounded(value):
        grid = torch.round(value / encoding.scale) + encoding.zero_point
        return (grid.clamp(encoding.low, encoding.high) - encoding.zero_point) * encoding.scale

    hidden = rounded(
        torch.relu(nn.functional.conv2d(rounded(x), program.weights["0.weight"], program.weights["0.bias"]))
    )
    wanted = nn.functional.linear(hidden.flatten(1), program.weights["3.weight"], program.weights["3.bias"])
    torch.testing.assert_close(decided.module()(x)[0], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(decided.module(quantized=False)(x)[0], program.module()(x)[0])
    assert not torch.allclose(decided.module()(x)[0], program.module()(x)[0], atol=1e-6)


def test_an_output_may_be_rounded_and_the_program_itself_stays(program, x):
    last = [node for node in program.exported.graph.nodes if node.op == "call_function"][-1].name
    before = [node.name for node in program.exported.graph.nodes]
    rounded = insert_pairs(program.filled(), {last: ActivationEncoding(8, 0.5, 0)}).module()(x)[0]
    assert torch.equal(rounded, torch.round(rounded / 0.5) * 0.5)
    assert [node.name for node in program.exported.graph.nodes] == before


def test_an_activation_that_does_not_exist_is_named(program):
    with pytest.raises(LoweringError, match="activation nowhere is not in the graph"):
        insert_pairs(program.filled(), {"nowhere": ActivationEncoding(8, 1, 0)})


def error_of(wanted, found) -> OutputError:
    error = OutputError()
    for pair in zip(wanted, found, strict=True):
        error.add(*(np.asarray(item, np.float32) for item in pair))
    return error


def test_the_ratio_is_signal_over_noise():
    assert error_of([[10, 0]], [[9, 0]]).snr_db == pytest.approx(20)
    assert error_of([[1, 1], [1, 1]], [[1, 1], [1, 1.1]]).snr_db == pytest.approx(10 * np.log10(4 / 0.01), rel=1e-4)
    assert error_of([[1.0]], [[1.0]]).snr_db == MAX_SNR_DB
    assert error_of([[0.0]], [[1.0]]).snr_db == -MAX_SNR_DB
    assert error_of([[1.0]], [[2.0]]).snr_db == pytest.approx(0)
    assert error_of([[1.0]], [[3.0]]).snr_db < 0
    assert error_of([[1.0, 2.0]], [[1.0, 2.5]]).max_error == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_answers_that_are_not_finite_drown_everything(bad):
    assert error_of([[1.0, 2.0]], [[1.0, bad]]).snr_db == -MAX_SNR_DB


def test_a_reference_that_says_nothing_is_seen():
    assert not error_of([[0.0], [0.0]], [[0.0], [0.0]]).has_signal
    assert not error_of([[5.0], [5.0]], [[5.0], [5.0]]).has_signal
    assert not error_of([[1e-12], [2e-12]], [[0.0], [0.0]]).has_signal
    assert error_of([[5.0], [6.0]], [[5.0], [6.0]]).has_signal


def test_the_worst_output_counts():
    comparison = Comparison()
    comparison.add({"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}, {"a": np.ones(4), "b": np.full(4, 1.1)})
    assert comparison.snr_db == pytest.approx(20, abs=0.01)
    assert comparison.max_error == pytest.approx(0.1)
    assert comparison.agreement == 1


def test_integer_outputs_count_by_agreement():
    comparison = Comparison()
    comparison.add({"ids": np.array([1, 2, 3, 4])}, {"ids": np.array([1, 2, 3, 9])})
    assert comparison.agreement == 0.75
    assert comparison.snr_db == MAX_SNR_DB


def test_the_reference_runs_on_arrays_by_name(program, x):
    found = Reference(program).run({"x": x.numpy()})
    assert np.array_equal(found["output"], program.module()(x)[0].detach().numpy())
