"""Convolutions, pools, normalizations and resizing, against PyTorch or the grid written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((2, 4, 9, 7)).astype(np.float32)


def mb():
    from coremltools.converters.mil.mil import Builder

    return Builder


def near(got, want, tolerance=1e-5):
    assert tuple(got.shape) == tuple(want.shape)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_convolutions(builder, dtype):
    x = IMAGE.astype(dtype)
    plain = RNG.standard_normal((6, 4, 3, 2)).astype(dtype)
    depthwise = RNG.standard_normal((4, 1, 3, 3)).astype(dtype)
    bias = RNG.standard_normal(6).astype(dtype)
    custom = {"pad_type": "custom", "pad": [1, 0, 2, 1]}

    def build(x):
        return [
            mb().conv(x=x, weight=plain, bias=bias, strides=[2, 1], dilations=[1, 2], **custom),
            mb().conv(x=x, weight=depthwise, groups=4, pad_type="valid"),
            mb().conv(x=x, weight=plain, strides=[2, 2], pad_type="same"),
            mb().conv(x=x, weight=plain, strides=[2, 2], pad_type="same_lower"),
        ]

    got = builder.run(build, {"x": x})
    t, w, b = (torch.from_numpy(a.astype(np.float32)) for a in (x, plain, bias))
    want = [
        F.conv2d(F.pad(t, (2, 1, 1, 0)), w, b, stride=(2, 1), dilation=(1, 2)),
        F.conv2d(t, torch.from_numpy(depthwise.astype(np.float32)), groups=4),
        F.conv2d(F.pad(t, (0, 1, 1, 1)), w, stride=2),
        F.conv2d(F.pad(t, (1, 0, 1, 1)), w, stride=2),
    ]
    for g, e in zip(got, want, strict=True):
        near(g.astype(np.float32), e, 1e-5 if dtype == np.float32 else 2**-9)


@pytest.mark.parametrize("spatial", [1, 3])
def test_convolutions_of_other_ranks(builder, spatial):
    x = RNG.standard_normal((1, 2, 6, 5, 4)[: spatial + 2]).astype(np.float32)
    w = RNG.standard_normal((3, 2, 3, 2, 1)[: spatial + 2]).astype(np.float32)
    back = RNG.standard_normal((2, 3, 3, 2, 1)[: spatial + 2]).astype(np.float32)
    conv, transposed = builder.run(
        lambda x: [mb().conv(x=x, weight=w, pad_type="valid"), mb().conv_transpose(x=x, weight=back)], {"x": x}
    )
    t = torch.from_numpy(x)
    near(conv, getattr(F, f"conv{spatial}d")(t, torch.from_numpy(w)))
    near(transposed, getattr(F, f"conv_transpose{spatial}d")(t, torch.from_numpy(back)))


def test_transposed_convolutions(builder):
    w = RNG.standard_normal((4, 3, 4, 3)).astype(np.float32)
    grouped = RNG.standard_normal((4, 2, 3, 3)).astype(np.float32)
    bias = np.array([1, 2, 3], np.float32)

    def build(x):
        return [
            mb().conv_transpose(x=x, weight=w, bias=bias, strides=[2, 2], pad_type="custom", pad=[1, 1, 0, 1]),
            mb().conv_transpose(x=x, weight=w, strides=[2, 2], pad_type="same"),
            mb().conv_transpose(x=x, weight=grouped, groups=2, dilations=[2, 1]),
        ]

    custom, same, groups = builder.run(build, {"x": IMAGE})
    t, tw = torch.from_numpy(IMAGE), torch.from_numpy(w)
    full = F.conv_transpose2d(t, tw, stride=2)
    near(custom, full[:, :, 1:-1, :-1] + torch.from_numpy(bias).reshape(1, 3, 1, 1))
    near(same, full[:, :, 1:19, 0:14])
    near(groups, F.conv_transpose2d(t, torch.from_numpy(grouped), groups=2, dilation=(2, 1)))


POOLS = [
    {"kernel_sizes": [3, 2], "strides": [2, 2], "pad_type": "valid"},
    {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]},
    {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1], "ceil_mode": True},
    {"kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": "valid", "ceil_mode": True},
]


@pytest.mark.parametrize("pool", POOLS)
def test_pools_are_pytorchs(builder, pool):
    def build(x):
        return [
            mb().max_pool(x=x, **pool),
            mb().avg_pool(x=x, **pool),
            mb().avg_pool(x=x, exclude_padding_from_average=True, **pool),
        ]

    largest, average, real_average = builder.run(build, {"x": IMAGE})
    t, pad = torch.from_numpy(IMAGE), pool.get("pad", [0, 0, 0, 0])
    common = (pool["kernel_sizes"], pool["strides"], [pad[0], pad[2]])
    ceil = pool.get("ceil_mode", False)
    near(largest, F.max_pool2d(t, *common, ceil_mode=ceil))
    near(average, F.avg_pool2d(t, *common, ceil_mode=ceil, count_include_pad=True))
    near(real_average, F.avg_pool2d(t, *common, ceil_mode=ceil, count_include_pad=False))


def test_same_pools_and_l2(builder):
    def build(x):
        return [
            mb().max_pool(x=x, kernel_sizes=[2, 3], strides=[2, 2], pad_type="same"),
            mb().avg_pool(
                x=x, kernel_sizes=[2, 3], strides=[2, 2], pad_type="same_lower", exclude_padding_from_average=True
            ),
            mb().l2_pool(x=x, kernel_sizes=[2, 3], strides=[1, 1], pad_type="valid"),
        ]

    largest, average, l2 = builder.run(build, {"x": IMAGE})
    t = torch.from_numpy(IMAGE)
    near(largest, F.max_pool2d(F.pad(t, (1, 1, 0, 1), value=-torch.inf), (2, 3), 2))
    ones = F.avg_pool2d(F.pad(torch.ones_like(t), (1, 1, 1, 0)), (2, 3), 2)
    near(average, F.avg_pool2d(F.pad(t, (1, 1, 1, 0)), (2, 3), 2) / ones)
    near(l2, torch.sqrt(F.avg_pool2d(t * t, (2, 3), 1) * 6))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_normalizations(builder, dtype):
    x = IMAGE.astype(dtype)
    mean, gamma, beta = (RNG.standard_normal(4).astype(dtype) for _ in range(3))
    variance = np.array([0.5, 1, 2, 3], dtype)
    wide = RNG.standard_normal((9, 7)).astype(dtype)
    e = dtype(1e-3)

    def build(x):
        return [
            mb().batch_norm(x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=e),
            mb().instance_norm(x=x, gamma=gamma, beta=beta, epsilon=e),
            mb().layer_norm(x=x, axes=[2, 3], gamma=wide, beta=wide, epsilon=e),
            mb().l2_norm(x=x, epsilon=e),
            mb().local_response_norm(x=x, size=3, alpha=dtype(0.5), beta=dtype(0.75), k=dtype(1)),
        ]

    t, tm, tg, tb, tv, tw = (torch.from_numpy(a.astype(np.float32)) for a in (x, mean, gamma, beta, variance, wide))
    epsilon = float(e)
    want = [
        F.batch_norm(t, tm, tv, tg, tb, eps=epsilon),
        F.instance_norm(t, weight=tg, bias=tb, eps=epsilon),
        F.layer_norm(t, (9, 7), tw, tw, eps=epsilon),
        t / torch.sqrt((t * t).sum((1, 2, 3), keepdim=True) + epsilon),
        F.local_response_norm(t, 3, alpha=0.5, beta=0.75, k=1),
    ]
    for got, expected in zip(builder.run(build, {"x": x}), want, strict=True):
        near(got.astype(np.float32), expected, 1e-5 if dtype == np.float32 else 2**-10)


def test_prelu_and_softplus_by_channel(builder):
    alpha, beta = np.array([0.1, 0.2, 0.3, 0.4], np.float32), np.array([1, 2, 3, 4], np.float32)
    prelu, softplus = builder.run(
        lambda x: [mb().prelu(x=x, alpha=alpha), mb().softplus_parametric(x=x, alpha=alpha, beta=beta)], {"x": IMAGE}
    )
    t, a, b = torch.from_numpy(IMAGE), torch.from_numpy(alpha), torch.from_numpy(beta).reshape(1, 4, 1, 1)
    near(prelu, F.prelu(t, a))
    near(softplus, a.reshape(1, 4, 1, 1) * torch.log1p(torch.exp(b * t)))


# From the definition of resize_bilinear: positions in an axis of two elements, resized to five and to six.
GRIDS = {
    "UNALIGN_CORNERS": [0, 0.1, 0.5, 0.9, 1],
    "STRICT_ALIGN_CORNERS": [0, 0.25, 0.5, 0.75, 1],
    "ALIGN_CORNERS": [0, 0.25, 0.5, 0.75, 1],
    "DEFAULT": [0, 0.4, 0.8, 1, 1],
    "OFFSET_CORNERS": [0.1, 0.3, 0.5, 0.7, 0.9],
}


def test_sampling_modes(builder):
    x = np.array([[[[0, 1]]]], np.float32)

    def build(x):
        old = [
            mb().resize_bilinear(x=x, target_size_height=1, target_size_width=5, sampling_mode=mode) for mode in GRIDS
        ]
        new = [
            mb().resize(x=x, shape=[1, 5], resized_dims=np.uint32(2), interpolation_mode="LINEAR", sampling_mode=mode)
            for mode in GRIDS
        ]
        return old + new

    for got, want in zip(builder.run(build, {"x": x}), [*GRIDS.values(), *GRIDS.values()], strict=True):
        np.testing.assert_allclose(got.reshape(-1), want, atol=1e-6)


def test_upsampling_is_pytorchs(builder):
    def build(x):
        return [
            mb().upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=True),
            mb().upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=False),
            mb().upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
            mb().resize_nearest_neighbor(x=x, target_size_height=13, target_size_width=5),
        ]

    aligned, half_pixel, nearest, resized = builder.run(build, {"x": IMAGE})
    t = torch.from_numpy(IMAGE)
    near(aligned, F.interpolate(t, scale_factor=(2, 3), mode="bilinear", align_corners=True))
    near(half_pixel, F.interpolate(t, scale_factor=(2, 3), mode="bilinear", align_corners=False))
    near(nearest, F.interpolate(t, scale_factor=(2, 3), mode="nearest"))
    near(resized, F.interpolate(t, size=(13, 5), mode="nearest"))


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["constant", "border", "reflection"])
def test_resample_is_grid_sample(call_op, align, mode, padding):
    if padding == "reflection" and not align:
        padding = "symmetric"  # what PyTorch reflects around without aligned corners
    grid = RNG.uniform(-1.6, 1.6, (2, 5, 6, 2)).astype(np.float32)
    got = call_op(
        "resample", x=IMAGE, coordinates=grid, sampling_mode=mode, padding_mode=padding, padding_value=0.0,
        coordinates_mode="normalized_minus_one_to_one", align_corners=align,
    )  # fmt: skip
    torchs = {"constant": "zeros", "border": "border", "reflection": "reflection", "symmetric": "reflection"}[padding]
    near(got, F.grid_sample(torch.from_numpy(IMAGE), torch.from_numpy(grid), mode, torchs, align_corners=align))


def test_crop_resize_of_boxes(builder):
    x = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)
    boxes = np.array([[1, 1, 2, 2], [2, 2, 1, 1]], np.float32)

    def build(x):
        return mb().crop_resize(
            x=x, boxes=boxes, box_indices=np.array([0, 0], np.int32), target_height=2, target_width=2,
            sampling_mode="ALIGN_CORNERS",
        )  # fmt: skip

    (got,) = builder.run(build, {"x": x})
    assert got.reshape(2, 4).tolist() == [[6, 7, 10, 11], [11, 10, 7, 6]]


def test_affine_identity_and_flip(call_op):
    common = {
        "output_height": 9, "output_width": 7, "sampling_mode": "bilinear", "padding_mode": "constant",
        "padding_value": 0.0, "coordinates_mode": "normalized_minus_one_to_one", "align_corners": True,
    }  # fmt: skip
    same = call_op("affine", x=IMAGE, transform_matrix=np.array([[1, 0, 0, 0, 1, 0]], np.float32), **common)
    flipped = call_op("affine", x=IMAGE, transform_matrix=np.array([[-1, 0, 0, 0, 1, 0]], np.float32), **common)
    near(same, IMAGE)
    near(flipped, IMAGE[..., ::-1])


def test_moving_space_and_channels(builder):
    x = RNG.standard_normal((2, 8, 4, 6)).astype(np.float32)

    def build(x):
        space = mb().depth_to_space(x=x, block_size=2)
        batch = mb().space_to_batch(x=x, block_shape=[2, 3], paddings=[[0, 0], [0, 0]])
        return [
            mb().pixel_shuffle(x=x, upscale_factor=2),
            mb().pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
            space,
            mb().space_to_depth(x=space, block_size=2),
            batch,
            mb().batch_to_space(x=batch, block_shape=[2, 3], crops=[[0, 0], [0, 0]]),
        ]

    shuffled, unshuffled, space, depth, batch, back = builder.run(build, {"x": x}, "iOS16")
    near(shuffled, F.pixel_shuffle(torch.from_numpy(x), 2))
    near(unshuffled, F.pixel_unshuffle(torch.from_numpy(x), 2))
    assert space[0, 1, 0, 1] == x[0, 3, 0, 0]  # block place (0, 1) of channel 1: channel 1 * 2 + 1
    np.testing.assert_array_equal(depth, x)
    np.testing.assert_array_equal(batch[2 * (1 * 3 + 2)], x[0, :, 1::2, 2::3])
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("opset", ["iOS16", "iOS17"])
def test_non_maximum_suppression(builder, opset):
    boxes = np.array([[[0, 0, 2, 2], [0.1, 0, 2, 2], [5, 5, 2, 2], [9, 9, 1, 1]]], np.float32)
    scores = np.array([[[0.5], [0.9], [0.8], [0.1]]], np.float32)

    def build(boxes, scores):
        if opset == "iOS17":
            axes = [0, 2, 1]
            boxes, scores = mb().transpose(x=boxes, perm=axes), mb().transpose(x=scores, perm=axes)
            return mb().non_maximum_suppression(boxes=boxes, scores=scores, iou_threshold=0.5, max_boxes=5)
        return mb().non_maximum_suppression(
            boxes=boxes, scores=scores, iou_threshold=0.5, score_threshold=0.3, max_boxes=5
        )

    outputs = builder.run(build, {"boxes": boxes, "scores": scores}, opset)
    assert outputs[2].tolist() == [[1, 2, 3, -1, -1] if opset == "iOS17" else [1, 2, -1, -1, -1]]
    if opset == "iOS16":
        assert outputs[3].tolist() == [2]
        np.testing.assert_array_equal(outputs[0][0, :2], boxes[0, [1, 2]])
