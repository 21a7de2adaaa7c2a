"""Static activations: every operator against the quantized reference, and the grids read back from the file."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from edgeship.core.model import TensorSpec
from edgeship.core.weights import ActivationEncoding, same_numbers
from edgeship.errors import ArtifactError, LoweringError
from edgeship.lowering.litert.flatbuffer import main_graph, parse
from edgeship.lowering.litert.integer_kernels import operator_names
from edgeship.passes.check.verify import stored_problem
from edgeship.runtimes.litert.runtime import RUNTIME

# What is lowered once is used by all of them.
pytestmark = pytest.mark.xdist_group("litert-integer")

SHAPE = (1, 8, 8, 8)
# Steps of the output's own grid. Several operators in a row add up (a step of the square is several of the quotient);
# 16-bit softmax and exp interpolate in a table.
STEPS = {
    8: {"product": 2, "attention": 2},
    16: {"softmax": 4, "exp": 4, "attention": 4, "tanh": 2, "product": 2, "quotient": 8},
}


def _operators():
    import torch
    from torch import nn
    from torch.nn import functional

    class Operators(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(8, 8, 3, padding=1)
            self.depthwise = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
            self.grouped = nn.Conv2d(8, 8, 3, groups=2)
            self.up = nn.ConvTranspose2d(8, 4, 2, 2)
            self.wave = nn.Conv1d(8, 6, 3, padding=1)
            self.linear = nn.Linear(8, 12)
            self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = {
                "conv": self.stem(x),
                "joined": functional.relu(self.grouped(x)),
                "depthwise": functional.relu6(self.depthwise(x)),
                "up": self.up(x),
                "wave": self.wave(x.flatten(2)),
                "linear": self.linear(x),
                "scaled": x * self.scale,
                "number": 1 - x,
                "product": torch.matmul(x, (x * 0.5).transpose(-1, -2)),
                "softmax": torch.softmax(x * 3, -1),
                "sigmoid": torch.sigmoid(x),
                "tanh": torch.tanh(x),
                "gelu": functional.gelu(x),
                "exp": torch.exp(x + 1),
                "mean": x.mean((2, 3)),
                "pooled": functional.avg_pool2d(x, 2),
                "largest": functional.max_pool2d(x, 3, 2, 1),
                "both": torch.cat([x, torch.tanh(x)], 1),
                "shuffled": functional.pixel_shuffle(x[:, ::2], 2),
                "padded": functional.pad(x, (1, 2, 0, 1)),
                "larger": functional.interpolate(x, scale_factor=2, mode="bilinear"),
                "attention": functional.scaled_dot_product_attention(x, x * 0.7, x * 0.2),
                "norm": self.norm(x),
                "quotient": x / (x * x + 1),
            }
            self.names = list(found)
            return tuple(found.values())

    torch.manual_seed(1)
    return Operators().eval()


def _static(model, bits, static_program):
    """A program with int8 weights and every activation on a grid."""
    import torch

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    return static_program(_program(model, x), bits, 3)


def _program(model, x):
    from edgeship.program.export import make_program

    return make_program(model, [TensorSpec("x", "f32", SHAPE)], [x])


@pytest.fixture(scope="module", params=[8, 16])
def made(request, lower_to_tflite, static_program):
    model = _operators()
    program = _static(model, request.param, static_program)
    return request.param, model.names, program, lower_to_tflite(program, f"int{request.param}")


def _graph(artifact):
    model = parse(artifact.path.read_bytes())
    numbers = operator_names()
    codes = [numbers[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    return main_graph(model), [codes[operator.opcodeIndex] for operator in main_graph(model).operators]


def test_every_operator_answers_within_a_step_or_two(made):
    import torch

    bits, names, program, artifact = made
    x = np.random.default_rng(4).standard_normal(SHAPE).astype(np.float32)
    with RUNTIME.open(artifact) as session:
        have = session.run({"x": x})
    with torch.no_grad():
        want = program.module()(torch.from_numpy(x))
    ends = next(node for node in program.exported.graph.nodes if node.op == "output").args[0]
    for name, spec, node, value in zip(names, program.signature.outputs, ends, want, strict=True):
        steps = np.abs(value.numpy() - have[spec.name]) / program.activations[node.name].scale
        assert np.ptp(value.numpy()) > 10 * program.activations[node.name].scale, name
        assert steps.max() <= STEPS[bits].get(name, 1) + 0.01, (name, steps.max())


def test_only_operators_without_a_kernel_compute_in_float(made):
    from ai_edge_litert import schema_py_generated as schema

    bits, _, _, artifact = made
    graph, names = _graph(artifact)
    floats = Counter()
    for name, operator in zip(names, graph.operators, strict=True):
        kinds = {graph.tensors[index].type for index in (*operator.inputs, *operator.outputs) if index >= 0}
        if schema.TensorType.FLOAT32 in kinds:
            floats[name] += 1
    # The norm and the division; 16-bit GELU too. The input is transposed before it is quantized.
    products = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"}
    moved = {"SOFTMAX", "LOGISTIC", "TANH", "MAX_POOL_2D", "AVERAGE_POOL_2D", "CONCATENATION", "PAD", "RELU"}
    assert not floats.keys() & (products | moved)
    assert floats["DIV"] == 1
    assert floats["GELU"] == (bits == 16)


def test_weights_and_grids_are_read_back_as_decided(made):
    _, _, program, artifact = made
    stored = RUNTIME.read_weights(artifact)
    for name, tensor in program.encoded.items():
        assert same_numbers(tensor, stored[name]) == "", name
    assert RUNTIME.read_activations(artifact) == program.activations


def test_verify_compares_the_grids(made):
    _, _, program, artifact = made
    assert stored_problem(RUNTIME, artifact, program) == ("", len(program.encoded))
    other = replace(program.activations["conv2d"], scale=0.5)
    record = replace(program.record, activations={**program.activations, "conv2d": other})
    problem, _ = stored_problem(RUNTIME, artifact, replace(program, record=record))
    assert "activation conv2d" in problem


def test_biases_are_integers_with_the_scale_of_the_products(made):
    from ai_edge_litert import schema_py_generated as schema

    bits, _, program, artifact = made
    graph, names = _graph(artifact)
    kind = schema.TensorType.INT32 if bits == 8 else schema.TensorType.INT64
    seen = 0
    for name, operator in zip(names, graph.operators, strict=True):
        if name not in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED") or operator.inputs[2] < 0:
            continue
        data, weight, bias = (graph.tensors[index] for index in operator.inputs)
        assert bias.type == kind
        assert np.array_equal(bias.quantization.scale, data.quantization.scale * weight.quantization.scale)
        seen += 1
    assert seen == 5
    stem = program.weight("stem.bias").numpy()
    grid = program.activations["x"]
    scales = program.encoded["stem.weight"].scale.reshape(-1) * np.float32(grid.scale)
    integers = np.rint(stem.astype(np.float64) / scales).astype(np.int32 if bits == 8 else np.int64)
    assert integers.tobytes() in artifact.path.read_bytes()


def test_a_changed_grid_is_found(made, tmp_path):
    _, _, program, artifact = made
    scale = np.float32(program.activations["conv2d"].scale)
    content = artifact.path.read_bytes()
    assert content.count(scale.tobytes()) >= 1
    (tmp_path / "model.tflite").write_bytes(content.replace(scale.tobytes(), np.float32(scale * 2).tobytes()))
    found = RUNTIME.read_activations(replace(artifact, path=tmp_path / "model.tflite"))
    assert found["conv2d"] != program.activations["conv2d"]


def test_two_grids_for_one_activation_are_refused(made, tmp_path):
    _, _, _, artifact = made
    content = artifact.path.read_bytes()
    (tmp_path / "model.tflite").write_bytes(content.replace(b"conv2d (int", b"linear (int"))
    with pytest.raises(ArtifactError, match="two grids for activation linear"):
        RUNTIME.read_activations(replace(artifact, path=tmp_path / "model.tflite"))


def test_an_unknown_activation_is_named(layers_program, lower_to_tflite):
    record = replace(layers_program.record, activations={"gone": ActivationEncoding(8, 0.1, 0)})
    with pytest.raises(LoweringError, match="activation gone"):
        lower_to_tflite(replace(layers_program, record=record), "int8")


@pytest.mark.parametrize("clip", ["relu", "relu6"])
def test_a_layer_kept_in_float_clips_before_its_result_is_put_on_a_grid(clip, static_program, lower_to_tflite):
    import torch
    from torch import nn
    from torch.nn import functional

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(getattr(functional, clip)(self.first(x)))

    torch.manual_seed(3)
    program = _static(Layers().eval(), 8, static_program)
    # Without a grid for its input the first layer computes in float.
    grids = {name: grid for name, grid in program.activations.items() if name != "x"}
    program = replace(program, record=replace(program.record, activations=grids))
    artifact = lower_to_tflite(program, f"float-{clip}")

    _, names = _graph(artifact)
    assert not {"RELU", "RELU6"} & set(names)
    assert names.count("QUANTIZE") == 1
    assert RUNTIME.read_activations(artifact) == grids
    x = 8 * np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)
    with RUNTIME.open(artifact) as session:
        have = session.run({"x": x})
    with torch.no_grad():
        want = program.module()(torch.from_numpy(x))
    (end,) = next(node for node in program.exported.graph.nodes if node.op == "output").args[0]
    for spec, value in zip(program.signature.outputs, want if isinstance(want, tuple) else (want,), strict=True):
        steps = np.abs(value.numpy() - have[spec.name]) / grids[end.name].scale
        assert steps.max() <= 1.01
