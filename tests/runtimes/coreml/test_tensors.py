"""Shapes, slices, indices and order, against NumPy; properties by hypothesis on the operations themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeship.errors import DataError

quick = settings(max_examples=60, deadline=None)
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)


def mb():
    from coremltools.converters.mil.mil import Builder

    return Builder


def counted(shape):
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


@quick
@given(st.data())
def test_slices_are_numpys(call_op, data):
    x = counted(data.draw(SHAPES))
    dims, keys = range(x.ndim), []
    begin = [data.draw(st.integers(-n, n - 1)) for n in x.shape]
    end = [data.draw(st.integers(-n, n)) for n in x.shape]
    stride = [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in dims]
    masks = [[data.draw(st.booleans()) for _ in dims] for _ in range(3)]
    for i in dims:
        start, stop = (None if masks[0][i] else begin[i]), (None if masks[1][i] else end[i])
        keys.append((0 if masks[0][i] else begin[i]) if masks[2][i] else slice(start, stop, stride[i]))
    names = ("begin_mask", "end_mask", "squeeze_mask")
    arguments = {"x": x, "begin": begin, "end": end, "stride": stride, **dict(zip(names, masks, strict=True))}
    want = x[tuple(keys)]
    np.testing.assert_array_equal(call_op("slice_by_index", **arguments), want)
    if want.size and want.ndim:
        updated = x.copy()
        updated[tuple(keys)] = -want
        np.testing.assert_array_equal(call_op("slice_update", update=-want, **arguments), updated)


@quick
@given(st.data())
def test_padding_is_numpys(call_op, data):
    x = counted(data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=2, max_side=5)))
    mode = data.draw(st.sampled_from(["constant", "reflect", "replicate"]))
    padded_axes = data.draw(st.integers(1, x.ndim))
    pairs = [(0, 0)] * (x.ndim - padded_axes)
    pairs += [tuple(data.draw(st.integers(0, n - 1)) for _ in range(2)) for n in x.shape[-padded_axes:]]
    extra = {"constant_values": 7} if mode == "constant" else {}
    want = np.pad(x, pairs, "edge" if mode == "replicate" else mode, **extra)
    flat = [n for pair in pairs[-padded_axes:] for n in pair]
    np.testing.assert_array_equal(call_op("pad", x=x, pad=flat, mode=mode, constant_val=np.int32(7)), want)


@quick
@given(st.data())
def test_reshape_transpose_and_flip(call_op, data):
    x = counted(data.draw(SHAPES))
    order = data.draw(st.permutations(range(x.ndim)))
    np.testing.assert_array_equal(call_op("transpose", x=x, perm=order), x.transpose(order))
    sizes = [x.shape[i] for i in order]
    sizes[data.draw(st.integers(0, x.ndim - 1))] = -1
    np.testing.assert_array_equal(call_op("reshape", x=x, shape=sizes), x.reshape(sizes))
    axes = [i for i in range(x.ndim) if data.draw(st.booleans())]
    np.testing.assert_array_equal(call_op("reverse", x=x, axes=axes), np.flip(x, axes))
    reps = [data.draw(st.integers(1, 3)) for _ in range(x.ndim)]
    np.testing.assert_array_equal(call_op("tile", x=x, reps=reps), np.tile(x, reps))


@quick
@given(st.data())
def test_indexing_is_numpys(call_op, data):
    x = counted(data.draw(SHAPES))
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    size = x.shape[axis]
    index = data.draw(hnp.arrays(np.int32, hnp.array_shapes(min_dims=0, max_dims=2, max_side=3),
                                 elements=st.integers(-size, size - 1)))  # fmt: skip
    np.testing.assert_array_equal(call_op("gather", opset=6, x=x, indices=index, axis=axis), np.take(x, index, axis))
    along = data.draw(hnp.arrays(np.int32, x.shape, elements=st.integers(0, size - 1)))
    np.testing.assert_array_equal(
        call_op("gather_along_axis", x=x, indices=along, axis=axis), np.take_along_axis(x, along, axis)
    )
    depth = data.draw(st.integers(1, x.ndim))
    places = np.stack([data.draw(hnp.arrays(np.int32, 3, elements=st.integers(0, n - 1))) for n in x.shape[:depth]], -1)
    np.testing.assert_array_equal(call_op("gather_nd", x=x, indices=places), x[tuple(places.T)])
    rows = counted((3, *x.shape[depth:])) + 1
    want = x.copy()
    np.add.at(want, tuple(places.T), rows)
    got = call_op("scatter_nd", data=x, indices=places, updates=rows, mode="add")
    np.testing.assert_array_equal(got, want)


COMBINE = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


@pytest.mark.parametrize("mode", [*COMBINE, "div", "update"])
def test_scatter_modes(call_op, mode):
    data = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
    index, updates = np.array([3, 0], np.int32), np.array([[2, 4], [8, 16], [5, 10]], np.float32)
    want = data.copy()
    combine = COMBINE.get(mode, np.divide)
    want[:, index] = updates if mode == "update" else combine(data[:, index], updates)
    np.testing.assert_allclose(call_op("scatter", data=data, indices=index, updates=updates, axis=1, mode=mode), want)
    along = np.tile(index, (3, 1))
    got = call_op("scatter_along_axis", data=data, indices=along, updates=updates, axis=-1, mode=mode)
    np.testing.assert_allclose(got, want)


def test_an_index_outside_is_an_error(call_op):
    with pytest.raises(DataError, match="index 3 of an axis of 3"):
        call_op("gather", x=np.zeros((3, 2), np.float32), indices=np.array([0, 3], np.int32))


@pytest.mark.parametrize(("opset", "want"), [("iOS16", None), ("iOS17", (1, 1, 2, 50))])
def test_zeros_in_a_reshape(call_op, opset, want):
    """Since iOS 17 a 0 takes the size of the same axis counted from the right; before, from the left."""
    x = np.zeros((2, 50), np.float32)
    if want:
        assert call_op("reshape", opset=7, x=x, shape=[1, 0, -1, 0]).shape == want
    else:
        assert call_op("reshape", opset=6, x=x, shape=[0, -1, 1]).shape == (2, 50, 1)


def test_batched_gathers(call_op):
    x = counted((2, 3, 4))
    index = np.array([[0, 2], [1, 1]], np.int32)
    got = call_op("gather", x=x, indices=index, axis=1, batch_dims=1)
    np.testing.assert_array_equal(got, np.stack([x[i][index[i]] for i in range(2)]))
    places = np.array([[[0, 3]], [[2, 1]]], np.int32)
    assert call_op("gather_nd", x=x, indices=places, batch_dims=1).tolist() == [[x[0, 0, 3]], [x[1, 2, 1]]]


def test_shapes_in_a_program(builder):
    x = counted((2, 1, 6)).astype(np.float32)

    def build(x):
        return [
            mb().expand_dims(x=x, axes=[0, -1]),
            mb().squeeze(x=x, axes=[1]),
            mb().flatten2d(x=x, axis=-1),
            mb().concat(values=[x, x], axis=1, interleave=False),
            mb().concat(values=[x, x], axis=2, interleave=True),
            mb().stack(values=[x, x], axis=1),
            *mb().split(x=x, split_sizes=[1, 5], axis=2),
            *mb().split(x=x, num_splits=3, axis=-1),
            mb().shape(x=x),
            mb().sliding_windows(x=x, axis=2, size=3, stride=2),
            mb().slice_by_size(x=x, begin=[0, 0, 2], size=[2, 1, -1]),
            mb().reverse_sequence(x=x, lengths=[2, 4], seq_axis=2, batch_axis=0),
            mb().band_part(x=x, lower=0, upper=2),
            mb().crop(x=x, crop_height=[0, 0], crop_width=[1, 2]),
            mb().reshape_like(x=x, ref_tensors=[x, x], begins=[0, 1], ends=[1, 3], end_masks=[False, False]),
        ]

    got = builder.run(build, {"x": x})
    backwards = x.copy()
    backwards[0, :, :2], backwards[1, :, :4] = x[0, :, 1::-1], x[1, :, 3::-1]
    want = [
        x.reshape(1, 2, 1, 6, 1), x.reshape(2, 6), x.reshape(2, 6), np.concatenate([x, x], 1), np.repeat(x, 2, axis=2),
        np.stack([x, x], 1), x[..., :1], x[..., 1:], x[..., :2], x[..., 2:4], x[..., 4:], np.array([2, 1, 6]),
        np.stack([x[..., 0:3], x[..., 2:5]], 2), x[..., 2:], backwards, x * (np.arange(6) <= 2), x[..., 1:4], x,
    ]  # fmt: skip
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


def test_order_and_numbers(builder):
    x = np.array([[3, 1, 2], [5, 9, 7]], np.float32)

    def build(x):
        return [
            *mb().topk(x=x, k=2, axis=1),
            *mb().topk(x=x, k=1, axis=0, ascending=True),
            mb().argsort(x=x, axis=-1),
            mb().cumsum(x=x, axis=1, exclusive=True, reverse=True),
            mb().non_zero(x=mb().slice_by_index(x=x, begin=[0, 0], end=[1, 2])),
            mb().one_hot(indices=[2, 0], one_hot_vector_size=3, on_value=5.0, off_value=-1.0),
            mb().range_1d(start=2.0, end=8.0, step=2.5),
            mb().fill(shape=[2, 2], value=1.5),
            mb().fill_like(ref_tensor=x, value=2.0),
        ]

    got = builder.run(build, {"x": x})
    want = [
        [[3, 2], [9, 7]], [[0, 2], [1, 2]], [[3, 1, 2]], [[0, 0, 0]], [[0, 2, 1], [1, 2, 0]],
        [[3, 2, 0], [16, 7, 0]], [[0, 0], [0, 1]], [[-1, -1, 5], [5, -1, -1]], [2, 4.5, 7],
        np.full((2, 2), 1.5), np.full((2, 3), 2.0),
    ]  # fmt: skip
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize(
    ("left", "right"), [((3,), (3,)), ((2, 3), (3,)), ((3,), (2, 3, 4)), ((5, 1, 2, 3), (4, 3, 2))]
)
def test_matmul_is_numpys(call_op, left, right):
    x, y = (np.random.default_rng(1).standard_normal(shape).astype(np.float32) for shape in (left, right))
    np.testing.assert_allclose(call_op("matmul", x=x, y=y), np.matmul(x, y), rtol=1e-5, atol=1e-6)


def test_linear_matmul_einsum_and_attention(builder):
    rng = np.random.default_rng(2)
    x, weight = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 4, 5), (7, 5)))
    mask = rng.standard_normal((4, 4)).astype(np.float32)
    keep = np.tril(np.ones((4, 4), bool))

    def build(x):
        return [
            mb().linear(x=mb().reshape(x=x, shape=[2, 12, 5]), weight=weight, bias=np.arange(7, dtype=np.float32)),
            mb().matmul(x=x, y=x, transpose_x=True),
            mb().einsum(values=[x, mb().transpose(x=x, perm=[0, 3, 2, 1])], equation="nchw,nwhu->nchu"),
            mb().scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=mask),
            mb().scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=keep),
        ]

    got = builder.run(build, {"x": x}, "iOS18")

    def attend(scores):
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        return odds / odds.sum(-1, keepdims=True) @ x

    scores = x @ x.swapaxes(-1, -2) / np.sqrt(5)
    want = [
        x.reshape(2, 12, 5) @ weight.T + np.arange(7), x.swapaxes(-1, -2) @ x,
        np.einsum("nchw,nwhu->nchu", x, x.transpose(0, 3, 2, 1)), attend(scores + mask),
        attend(np.where(keep, scores, -np.inf)),
    ]  # fmt: skip
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
