"""Operators with many corners, compared with ONNX Runtime over random attributes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_files import assert_matches_onnxruntime, floats, ints, save_model

QUICK = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(data=st.data())
def test_slice(tmp_path: Path, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    axes = data.draw(st.lists(st.integers(-len(shape), len(shape) - 1), unique_by=lambda a: a % len(shape), min_size=1))
    bound = st.integers(-7, 7)
    steps = [data.draw(st.sampled_from([-3, -2, -1, 1, 2, 3])) for _ in axes]
    starts = [data.draw(bound) for _ in axes]
    # "To the end" is the largest int forwards and the smallest backwards; the others ONNX Runtime reads its own way.
    ends = [data.draw(bound | st.sampled_from([n if step > 0 else -n for n in (1 << 31, 1 << 62)])) for step in steps]
    x = floats(*shape)
    node = helper.make_node("Slice", ["x", "s", "e", "a", "t"], ["y"])
    weights = {"s": ints(*starts), "e": ints(*ends), "a": ints(*axes), "t": ints(*steps)}
    assert_matches_onnxruntime(save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], weights), {"x": x})


@QUICK
@given(data=st.data())
def test_pad(tmp_path: Path, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(["constant", "reflect", "edge", "wrap"]))
    shape = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    low = -1 if mode == "constant" else 0
    pads = [data.draw(st.integers(low, shape[axis % len(shape)] - 1)) for axis in range(2 * len(shape))]
    x = floats(*shape)
    node = helper.make_node("Pad", ["x", "p", "v"], ["y"], mode=mode)
    weights = {"p": ints(*pads), "v": np.array(1.5, np.float32)}
    path = save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], weights, opset=19)
    assert_matches_onnxruntime(path, {"x": x})


@QUICK
@given(data=st.data())
def test_reshape(tmp_path: Path, data: st.DataObject) -> None:
    shape = data.draw(st.permutations([1, 2, 3, 4]))
    target = data.draw(st.sampled_from([[0, -1], [-1], [2, 0, -1], [0, 0, -1], [24, 1], [1, 4, -1, 2], [6, 4]]))
    assume(math.prod(shape[i] if t == 0 else abs(t) for i, t in enumerate(target)) in (24, *range(1, 25)))
    known = math.prod(shape[i] if t == 0 else t for i, t in enumerate(target) if t != -1)
    assume(24 % known == 0 and (-1 in target or known == 24))
    x = floats(*shape)
    node = helper.make_node("Reshape", ["x", "s"], ["y"])
    assert_matches_onnxruntime(save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], {"s": ints(*target)}), {"x": x})


@QUICK
@given(data=st.data())
def test_resize(tmp_path: Path, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]))
    coordinates = data.draw(
        st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"])
    )
    attributes: dict[str, object] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        kinds = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
        attributes["nearest_mode"] = data.draw(st.sampled_from(kinds))
    if mode == "cubic":
        attributes["exclude_outside"] = data.draw(st.integers(0, 1))
    height, width = data.draw(st.tuples(st.integers(2, 6), st.integers(2, 6)))
    x = floats(1, 2, height, width)
    sizes = data.draw(st.booleans())
    if sizes:
        target = ints(1, 2, *(data.draw(st.integers(2, 11)) for _ in range(2)))
        node = helper.make_node("Resize", ["x", "", "", "t"], ["y"], **attributes)
        weights = {"t": target}
    else:
        scales = [data.draw(st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])) for _ in range(2)]
        node = helper.make_node("Resize", ["x", "", "t"], ["y"], **attributes)
        weights = {"t": np.array([1, 1, *scales], np.float32)}
    path = save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], weights, opset=19)
    assert_matches_onnxruntime(path, {"x": x}, atol=1e-4)


@QUICK
@given(data=st.data())
def test_convolution(tmp_path: Path, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    group = data.draw(st.sampled_from([1, 2]))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    attributes: dict[str, object] = {
        "strides": [data.draw(st.integers(1, 3)) for _ in range(rank)],
        "group": group,
    }
    auto = data.draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto == "NOTSET":
        attributes["pads"] = [data.draw(st.integers(0, 2)) for _ in range(2 * rank)]
        attributes["dilations"] = [data.draw(st.integers(1, 2)) for _ in range(rank)]
    else:
        attributes["auto_pad"] = auto
    x = floats(2, 4, *[7] * rank)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    weights = {"w": floats(6, 4 // group, *kernel, seed=1), "b": floats(6, seed=2)}
    assert_matches_onnxruntime(save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], weights), {"x": x}, atol=1e-4)


@QUICK
@given(data=st.data())
def test_transposed_convolution(tmp_path: Path, data: st.DataObject) -> None:
    strides = [data.draw(st.integers(1, 3)) for _ in range(2)]
    attributes: dict[str, object] = {"strides": strides, "group": data.draw(st.sampled_from([1, 2]))}
    kernel = [data.draw(st.integers(2, 4)) for _ in range(2)]
    auto = data.draw(st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER"]))
    if auto == "pads":
        attributes["pads"] = [data.draw(st.integers(0, 1)) for _ in range(4)]
        attributes["output_padding"] = [data.draw(st.integers(0, stride - 1)) for stride in strides]
    else:
        # ONNX Runtime crops nothing where the kernel is shorter than the stride.
        assume(all(size >= stride for size, stride in zip(kernel, strides, strict=True)))
        attributes["auto_pad"] = auto
    x = floats(1, 4, 3, 5)
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], **attributes)
    out = 6 // int(attributes["group"])  # type: ignore[call-overload]
    weights = {"w": floats(4, out, *kernel, seed=1), "b": floats(6, seed=2)}
    assert_matches_onnxruntime(save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], weights), {"x": x}, atol=1e-4)


@QUICK
@given(data=st.data())
def test_pools(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["MaxPool", "AveragePool"]))
    rank = data.draw(st.integers(1, 3))
    kernel = [data.draw(st.integers(2, 3)) for _ in range(rank)]
    attributes: dict[str, object] = {
        "kernel_shape": kernel,
        "strides": [data.draw(st.integers(1, 3)) for _ in range(rank)],
        "pads": [data.draw(st.integers(0, kernel[axis % rank] - 1)) for axis in range(2 * rank)],
        "ceil_mode": data.draw(st.integers(0, 1)),
    }
    if kind == "AveragePool":
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
        # ONNX Runtime counts what lies beyond the padding as well, against the specification.
        assume(not (attributes["count_include_pad"] and attributes["ceil_mode"]))
    x = floats(1, 2, *[8] * rank)
    outputs = ["y", "i"] if kind == "MaxPool" and data.draw(st.booleans()) else ["y"]
    node = helper.make_node(kind, ["x"], outputs, **attributes)
    path = save_model(tmp_path / "m.onnx", [node], {"x": x}, outputs, opset=19)
    assert_matches_onnxruntime(path, {"x": x})


@QUICK
@given(data=st.data())
def test_reductions(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(
        st.sampled_from(["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp", "LogSum"])
    )
    axes = data.draw(st.lists(st.integers(-3, 2), unique_by=lambda a: a % 3, max_size=3))
    x = np.abs(floats(2, 3, 4)) + 0.1
    attributes = {"keepdims": data.draw(st.integers(0, 1)), "noop_with_empty_axes": data.draw(st.integers(0, 1))}
    node = helper.make_node(f"Reduce{name}", ["x", "a"], ["y"], **attributes)
    # Over no axes ONNX Runtime leaves out the elementwise part, which the specification asks for.
    assume(axes or not attributes["noop_with_empty_axes"] or name in ("Sum", "Mean", "Max", "Min", "Prod"))
    path = save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], {"a": ints(*axes)})
    assert_matches_onnxruntime(path, {"x": x})


@QUICK
@given(data=st.data())
def test_gathers_and_scatters(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["Gather", "GatherElements", "ScatterElements"]))
    axis = data.draw(st.integers(-3, 2))
    x = floats(3, 4, 5)
    size = x.shape[axis]
    shape = (2, 3) if kind == "Gather" else (2, 2, 2)
    index = np.array(data.draw(st.permutations(range(size)))[:2] * (math.prod(shape) // 2))
    if kind == "Gather":
        values = index.reshape(shape)
    else:
        # Each line along the axis gets two different indices: which duplicate wins is undefined.
        values = np.moveaxis(np.broadcast_to(index[:2], shape), -1, axis).copy()
    if data.draw(st.booleans()):
        values = values - size
    inputs = {"x": x, "i": values.astype(np.int64)}
    weights = {}
    if data.draw(st.booleans()):
        weights["i"] = inputs.pop("i")
    names = ["x", "i"]
    if kind == "ScatterElements":
        inputs["u"] = floats(*shape, seed=3)
        names.append("u")
    node = helper.make_node(kind, names, ["y"], axis=axis)
    assert_matches_onnxruntime(save_model(tmp_path / "m.onnx", [node], inputs, ["y"], weights), inputs)


@QUICK
@given(data=st.data())
def test_recurrent_layers(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    direction = data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    ways, gates = (2 if direction == "bidirectional" else 1), {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    hidden, width, time, batch = 3, 4, 5, 2
    x = floats(time, batch, width)
    weights = {
        "w": floats(ways, gates * hidden, width, seed=1),
        "r": floats(ways, gates * hidden, hidden, seed=2),
        "b": floats(ways, 2 * gates * hidden, seed=3),
        "h": floats(ways, batch, hidden, seed=4),
        "c": floats(ways, batch, hidden, seed=5),
        "p": floats(ways, 3 * hidden, seed=6),
        "l": np.array([5, 3], np.int32),
    }
    lengths = "l" if data.draw(st.booleans()) else ""
    names = ["x", "w", "r", data.draw(st.sampled_from(["b", ""])), lengths, data.draw(st.sampled_from(["h", ""]))]
    outputs = ["y", "yh"]
    attributes: dict[str, object] = {"hidden_size": hidden, "direction": direction}
    if kind == "LSTM":
        names += [data.draw(st.sampled_from(["c", ""])), data.draw(st.sampled_from(["p", ""]))]
        outputs.append("yc")
    if kind == "GRU":
        attributes["linear_before_reset"] = data.draw(st.integers(0, 1))
    node = helper.make_node(kind, names, outputs, **attributes)
    used = {name: value for name, value in weights.items() if name in names}
    path = save_model(tmp_path / "m.onnx", [node], {"x": x}, outputs, used, opset=14)
    assert_matches_onnxruntime(path, {"x": x})


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        (helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"), {}),
        (helper.make_node("BiasGelu", ["x", "b"], ["y"], domain="com.microsoft"), {"b": floats(8, seed=1)}),
        (helper.make_node("FastGelu", ["x", "b"], ["y"], domain="com.microsoft"), {"b": floats(8, seed=1)}),
        (helper.make_node("QuickGelu", ["x"], ["y"], domain="com.microsoft"), {}),
        (
            helper.make_node("SkipLayerNormalization", ["x", "x", "g", "b"], ["y"], domain="com.microsoft"),
            {"g": floats(8, seed=1), "b": floats(8, seed=2)},
        ),
        (
            helper.make_node("SkipSimplifiedLayerNormalization", ["x", "x", "g"], ["y"], domain="com.microsoft"),
            {"g": floats(8, seed=1)},
        ),
        (helper.make_node("SimplifiedLayerNormalization", ["x", "g"], ["y"]), {"g": floats(8, seed=1)}),
        (helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", alpha=0.5, transB=1),
         {"w": floats(4, 8)}),
    ],
    ids=lambda value: value.op_type if hasattr(value, "op_type") else "",
)  # fmt: skip
def test_contrib_operators(tmp_path: Path, node: object, weights: dict[str, np.ndarray]) -> None:
    x = floats(2, 3, 8)
    path = save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], weights, opset=17, domains={"com.microsoft": 1})
    assert_matches_onnxruntime(path, {"x": x}, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 48])
def test_matmul_of_packed_four_bit_weights(tmp_path: Path, symmetric: bool, columns: int) -> None:
    rows, block = 6, 32
    blocks = -(-columns // block)
    chance = np.random.default_rng(0)
    weights = {
        "q": chance.integers(0, 256, (rows, blocks, block // 2)).astype(np.uint8),
        "s": np.abs(floats(rows * blocks, seed=1)),
    }
    names = ["x", "q", "s"]
    if not symmetric:
        weights["z"] = chance.integers(0, 256, rows * -(-blocks // 2)).astype(np.uint8)
        names.append("z")
    node = helper.make_node(
        "MatMulNBits", names, ["y"], domain="com.microsoft", K=columns, N=rows, bits=4, block_size=block
    )
    x = floats(2, 3, columns)
    path = save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], weights, domains={"com.microsoft": 1})
    imported = assert_matches_onnxruntime(path, {"x": x}, atol=1e-3)
    assert [(name, tuple(p.shape)) for name, p in imported.module.named_parameters()] == [("q", (rows, columns))]


def test_a_loop_with_a_known_count_is_unrolled(tmp_path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"]),
            helper.make_node("Identity", ["going"], ["still"]),
            helper.make_node("Relu", ["next"], ["seen"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, 3]),
        ],
        [helper.make_empty_tensor_value_info(name) for name in ("still", "next", "seen")],
        [helper.make_tensor("w", TensorProto.FLOAT, [3, 3], floats(3, 3).reshape(-1).tolist())],
    )
    node = helper.make_node("Loop", ["n", "", "x"], ["y", "all"], body=body)
    x = floats(2, 3)
    path = save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y", "all"], {"n": np.array(4, np.int64)})
    imported = assert_matches_onnxruntime(path, {"x": x}, export=True)
    assert [name for name, _ in imported.module.named_parameters()] == ["w"]


def test_a_local_function_is_inlined(tmp_path: Path) -> None:
    body = [
        helper.make_node("Mul", ["a", "a"], ["sq"]),
        helper.make_node("LeakyRelu", ["sq"], ["b"]),
    ]
    reference = body[1].attribute.add(name="alpha", type=1)
    reference.ref_attr_name = "slope"
    function = helper.make_function("mine", "Square", ["a"], ["b"], body, [helper.make_opsetid("", 18)], ["slope"])
    node = helper.make_node("Square", ["x"], ["y"], domain="mine", slope=0.3)
    x = floats(2, 3)
    path = save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], domains={"mine": 1}, functions=[function])
    assert_matches_onnxruntime(path, {"x": x}, export=True)
