"""Files that are quantized already: integers and grids are taken over as they are, in every form that makers write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeship.core.model import TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.frontends.onnx.constants import Integers, integers_again
from edgeship.frontends.onnx.importer import ImportedOnnx, import_onnx
from edgeship.program.export import make_program
from edgeship.program.given import take_over
from edgeship.program.program import TorchProgram
from tests.processors import needs_exact_products

GENERATOR = np.random.default_rng(11)
KINDS = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "uint16": TensorProto.UINT16, "int16": TensorProto.INT16}


class _Writer:
    """A small network in QuantizeLinear pairs or in integer operators, as onnxruntime's quantizer spells them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def keep(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def grid(self, name: str, scale: float, zero: int, kind: str) -> list[str]:
        return [self.keep(f"{name}_s", np.float32(scale)), self.keep(f"{name}_z", np.asarray(zero, kind))]

    def node(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def pair(self, source: str, name: str, scale: float, zero: int, kind: str) -> str:
        numbers = self.grid(name, scale, zero, kind)
        self.node("QuantizeLinear", [source, *numbers], f"{name}_q")
        return self.node("DequantizeLinear", [f"{name}_q", *numbers], name)

    def weight(self, name: str, value: np.ndarray, axis: int | None, kind: str) -> tuple[list[str], np.ndarray]:
        """Names of the integers, their scale and zero point, and the integers."""
        low, high = (-127, 127) if kind == "int8" else (0, 255)
        spread = tuple(i for i in range(value.ndim) if i != axis)
        scale = (np.abs(value).max(spread if axis is not None else None, keepdims=True) * 2 / (high - low)).astype("f")
        zero = 0 if kind == "int8" else 128
        whole = np.clip(np.rint(value / scale) + zero, low, high).astype(kind)
        flat = scale.reshape(-1) if axis is not None else scale.reshape(())
        names = [self.keep(f"{name}_q", whole), self.keep(f"{name}_s", flat)]
        return [*names, self.keep(f"{name}_z", np.full(flat.shape, zero, kind))], whole

    def save(self, path: Path, inputs: dict[str, list[int]], outputs: list[str], opset: int = 21) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            self.constants,
        )
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())
        return path


def _program(imported: ImportedOnnx) -> TorchProgram:
    specs = [TensorSpec(item.name, "f32", item.shape) for item in imported.inputs]
    examples = [torch.from_numpy(GENERATOR.standard_normal(spec.shape).astype("f")) for spec in specs]
    names = [item.name for item in imported.outputs]
    program = make_program(imported.module, specs, examples, output_names=names)
    return take_over(program, imported.encoded, dynamic=imported.is_dynamic)


def _answers(path: Path, program: TorchProgram, shape: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(onnxruntime on the file, the program) on noise, zeros and large values."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    module = program.module()
    found = []
    for scale in (1.0, 0.0, 100.0):
        x = (scale * GENERATOR.standard_normal(shape)).astype("f")
        (want,) = session.run(None, {session.get_inputs()[0].name: x})
        with torch.no_grad():
            found.append((want, module(torch.from_numpy(x))[0].numpy()))
    return found


def _pairs(folder: Path, activation: str, weight: str, axis: int | None) -> tuple[Path, np.ndarray, np.ndarray]:
    w = _Writer()
    middle = {"uint8": 128, "int8": 0, "uint16": 32768, "int16": 0}[activation]
    fine = 1.0 if activation.endswith("8") else 1 / 256
    x = w.pair("x", "x1", 0.03 * fine, middle, activation)
    names, first = w.weight("w", GENERATOR.standard_normal((8, 3, 3, 3)), axis, weight)
    w.node("DequantizeLinear", names, "w", **({} if axis is None else {"axis": 0}))
    w.node("Conv", [x, "w"], "c", pads=[1, 1, 1, 1])
    w.node("Relu", ["c"], "r")
    r = w.pair("r", "r1", 0.2 * fine, middle, activation)
    w.node("MaxPool", [r], "p", kernel_shape=[2, 2], strides=[2, 2])
    w.node("Flatten", ["p"], "f")
    names, second = w.weight("m", GENERATOR.standard_normal((128, 4)), None if axis is None else 1, weight)
    w.node("DequantizeLinear", names, "m", **({} if axis is None else {"axis": 1}))
    w.node("MatMul", ["f", "m"], "y")
    return w.save(folder / "m.onnx", {"x": [1, 3, 8, 8]}, ["y"]), first, second


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("weight", ["int8", "uint8"])
@pytest.mark.parametrize("activation", sorted(KINDS))
def test_pairs_become_grids_and_integers_stay(tmp_path: Path, activation: str, weight: str, axis: int | None) -> None:
    path, first, second = _pairs(tmp_path, activation, weight, axis)
    program = _program(import_onnx(path))
    for want, have in _answers(path, program, (1, 3, 8, 8)):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)
    assert {grid.bits for grid in program.activations.values()} == {int(activation.lstrip("uint"))}
    assert program.record.inventory.activations == f"int{activation.lstrip('uint')}"
    assert not [node for node in program.exported.graph.nodes if "quantize" in str(node.target)]
    stored = {name: tensor.arrays()["values"] for name, tensor in program.encoded.items()}
    np.testing.assert_array_equal(stored["w_q"], first)
    np.testing.assert_array_equal(stored["m_q"], second.T)
    assert all(use.given for use in program.record.inventory.weights if use.op != "other")


@needs_exact_products
@pytest.mark.parametrize("axis", [0, None])
def test_integer_operators_are_layers_between_grids(tmp_path: Path, axis: int | None) -> None:
    w = _Writer()
    microsoft = "com.microsoft"
    x = w.grid("x", 0.03, 128, "uint8")
    w.node("QuantizeLinear", ["x", *x], "xq")
    names, whole = w.weight("w", GENERATOR.standard_normal((8, 3, 3, 3)), axis, "int8")
    c = w.grid("c", 0.2, 120, "uint8")
    bias = w.keep("b", GENERATOR.integers(-300, 300, 8).astype("int32"))
    w.node("QLinearConv", ["xq", *x, *names, *c, bias], "cq", pads=[1, 1, 1, 1])
    w.node("MaxPool", ["cq"], "pq", kernel_shape=[2, 2], strides=[2, 2])
    s = w.grid("s", 1 / 256, 0, "uint8")
    w.node("QLinearSigmoid", ["pq", *c, *s], "sq", microsoft)
    a = w.grid("a", 0.25, 110, "uint8")
    w.node("QLinearAdd", ["pq", *c, "sq", *s, *a], "aq", microsoft)
    w.node("Reshape", ["aq", w.keep("shape", np.array([1, -1]))], "fq")
    names, _ = w.weight("m", GENERATOR.standard_normal((4, 128)), axis, "int8")
    g = w.grid("g", 0.3, 128, "uint8")
    w.node("QGemm", ["fq", *a, *names, "", *g], "gq", microsoft, transB=1)
    o = w.grid("o", 1 / 256, 0, "uint8")
    w.node("QLinearSoftmax", ["gq", *g, *o], "oq", microsoft, axis=-1, opset=17)
    w.node("DequantizeLinear", ["oq", *o], "y")
    path = w.save(tmp_path / "m.onnx", {"x": [1, 3, 8, 8]}, ["y"])
    program = _program(import_onnx(path))
    # One step of the last grid: kernels divide where we multiply.
    for want, have in _answers(path, program, (1, 3, 8, 8)):
        assert np.abs(have - want).max() <= 1.01 / 256
    np.testing.assert_array_equal(program.encoded["w_q"].arrays()["values"], whole)
    assert len(program.encoded) == 2


@needs_exact_products
def test_integers_by_the_data_at_hand_become_weights_alone(tmp_path: Path) -> None:
    w = _Writer()
    w.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]))
    names, whole = w.weight("w", GENERATOR.standard_normal((32, 8)), None, "int8")
    w.node("MatMulInteger", ["xq", names[0], "xz", names[2]], "i")
    w.node("Cast", ["i"], "f", to=TensorProto.FLOAT)
    w.node("Mul", ["xs", names[1]], "both")
    w.node("Mul", ["f", "both"], "p")
    w.node("Add", ["p", w.keep("bias", GENERATOR.standard_normal(8).astype("f"))], "y")
    path = w.save(tmp_path / "m.onnx", {"x": [4, 32]}, ["y"])
    program = _program(import_onnx(path))
    assert program.record.inventory.activations == "dynamic"
    np.testing.assert_array_equal(program.encoded["w_q"].arrays()["values"], whole.T)
    for want, have in _answers(path, program, (4, 32)):
        assert np.abs(have - want).max() <= 0.02 * max(np.abs(want).max(), 1)
    targets = [str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.linear.default"]


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("value", [None, 40])
def test_what_moves_integers_keeps_their_grid(tmp_path: Path, kind: str, value: int | None) -> None:
    """A pad's value is an integer as well, and the place of the largest is where the largest integer stands."""
    w = _Writer()
    grid = w.grid("x", 0.03, 7, kind)
    w.node("QuantizeLinear", ["x", *grid], "xq")
    w.node("Resize", ["xq", "", w.keep("twice", np.array([1, 1, 2, 2], "f"))], "r", mode="nearest")
    pads = [w.keep("pads", np.array([0, 0, 1, 0, 0, 0, 0, 2]))]
    w.node("Pad", ["r", *pads, *([] if value is None else [w.keep("v", np.asarray(value, kind))])], "p")
    w.node("MaxPool", ["p"], "g", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    w.node("DequantizeLinear", ["g", *grid], "g_f")
    w.node("DequantizeLinear", ["p", *grid], "p_f")
    w.node("ArgMax", ["p"], "a", axis=1, keepdims=1)
    w.node("Cast", ["a"], "a_f", to=TensorProto.FLOAT)
    w.node("Mul", ["a_f", "p_f"], "m")
    w.node("Add", ["m", "g_f"], "y")
    path = w.save(tmp_path / "m.onnx", {"x": [1, 3, 4, 4]}, ["y"], opset=17)
    program = _program(import_onnx(path))
    for want, have in _answers(path, program, (1, 3, 4, 4)):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
    integers = [node for node in program.exported.graph.nodes if "int8" in str(node.meta.get("val"))]
    assert not integers


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_rows_of_an_integer_table_are_an_embedding(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    """onnxruntime's quantizer rounds the table of a Gather, and scales the rows behind it."""
    w = _Writer()
    names, whole = w.weight("table", GENERATOR.standard_normal((20, 8)), None, kind)
    w.nodes.append(helper.make_node("Gather", [names[0], "ids"], ["rows"]))
    w.node("DequantizeLinear", ["rows", *names[1:]], "y")
    path = w.save(tmp_path / "m.onnx", {"ids": list(shape)}, ["y"])
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    onnx.save(model, path)
    imported = import_onnx(path)
    (tensor,) = imported.encoded.values()
    np.testing.assert_array_equal(tensor.arrays()["values"], whole)
    ids = GENERATOR.integers(0, 20, shape)
    (want,) = onnxruntime.InferenceSession(path).run(None, {"ids": ids})
    np.testing.assert_allclose(imported.module(torch.from_numpy(ids))[0].numpy(), want, rtol=1e-6, atol=1e-6)
    targets = [str(node.target) for node in imported.module.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if "index_select" in target]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["tensor", "channel", "group"])
@pytest.mark.parametrize("turned", [False, True])
def test_integers_are_found_again_in_any_layout(bits: int, form: str, turned: bool) -> None:
    kind = {4: TensorProto.INT4, 8: TensorProto.UINT8}[bits]
    low, high = (-7, 8) if bits == 4 else (0, 256)
    whole = torch.from_numpy(GENERATOR.integers(low, high, (16, 32)))
    shape = {"tensor": (), "channel": (16,), "group": (16, 2)}[form]
    scale = torch.from_numpy(GENERATOR.uniform(0.001, 0.1, shape).astype("f"))
    zero = torch.full(shape, 0 if bits == 4 else 117)
    spread = scale if form == "tensor" else scale.repeat_interleave(32 // (scale.numel() // 16), -1).reshape(16, 32)
    weight = (whole - zero.reshape(-1)[0]).float() * spread
    weight = weight.t().contiguous() if turned else weight
    found = integers_again(weight, Integers(scale, zero, kind))
    assert found is not None
    np.testing.assert_array_equal(found.dequantize(), weight.numpy())
    np.testing.assert_array_equal(found.values, (whole.t() if turned else whole).numpy())
    assert integers_again(weight * 1.001, Integers(scale, zero, kind)) is None


def test_a_grid_that_something_reads_past_is_carried_apart(tmp_path: Path) -> None:
    w = _Writer()
    w.node("Mul", ["x", "x"], "a")
    q = w.pair("a", "a1", 0.5, 0, "uint8")
    w.node("Sub", ["a", q], "y")
    path = w.save(tmp_path / "m.onnx", {"x": [1, 16]}, ["y"])
    program = _program(import_onnx(path))
    for want, have in _answers(path, program, (1, 16)):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("runtime", ["onnx", "tflite"])
def test_a_file_with_pairs_is_shipped_as_it_was(tmp_path: Path, runtime: str) -> None:
    from edgeship.api import BuildOrder, run
    from edgeship.core.registry import runtimes
    from edgeship.shipping.bundle import opened, read_bundle

    path, first, _ = _pairs(tmp_path, "uint8", "int8", 0)
    report = run(BuildOrder(str(path), ("linux-x86",), (runtime,), "balanced", tmp_path / "out"))
    assert report.passed
    bundle = read_bundle(tmp_path / "out")
    record = bundle.manifest.artifacts[0]
    assert {item.bits for item in record.encodings.values()} == {8}
    artifact = opened(bundle, record)
    stored = runtimes()[runtime].read_weights(artifact)
    np.testing.assert_array_equal(stored["w_q"].arrays()["values"], first)
    x = GENERATOR.standard_normal((1, 3, 8, 8)).astype("f")
    (want,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    with runtimes()[runtime].open(artifact) as session:
        have = session.run({"x": x})["y"]
    assert np.abs(have - want).max() <= 0.02 * np.abs(want).max()


def _given(folder: Path, program: TorchProgram) -> TorchModel:
    program.save(folder / "program")
    return TorchModel(folder / "program", program.signature)


@pytest.mark.parametrize(
    ("activation", "centred", "kept"), [("uint16", True, 0), ("uint16", False, 5), ("int16", True, 5)]
)
def test_grids_that_a_runtime_lacks_stay_in_float(tmp_path: Path, activation: str, centred: bool, kept: int) -> None:
    from edgeship.passes.compress.calibrate import CalibrateActivations

    path, _, _ = _pairs(tmp_path, activation, "int8", 0)
    if activation == "uint16":
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.UINT16:
                tensor.CopyFrom(numpy_helper.from_array(np.array(30000, "uint16"), tensor.name))
        path.write_bytes(model.SerializeToString())
    model = _given(tmp_path, _program(import_onnx(path)))
    step = CalibrateActivations(16, "given", centred=centred)
    (tmp_path / "step").mkdir()
    made = TorchProgram.open(step.run(model, Context(tmp_path / "step")))
    assert bool(made.activations) == bool(kept)
    eight = CalibrateActivations(8, "given")
    (tmp_path / "eight").mkdir()
    assert not TorchProgram.open(eight.run(model, Context(tmp_path / "eight"))).activations


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("clips", [False, True])
def test_a_relu_hands_its_grid_back_where_that_costs_nothing(tmp_path: Path, zero: int, clips: bool) -> None:
    from edgeship.program.activations import spread_grids

    w = _Writer()
    x = w.pair("x", "x1", 0.03, 128, "uint8")
    names, _ = w.weight("w", GENERATOR.standard_normal((8, 3, 3, 3)), 0, "int8")
    w.node("DequantizeLinear", names, "w", axis=0)
    w.node("Conv", [x, "w"], "c")
    w.node("Relu", ["c"], "r")
    w.node("GlobalAveragePool", [w.pair("r", "r1", 0.1, zero, "uint8")], "y")
    program = _program(import_onnx(w.save(tmp_path / "m.onnx", {"x": [1, 3, 8, 8]}, ["y"])))
    found = spread_grids(program.exported, program.activations, clips=clips)
    assert ("conv2d" in found) == (clips or zero == 0)
