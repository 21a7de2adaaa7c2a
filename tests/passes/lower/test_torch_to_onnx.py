from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest

from edgeship.compression.affine import quantize_nearest, to_float16
from edgeship.core.model import TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import ActivationEncoding, Affine, Float, same_numbers
from edgeship.errors import LoweringError, UnsupportedOpError
from edgeship.lowering.onnx import save
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.runtimes.onnxruntime import RUNTIME
from tests.processors import sums_pairs_in_16_bits

GROUP = Affine(4, granularity="group", group_size=16)
# Each weight takes the next of these that the runtime holds; the mixes give every kind of layer several encodings.
MIXES = {
    "int8": (Affine(8),),
    "mixed": (Affine(8), Float(16), Affine(4), Affine(8, granularity="tensor"), Affine(8, symmetric=False), Float(32)),
    "small": (Affine(4), GROUP, Affine(2), replace(GROUP, symmetric=False), Affine(4, symmetric=False)),
}


def _encoded(program, mix, activations="float"):
    turns = itertools.cycle(MIXES[mix])
    encoded = {}
    for use in program.record.inventory.weights:
        if use.op == "other":
            continue
        encoding = next(turns)
        while RUNTIME.holds(use.op, encoding, activations):
            encoding = next(turns)
        weight = program.weight(use.name)
        if isinstance(encoding, Float):
            half = to_float16(weight)
            encoded[use.name] = half if encoding.bits == 16 else replace(half, values=weight.detach().numpy())
        else:
            encoded[use.name] = quantize_nearest(weight, encoding, axis=use.channel_axis)
    return encoded


def _snr_db(want, have):
    noise = float(((want.astype(np.float64) - have) ** 2).mean())
    return 10 * np.log10(float((want.astype(np.float64) ** 2).mean()) / max(noise, 1e-300))


def _run(artifact, program):
    feeds = {
        spec.name: value.numpy() for spec, value in zip(program.signature.inputs, program.example_inputs(), strict=True)
    }
    with RUNTIME.open(artifact) as session:
        return session.run(feeds)


def _reference(program):
    import torch

    with torch.no_grad():
        outputs = program.module()(*program.example_inputs())
    return {spec.name: value.numpy() for spec, value in zip(program.signature.outputs, outputs, strict=True)}


def _ops(artifact):
    return Counter(node.op_type for node in onnx.load(artifact.path).graph.node)


def _static(program, with_encoded, bits, mix="int8"):
    from edgeship.compression.calibrate import decide_activations
    from edgeship.program.rewrites import for_static_activations

    program = for_static_activations(with_encoded(program, _encoded(program, mix, f"int{bits}")), bits)
    batch = {
        spec.name: value.numpy() for spec, value in zip(program.signature.inputs, program.example_inputs(), strict=True)
    }
    activations = decide_activations(program, [batch], bits=bits, method="minmax")
    return replace(program, record=replace(program.record, activations=activations))


@pytest.fixture(scope="module", params=[8, 16])
def static(request, layers_program, with_encoded):
    return _static(layers_program, with_encoded, request.param)


def test_float32_answers_as_the_reference_does(layers_program, lower_to_onnx):
    artifact = lower_to_onnx(layers_program)
    want, have = _reference(layers_program), _run(artifact, layers_program)
    assert list(have) == ["image", "text"]
    for name, value in want.items():
        assert _snr_db(value, have[name]) > 110, name
    assert artifact.facts == {}
    assert artifact.files == ("model.onnx",)


@pytest.mark.parametrize("mix", MIXES)
def test_encoded_weights_are_stored_exactly_and_answer_as_the_reference_does(
    layers_program, with_encoded, lower_to_onnx, mix
):
    program = with_encoded(layers_program, _encoded(layers_program, mix))
    artifact = lower_to_onnx(program)
    want, have = _reference(program), _run(artifact, program)
    for name, value in want.items():
        assert _snr_db(value, have[name]) > 110, name
    stored = RUNTIME.read_weights(artifact)
    assert len(program.encoded) == 9
    for name, tensor in program.encoded.items():
        assert same_numbers(tensor, stored[name]) == "", name


def test_dynamic_activations_round_only_activations(layers_program, with_encoded, lower_to_onnx):
    program = with_encoded(layers_program, _encoded(layers_program, "int8"))
    exact, dynamic = lower_to_onnx(program), lower_to_onnx(program, "dynamic")
    want, have = _reference(program)["image"], _run(dynamic, program)["image"]
    assert 25 < _snr_db(want, have) < 90
    assert exact.facts == {}
    assert dynamic.compute == "int"
    # What an app must set is in the file too.
    entries = {entry.key: entry.value for entry in onnx.load(dynamic.path).metadata_props}
    assert entries == dynamic.facts


def test_static_activations_keep_every_grid_and_answer_within_a_step(static, lower_to_onnx):
    grids = list(static.activations.values())
    if grids[0].bits == 8 and sums_pairs_in_16_bits():
        pytest.skip("the table that is a head as well keeps ONNX Runtime from exact sums on this processor")
    artifact = lower_to_onnx(static)
    want, have = _reference(static), _run(artifact, static)
    for name, value in want.items():
        # A step here and there: rounding of ties, and biases in int32.
        assert np.abs(value - have[name]).max() <= 2.01 * max(grid.scale for grid in grids[-8:]), name
        assert _snr_db(value, have[name]) > (25 if grids[0].bits == 8 else 70), name
    stored = RUNTIME.read_weights(artifact)
    for name, tensor in static.encoded.items():
        assert same_numbers(tensor, stored[name]) == "", name
    model = onnx.load(artifact.path)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    numbers = {(float(constants[node.input[1]]), int(constants[node.input[2]])) for node in quantizers}
    offset = 128 if grids[0].bits == 8 else 32768
    assert numbers == {(float(np.float32(grid.scale)), grid.zero_point + offset) for grid in grids}
    assert {constants[node.input[2]].dtype for node in quantizers} == {np.dtype(f"uint{grids[0].bits}")}


def test_static_layers_have_int32_biases_and_explicit_zero_points(static, lower_to_onnx):
    model = onnx.load(lower_to_onnx(static).path)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "ConvTranspose")]
    assert len(layers) == 9
    for layer in layers:
        x, weight = made_by[layer.input[0]], made_by[layer.input[1]]
        assert not constants[weight.input[2]].any()
        if len(layer.input) > 2:
            bias = made_by[layer.input[2]]
            assert constants[bias.input[0]].dtype == np.int32
            assert np.array_equal(constants[bias.input[1]], constants[x.input[1]] * constants[weight.input[1]])


def test_eight_bit_static_layers_run_as_integers(layers_program, with_encoded, lower_to_onnx, tmp_path):
    import onnxruntime

    artifact = lower_to_onnx(_static(layers_program, with_encoded, 8))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(artifact.path), options)
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    # All but the transposed convolution, which has no integer kernel.
    assert (ops["QLinearConv"], ops["QGemm"], ops["Conv"], ops["Gemm"]) == (5, 3, 0, 0)


def test_softmax_is_right_where_the_fused_kernel_wraps_around(lower_to_onnx):
    import torch

    from edgeship.program.export import make_program

    class Softmax(torch.nn.Module):
        def forward(self, x):
            return x.softmax(-1)

    for size, scale in ((2, 1 / 400), (1, 1 / 256)):
        x = torch.linspace(-2, 2, 32 * size).reshape(1, 32, size)
        program = make_program(Softmax().eval(), [TensorSpec("x", "f32", tuple(x.shape))], [x])
        nodes = [node.name for node in program.exported.graph.nodes if node.op != "output"]
        grids = dict(zip(nodes, (ActivationEncoding(8, 0.03125, 0), ActivationEncoding(8, scale, -128)), strict=True))
        program = replace(program, record=replace(program.record, activations=grids))
        want, have = _reference(program)["output"], _run(lower_to_onnx(program), program)["output"]
        assert np.abs(want - have).max() <= 1.01 * scale


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_bit_products_avoid_the_fusion_that_is_wrong(symmetric, lower_to_onnx, with_encoded):
    import torch

    from edgeship.program.export import make_program

    torch.manual_seed(0)
    for columns, channels in ((64, 10), (64, 12), (75, 10)):
        layer, x = torch.nn.Linear(columns, channels), torch.randn(2, 3, columns)
        program = make_program(layer.eval(), [TensorSpec("x", "f32", (2, 3, columns))], [x])
        encoded = {"weight": quantize_nearest(program.weight("weight"), Affine(2, symmetric))}
        program = with_encoded(program, encoded)
        artifact = lower_to_onnx(program)
        assert _snr_db(_reference(program)["output"], _run(artifact, program)["output"]) > 100
        assert same_numbers(encoded["weight"], RUNTIME.read_weights(artifact)["weight"]) == ""
        assert _ops(artifact)["MatMulNBits"] == 1


def test_the_graph_is_small(layers_program, with_encoded, lower_to_onnx):
    program = with_encoded(layers_program, _encoded(layers_program, "int8"))
    ops = _ops(lower_to_onnx(program))
    # Widened once, at load, by operators that ONNX Runtime folds.
    assert (ops["DequantizeLinear"], ops["Mul"]) == (0, 9 + 1 + 1)
    # One turns the image's axes, one the table that is an embedding and a linear layer.
    assert ops["Transpose"] == 2
    assert not {"Shape", "Constant", "CastLike", "Identity"} & set(ops)
    # Rows are gathered as integers: the table is not dequantized for them.
    assert ops["Gather"] == 2


def test_the_same_bytes_every_time_and_none_of_this_machine(static, lower_to_onnx, tmp_path):
    first, second = lower_to_onnx(static), lower_to_onnx(static, folder=tmp_path / "again")
    assert first.path != second.path
    data = first.path.read_bytes()
    assert data == second.path.read_bytes()
    assert b"site-packages" not in data
    assert b"/torch/" not in data


def test_large_models_keep_their_weights_beside(layers_program, with_encoded, tmp_path, monkeypatch):
    program = with_encoded(layers_program, _encoded(layers_program, "mixed"))
    program.save(tmp_path / "program")
    monkeypatch.setattr(save, "MAX_INLINE_BYTES", 1 << 14)
    artifact = TorchToOnnx().run(TorchModel(tmp_path / "program", program.signature), Context(tmp_path))
    assert artifact.files == ("model.onnx", "model.data")
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "model.data").stat().st_size
    stored = RUNTIME.read_weights(artifact)
    assert all(same_numbers(tensor, stored[name]) == "" for name, tensor in program.encoded.items())
    for name, value in _reference(program).items():
        assert _snr_db(value, _run(artifact, program)[name]) > 110


def test_outputs_that_are_inputs_or_twice_the_same_keep_their_names(lower_to_onnx):
    import torch

    from edgeship.program.export import make_program

    class Passing(torch.nn.Module):
        def forward(self, relu, y):
            z = relu.relu()
            return z, relu, z, (y > 2).to(torch.int64)

    specs = [TensorSpec("relu", "f32", (2, 3)), TensorSpec("y", "i64", (4,))]
    names = ["y_1", "same", "again", "many"]
    program = make_program(Passing(), specs, [torch.randn(2, 3), torch.arange(4)], output_names=names)
    have = _run(lower_to_onnx(program), program)
    assert list(have) == names
    for name, value in _reference(program).items():
        assert np.array_equal(value, have[name])


def test_an_unknown_operator_is_named(tmp_path):
    import torch

    from edgeship.program.export import make_program

    class Special(torch.nn.Module):
        def forward(self, x):
            return torch.special.modified_bessel_i1(x)

    program = make_program(Special(), [TensorSpec("x", "f32", (2, 3))], [torch.rand(2, 3)])
    program.save(tmp_path / "program")
    with pytest.raises(UnsupportedOpError, match=r"special_modified_bessel_i1.*node"):
        TorchToOnnx().run(TorchModel(tmp_path / "program", program.signature), Context(tmp_path))


def test_a_weight_that_is_not_in_the_graph_is_named(layers_program, with_encoded, lower_to_onnx):
    encoded = _encoded(layers_program, "int8")
    encoded["nowhere.weight"] = encoded["first.weight"]
    with pytest.raises(LoweringError, match=r"nowhere\.weight"):
        lower_to_onnx(with_encoded(layers_program, encoded))
