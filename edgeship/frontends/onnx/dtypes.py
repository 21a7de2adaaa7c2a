"""ONNX element types and the torch dtypes that hold them."""

from __future__ import annotations

import torch
from onnx import TensorProto

from edgeship.errors import UnsupportedOpError

#: Element type -> the torch dtype of the same bits. Sub-byte integers live in whole bytes.
STORED_DTYPE: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    TensorProto.UINT4: torch.uint8,
    TensorProto.INT4: torch.int8,
    TensorProto.UINT2: torch.uint8,
    TensorProto.INT2: torch.int8,
}

#: Element type -> the torch dtype that its values are computed in. Half precision is how a file stores or an engine
#: computes; what was meant is a real number, so it is float32 here, and each profile decides anew what to store.
TORCH_DTYPE: dict[int, torch.dtype] = {
    **STORED_DTYPE,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
}

#: Element type of a tensor whose dtype says it all.
ELEM_TYPE: dict[torch.dtype, int] = {
    dtype: elem
    for elem, dtype in reversed(TORCH_DTYPE.items())
    if elem not in (TensorProto.UINT4, TensorProto.INT4, TensorProto.UINT2, TensorProto.INT2)
}

#: Integers packed several to a byte in a file: bits of one value.
SUB_BYTE_BITS: dict[int, int] = {
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.UINT2: 2,
    TensorProto.INT2: 2,
}

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)

#: torch has these dtypes but few kernels for them: arithmetic goes through int64.
SPARSELY_SUPPORTED = (torch.uint16, torch.uint32, torch.uint64)


def type_name(elem_type: int) -> str:
    """``"float16"`` for FLOAT16; a number that ONNX does not know is shown as it is."""
    if elem_type in TensorProto.DataType.values():
        return str(TensorProto.DataType.Name(elem_type)).lower()
    return f"element type {elem_type}"


def torch_dtype(elem_type: int, where: str) -> torch.dtype:
    """The torch dtype that values of an ONNX element type are computed in.

    Raises:
        UnsupportedOpError: strings, and number formats that torch cannot compute with.
    """
    dtype = TORCH_DTYPE.get(elem_type)
    if dtype is None:
        raise UnsupportedOpError(
            f"{where} holds {type_name(elem_type)}, a type that is not imported",
            fix="keep that part of the model outside the exported graph",
        )
    return dtype


def numpy_name(dtype: torch.dtype) -> str:
    """``"float32"`` for torch.float32: the name numpy (or ml_dtypes) has for it."""
    return str(dtype).removeprefix("torch.")


def integer_range(elem_type: int) -> tuple[int, int]:
    """Smallest and largest value of an integer element type."""
    bits = SUB_BYTE_BITS.get(elem_type)
    if bits is not None:
        signed = elem_type in (TensorProto.INT4, TensorProto.INT2)
        return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    info = torch.iinfo(TORCH_DTYPE[elem_type])
    return int(info.min), int(info.max)
