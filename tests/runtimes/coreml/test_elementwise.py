"""Element by element operations, activations and reductions, in both precisions, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special

X = np.array([[-2.5, -1.0, -0.5, 0.0], [0.5, 1.0, 1.5, 3.25]])
UNIT = np.array([[-0.9, -0.25, 0.0, 0.5]])
POSITIVE = np.array([[0.125, 0.5, 1.0, 7.5]])

UNARY = {
    "abs": (np.abs, X), "acos": (np.arccos, UNIT), "asin": (np.arcsin, UNIT), "atan": (np.arctan, X),
    "atanh": (np.arctanh, UNIT), "ceil": (np.ceil, X), "cos": (np.cos, X), "cosh": (np.cosh, X),
    "erf": (special.erf, X), "exp": (np.exp, X), "exp2": (np.exp2, X), "floor": (np.floor, X),
    "round": (np.round, X), "sign": (np.sign, X), "sin": (np.sin, X), "sinh": (np.sinh, X),
    "sqrt": (np.sqrt, POSITIVE), "square": (np.square, X), "tan": (np.tan, UNIT), "tanh": (np.tanh, X),
    "relu": (lambda x: np.maximum(x, 0), X), "relu6": (lambda x: np.clip(x, 0, 6), 4 * X),
    "sigmoid": (special.expit, X), "silu": (lambda x: x * special.expit(x), X),
    "softplus": (lambda x: np.log1p(np.exp(x)), X), "softsign": (lambda x: x / (1 + np.abs(x)), X),
    "identity": (lambda x: x, X),
}  # fmt: skip

PARAMETRIC = {
    "clip": ({"alpha": -1.0, "beta": 1.25}, lambda x: np.clip(x, -1, 1.25)),
    "threshold": ({"alpha": -0.75}, lambda x: np.maximum(x, -0.75)),
    "elu": ({"alpha": 0.5}, lambda x: np.where(x > 0, x, 0.5 * (np.exp(x) - 1))),
    "leaky_relu": ({"alpha": 0.25}, lambda x: np.where(x >= 0, x, 0.25 * x)),
    "clamped_relu": ({"alpha": 0.5, "beta": 2.0}, lambda x: np.minimum(np.where(x >= 0, x, 0.5 * x), 2)),
    "thresholded_relu": ({"alpha": 0.75}, lambda x: np.where(x >= 0.75, x, 0)),
    "linear_activation": ({"alpha": 2.0, "beta": 0.5}, lambda x: 2 * x + 0.5),
    "scaled_tanh": ({"alpha": 1.5, "beta": 0.5}, lambda x: 1.5 * np.tanh(0.5 * x)),
    "sigmoid_hard": ({"alpha": 0.25, "beta": 0.5}, lambda x: np.clip(0.25 * x + 0.5, 0, 1)),
    "inverse": ({"epsilon": 0.0625}, lambda x: 1 / (x + 0.0625)),
    "softmax": ({"axis": 0}, lambda x: special.softmax(x, axis=0)),
}

REDUCTIONS = {
    "reduce_sum": np.sum, "reduce_mean": np.mean, "reduce_max": np.max, "reduce_min": np.min, "reduce_prod": np.prod,
    "reduce_l1_norm": lambda x, **k: np.sum(np.abs(x), **k),
    "reduce_l2_norm": lambda x, **k: np.sqrt(np.sum(x * x, **k)),
    "reduce_sum_square": lambda x, **k: np.sum(x * x, **k),
    "reduce_log_sum": lambda x, **k: np.log(np.sum(x, **k)),
    "reduce_log_sum_exp": special.logsumexp,
}  # fmt: skip


def mb():
    from coremltools.converters.mil.mil import Builder

    return Builder


def close(got, want, dtype):
    """Rounded once: exact to half a unit in the last place, and float32 functions differ by a few."""
    want = np.asarray(want)
    assert got.dtype == dtype
    assert got.shape == want.shape
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2.0**-10 if dtype == np.float16 else 2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_functions_of_one_number(builder, dtype):
    """All in one program: an output each."""
    inputs = {name: np.asarray(x, dtype) for name, (_, x) in UNARY.items()}
    outputs = builder.run(lambda **v: [getattr(mb(), name)(x=v[name]) for name in UNARY], inputs)
    for name, got in zip(UNARY, outputs, strict=True):
        close(got, UNARY[name][0](inputs[name].astype(np.float64)), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_functions_with_parameters(builder, dtype):
    x = X.astype(dtype)

    def build(x):
        return [
            getattr(mb(), name)(x=x, **{k: v if k == "axis" else dtype(v) for k, v in parameters.items()})
            for name, (parameters, _) in PARAMETRIC.items()
        ]

    for (_, expected), got in zip(PARAMETRIC.values(), builder.run(build, {"x": x}), strict=True):
        close(got, expected(x.astype(np.float64)), dtype)


@pytest.mark.parametrize("mode", ["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"])
def test_gelu(builder, mode):
    (got,) = builder.run(lambda x: mb().gelu(x=x, mode=mode), {"x": X.astype(np.float32)})
    inner = math.sqrt(2 / math.pi) * (X + 0.044715 * X**3)
    want = {
        "EXACT": X * special.ndtr(X),
        "TANH_APPROXIMATION": X * (1 + np.tanh(inner)) / 2,
        "SIGMOID_APPROXIMATION": X * special.expit(1.702 * X),
    }
    np.testing.assert_allclose(got, want[mode], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep_dims", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_reductions(builder, dtype, keep_dims):
    x = np.linspace(0.25, 2, 24).reshape(2, 3, 4).astype(dtype)

    def build(x):
        return [getattr(mb(), name)(x=x, axes=[0, -1], keep_dims=keep_dims) for name in REDUCTIONS]

    for function, got in zip(REDUCTIONS.values(), builder.run(build, {"x": x}), strict=True):
        close(got, function(x.astype(np.float64), axis=(0, 2), keepdims=keep_dims), dtype)


def test_reduction_over_everything_is_a_scalar(builder):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    total, place = builder.run(lambda x: [mb().reduce_sum(x=x), mb().reduce_argmax(x=x, axis=-1)], {"x": x})
    assert total.shape == ()
    assert total == 15
    assert place.tolist() == [2, 2]
    assert place.dtype == np.int32


ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide, "floor_div": np.floor_divide,
    "mod": np.mod, "maximum": np.maximum, "minimum": np.minimum, "equal": np.equal, "not_equal": np.not_equal,
    "greater": np.greater, "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32])
def test_arithmetic_broadcasts(builder, dtype):
    x = np.array([[-7], [3], [6]], dtype)
    y = np.array([[2, -4, 3]], dtype)
    names = [name for name in ARITHMETIC if dtype != np.int32 or name != "real_div"]
    outputs = builder.run(
        lambda x, y: [mb().cast(x=getattr(mb(), n)(x=x, y=y), dtype="fp32") for n in names], {"x": x, "y": y}
    )
    for name, got in zip(names, outputs, strict=True):
        np.testing.assert_array_equal(got, ARITHMETIC[name](x, y).astype(np.float32), err_msg=name)


def test_whole_division_cuts_towards_zero_and_power_of_integers(call_op):
    x, y = np.array([-7, 7], np.int32), np.array([2, 2], np.int32)
    assert call_op("real_div", x=x, y=y).tolist() == [-3, 3]
    assert call_op("pow", x=x, y=y).tolist() == [49, 49]
    assert call_op("floor_div", x=x, y=y).tolist() == [-4, 3]


def test_logic_select_and_cast(builder):
    a, b = np.array([[1, 1, 0, 0]], np.int32), np.array([[1, 0, 1, 0]], np.int32)

    def build(a, b):
        p, q = mb().cast(x=a, dtype="bool"), mb().cast(x=b, dtype="bool")
        made = [
            mb().logical_and(x=p, y=q),
            mb().logical_or(x=p, y=q),
            mb().logical_xor(x=p, y=q),
            mb().logical_not(x=p),
        ]
        return [*[mb().cast(x=m, dtype="int32") for m in made], mb().select(cond=p, a=a, b=b)]

    both, either, one, neither, chosen = builder.run(build, {"a": a, "b": b})
    assert both.tolist() == [[1, 0, 0, 0]]
    assert either.tolist() == [[1, 1, 1, 0]]
    assert one.tolist() == [[0, 1, 1, 0]]
    assert neither.tolist() == [[0, 0, 1, 1]]
    assert chosen.tolist() == [[1, 1, 1, 0]]


def test_each_operation_is_rounded_to_float16(builder):
    """(1 + 2^-11) rounds to 1 before the subtraction, and 300 * 300 is beyond float16."""
    x = np.array([1.0, 300.0], np.float16)

    def build(x):
        small = mb().sub(x=mb().add(x=x, y=np.float16(2.0**-11)), y=x)
        return [small, mb().mul(x=x, y=x)]

    small, large = builder.run(build, {"x": x})
    assert small[0] == 0
    assert large.tolist() == [1.0, np.inf]


def test_products_are_summed_in_float32(builder):
    """4096 ones: float16 would stop counting at 2048."""
    x = np.ones((1, 4096), np.float16)
    (got,) = builder.run(lambda x: mb().matmul(x=x, y=x, transpose_y=True), {"x": x})
    assert got.item() == 4096


def test_default_epsilon_is_rounded_to_the_type(call_op):
    zero = np.zeros(1)
    assert call_op("log", x=zero.astype(np.float16)).item() == -np.inf
    assert np.isfinite(call_op("log", x=zero.astype(np.float32)).item())
