"""Every way to store a weight: read back bit by bit, and decompressed to what the definition gives."""

from __future__ import annotations

import numpy as np
import pytest

from edgeship.runtimes.coreml.evaluator import Evaluator
from edgeship.runtimes.coreml.storage import BITS, BlobFile, numpy_dtype
from edgeship.runtimes.coreml.weights import read_stored_weights

RNG = np.random.default_rng(0)
X = np.eye(8, dtype=np.float32)


def mb():
    from coremltools.converters.mil.mil import Builder

    return Builder


def few_bits(values, dtype):
    """An array that coremltools stores in the type ``dtype``."""
    from coremltools.converters.mil.mil import types

    return values.view(types.nptype_from_builtin(types.string_to_builtin(dtype)))


def stored_and_decoded(builder, make, opset):
    """What is stored of the weight (4, 8) that ``make`` builds, and the weight: it is multiplied with an identity."""

    def build(x):
        weight = make()
        return mb().linear(x=x, weight=weight)

    path = builder.save(build, {"x": (X.shape, np.float32)}, opset)
    weights = [w for w in read_stored_weights(path).values() if w.shape == (4, 8)]
    assert len(weights) == 1
    (decoded,) = Evaluator(path).run({"x": X}).values()
    return weights[0], decoded.T


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("with_offset", [False, True])
def test_affine_by_block(builder, dtype, with_offset):
    low, high = (0, 2 ** BITS[dtype]) if dtype[0] == "u" else (-(2 ** (BITS[dtype] - 1)), 2 ** (BITS[dtype] - 1))
    plain = np.uint8 if dtype[0] == "u" else np.int8
    values = RNG.integers(low, high, (4, 8)).astype(plain)
    scale = RNG.uniform(0.5, 1, (4, 2)).astype(np.float32)
    offset = RNG.integers(max(low, -4), 4, (4, 2)).astype(plain) if with_offset else None

    def make():
        extra = {"offset": few_bits(offset, dtype)} if with_offset else {}
        return mb().constexpr_blockwise_shift_scale(data=few_bits(values, dtype), scale=scale, **extra)

    stored, decoded = stored_and_decoded(builder, make, "iOS18")
    assert (stored.kind, stored.bits, stored.dtype) == ("affine", BITS[dtype], "float32")
    np.testing.assert_array_equal(stored.values, values)
    np.testing.assert_array_equal(stored.scale, scale)
    assert stored.values.dtype == plain
    shift = 0
    if with_offset:
        np.testing.assert_array_equal(stored.zero_point, offset)
        shift = np.repeat(offset.astype(np.float32), 4, axis=1)
    else:
        assert stored.zero_point is None
    np.testing.assert_allclose(decoded, np.repeat(scale, 4, axis=1) * (values - shift), rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_palette_by_group(builder, bits):
    indices = RNG.integers(0, 2**bits, (4, 8)).astype(np.uint8)
    lut = RNG.standard_normal((2, 1, 2**bits, 1)).astype(np.float32)
    stored, decoded = stored_and_decoded(
        builder, lambda: mb().constexpr_lut_to_dense(indices=few_bits(indices, f"uint{bits}"), lut=lut), "iOS18"
    )
    assert (stored.kind, stored.bits) == ("palette", bits)
    np.testing.assert_array_equal(stored.indices, indices)
    np.testing.assert_array_equal(stored.lut, lut)
    want = np.array([[lut[i // 2, 0, indices[i, j], 0] for j in range(8)] for i in range(4)])
    np.testing.assert_array_equal(decoded, want)


@pytest.mark.parametrize("axis", [0, 1])
def test_palette_of_vectors(builder, axis):
    indices = RNG.integers(0, 4, (2, 8) if axis == 0 else (4, 4)).astype(np.uint8)
    lut = RNG.standard_normal((1, 1, 4, 2)).astype(np.float32)

    def make():
        return mb().constexpr_lut_to_dense(indices=few_bits(indices, "uint2"), lut=lut, vector_axis=axis)

    stored, decoded = stored_and_decoded(builder, make, "iOS18")
    assert stored.vector_axis == axis
    vectors = lut[0, 0][indices]
    want = vectors.transpose(0, 2, 1).reshape(4, 8) if axis == 0 else vectors.reshape(4, 8)
    np.testing.assert_array_equal(decoded, want)


def sparse_parts(dtype):
    mask = RNG.integers(0, 2, (4, 8)).astype(np.uint8)
    count = int(mask.sum())
    values = RNG.integers(-7, 8, count) if np.issubdtype(dtype, np.signedinteger) else RNG.integers(0, 4, count)
    return mask, values.astype(dtype)


def dense(mask, values):
    full = np.zeros(mask.shape, np.float32)
    full[mask == 1] = values
    return full


def test_sparse(builder):
    mask, nonzero = sparse_parts(np.float32)
    stored, decoded = stored_and_decoded(
        builder, lambda: mb().constexpr_sparse_to_dense(nonzero_data=nonzero, mask=few_bits(mask, "uint1")), "iOS18"
    )
    assert stored.kind == "sparse"
    np.testing.assert_array_equal(stored.mask, mask)
    np.testing.assert_array_equal(stored.nonzero, nonzero)
    np.testing.assert_array_equal(decoded, dense(mask, nonzero))


def test_sparse_and_affine(builder):
    mask, nonzero = sparse_parts(np.int8)
    scale = RNG.uniform(0.5, 1, (4, 1)).astype(np.float32)

    def make():
        out_mask, out = mb().constexpr_sparse_blockwise_shift_scale(
            data_mask=few_bits(mask, "uint1"), nonzero_data=nonzero, scale=scale
        )
        return mb().constexpr_sparse_to_dense(nonzero_data=out, mask=out_mask)

    stored, decoded = stored_and_decoded(builder, make, "iOS18")
    assert (stored.kind, stored.bits) == ("sparse+affine", 8)
    np.testing.assert_array_equal(stored.mask, mask)
    np.testing.assert_array_equal(stored.nonzero, nonzero)
    np.testing.assert_array_equal(stored.scale, scale)
    np.testing.assert_allclose(decoded, dense(mask, nonzero) * scale, rtol=1e-6)


def test_sparse_and_palette(builder):
    mask, indices = sparse_parts(np.uint8)
    lut = RNG.standard_normal((1, 1, 4, 1)).astype(np.float32)

    def make():
        out_mask, out = mb().constexpr_lut_to_sparse(
            indices_mask=few_bits(mask, "uint1"), indices_nonzero_data=few_bits(indices, "uint2"), lut=lut
        )
        return mb().constexpr_sparse_to_dense(nonzero_data=out, mask=out_mask)

    stored, decoded = stored_and_decoded(builder, make, "iOS18")
    assert (stored.kind, stored.bits) == ("sparse+palette", 2)
    np.testing.assert_array_equal(stored.nonzero, indices)
    np.testing.assert_array_equal(stored.lut, lut)
    np.testing.assert_array_equal(decoded, dense(mask, lut[0, 0, indices, 0]))


@pytest.mark.parametrize("bits", [2, 3])
def test_two_or_three_bit_integers_as_a_palette_of_integers(builder, bits):
    low = -(2 ** (bits - 1))
    values = RNG.integers(low, -low, (4, 8)).astype(np.int8)
    lut = np.arange(low, -low, dtype=np.int8).reshape(1, 1, -1, 1)
    scale = RNG.uniform(0.5, 1, (4, 4)).astype(np.float32)

    def make():
        data = mb().constexpr_lut_to_dense(indices=few_bits((values - low).astype(np.uint8), f"uint{bits}"), lut=lut)
        return mb().constexpr_blockwise_shift_scale(data=data, scale=scale)

    stored, decoded = stored_and_decoded(builder, make, "iOS18")
    assert (stored.kind, stored.bits) == ("affine+palette", bits)
    np.testing.assert_array_equal(stored.lut.reshape(-1)[stored.indices], values)
    np.testing.assert_array_equal(stored.scale, scale)
    np.testing.assert_allclose(decoded, np.repeat(scale, 2, axis=1) * values, rtol=1e-6)


@pytest.mark.parametrize("by_tensor", [False, True])
def test_affine_of_ios16(builder, by_tensor):
    values = RNG.integers(-128, 128, (4, 8)).astype(np.int8)
    scale = np.float32(0.5) if by_tensor else RNG.uniform(0.5, 1, 4).astype(np.float32)
    zero = np.int8(3) if by_tensor else np.array([1, -2, 3, 0], np.int8)

    def make():
        return mb().constexpr_affine_dequantize(quantized_data=values, zero_point=zero, scale=scale, axis=0)

    stored, decoded = stored_and_decoded(builder, make, "iOS16")
    assert (stored.kind, stored.axis, stored.bits) == ("affine", 0, 8)
    np.testing.assert_array_equal(stored.values, values)
    np.testing.assert_array_equal(stored.scale, scale)
    np.testing.assert_array_equal(stored.zero_point, zero)
    want = np.reshape(scale, (-1, 1)) * (values.astype(np.float32) - np.reshape(zero, (-1, 1)))
    np.testing.assert_allclose(decoded, want, rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_palette_of_ios16(builder, bits):
    indices = RNG.integers(0, 2**bits, (4, 8)).astype(np.uint8)
    stream = np.unpackbits(indices.reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    packed = np.packbits(stream.reshape(-1), bitorder="little")
    lut = RNG.standard_normal(2**bits).astype(np.float32)

    def make():
        return mb().constexpr_lut_to_dense(indices=packed, lut=lut, shape=np.array([4, 8], np.uint32))

    stored, decoded = stored_and_decoded(builder, make, "iOS16")
    assert (stored.kind, stored.bits) == ("palette", bits)
    np.testing.assert_array_equal(stored.indices, indices)
    np.testing.assert_array_equal(decoded, lut[indices])


def test_sparse_of_ios16(builder):
    mask, nonzero = sparse_parts(np.float32)
    packed = np.packbits(mask.reshape(-1), bitorder="little")

    def make():
        return mb().constexpr_sparse_to_dense(nonzero_data=nonzero, mask=packed, shape=np.array([4, 8], np.uint32))

    stored, decoded = stored_and_decoded(builder, make, "iOS16")
    np.testing.assert_array_equal(stored.mask, mask)
    np.testing.assert_array_equal(decoded, dense(mask, nonzero))


def test_cast_and_plain_weights(builder):
    values = RNG.standard_normal((4, 8)).astype(np.float16)
    stored, decoded = stored_and_decoded(
        builder, lambda: mb().constexpr_cast(source_val=values, output_dtype="fp32"), "iOS16"
    )
    assert (stored.kind, stored.dtype) == ("float16", "float32")
    np.testing.assert_array_equal(decoded, values.astype(np.float32))
    stored, decoded = stored_and_decoded(builder, lambda: values.astype(np.float32), "iOS17")
    assert (stored.kind, stored.bits) == ("float32", 32)
    np.testing.assert_array_equal(stored.values, values.astype(np.float32))


@pytest.mark.parametrize(
    "dtype", ["uint1", "uint2", "uint3", "uint4", "uint6", "int4", "int8", "uint8", "int16", "float32"]
)
def test_our_reader_of_the_weight_file_agrees_with_coremltools(ct, tmp_path, dtype):
    from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

    path = tmp_path / "weight.bin"
    name = {"float32": "float"}.get(dtype, dtype)
    writer = _BlobStorageWriter(str(path))
    arrays, offsets = [], []
    for count in (1, 13, 64, 1001):
        low, high = (0, 2 ** min(BITS[dtype], 8)) if dtype[0] == "u" else (-8, 8)
        values = RNG.integers(low, high, count).astype(numpy_dtype(dtype))
        offsets.append(getattr(writer, f"write_{name}_data")(few_bits(values, dtype) if BITS[dtype] < 8 else values))
        arrays.append(values)
    del writer
    reader, blob = _BlobStorageReader(str(path)), BlobFile(path)
    for values, offset in zip(arrays, offsets, strict=True):
        np.testing.assert_array_equal(blob.read(offset, dtype, values.size), values)
        np.testing.assert_array_equal(np.asarray(getattr(reader, f"read_{name}_data")(offset))[: values.size], values)
