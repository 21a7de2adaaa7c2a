"""Reads one ONNX tensor from its protobuf or from an external data file, checking every length first."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from onnx import SparseTensorProto, TensorProto

from edgeship.errors import UnsafeSourceError, WeightsError
from edgeship.frontends.onnx.dtypes import STORED_DTYPE, SUB_BYTE_BITS, torch_dtype

_INCOMPLETE = "export the model again, or fetch it again: the file is incomplete"

_FIELD_32 = (
    TensorProto.INT32, TensorProto.INT16, TensorProto.INT8, TensorProto.UINT16, TensorProto.UINT8,
    TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ,
)  # fmt: skip


def read_tensor(proto: TensorProto, model: Path, where: str) -> torch.Tensor:
    """The values of ``proto`` as a torch tensor that shares no memory with the protobuf; half precision in float32.

    The shape is the proto's.

    Args:
        proto: the tensor.
        model: path of the ONNX file; external data is looked for beside it.
        where: what to call the tensor in an error, such as ``initializer "w"``.

    Raises:
        WeightsError: too few or too many values, a file that is missing or too short.
        UnsafeSourceError: external data outside the model's folder.
        UnsupportedOpError: strings, and number formats that torch cannot compute with.
    """
    computed = torch_dtype(proto.data_type, where)
    dtype = STORED_DTYPE[proto.data_type]
    shape = tuple(proto.dims)
    if any(size < 0 for size in shape):
        raise WeightsError(f"{where} has the shape {list(shape)}", fix=_INCOMPLETE)
    count = math.prod(shape)
    bits = SUB_BYTE_BITS.get(proto.data_type, dtype.itemsize * 8)
    n_bytes = (count * bits + 7) // 8
    if proto.data_location == TensorProto.EXTERNAL:
        data = _external_bytes(proto, model, n_bytes, where)
    elif proto.HasField("raw_data"):
        if len(proto.raw_data) != n_bytes:
            raise _wrong_length(where, len(proto.raw_data), n_bytes, shape, dtype)
        data = np.frombuffer(bytearray(proto.raw_data), dtype=np.uint8)
    else:
        data = _field_bytes(proto, dtype, where)
        if data.size != n_bytes:
            raise _wrong_length(where, data.size, n_bytes, shape, dtype)
    if count == 0:
        return torch.empty(shape, dtype=computed)
    if proto.data_type in SUB_BYTE_BITS:
        return torch.from_numpy(_unpack(data, bits, count, signed=dtype == torch.int8)).reshape(shape)
    if dtype == torch.bool:
        return torch.from_numpy(data != 0).reshape(shape)
    return torch.from_numpy(data).view(dtype).reshape(shape).to(computed)


def read_sparse(proto: SparseTensorProto, model: Path, where: str) -> torch.Tensor:
    """A sparse tensor as a dense one. Raises as `read_tensor` does. The shape is the proto's."""
    values = read_tensor(proto.values, model, where)
    indices = read_tensor(proto.indices, model, f"the indices of {where}").to(torch.int64)
    shape = tuple(proto.dims)
    total = math.prod(shape)
    if indices.dim() == 2 and indices.shape[1] == len(shape):
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        indices = (indices * torch.tensor(strides)).sum(dim=1)
    fits = indices.shape == values.shape and values.dim() == 1 and total < 2**31
    if not fits or (len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < total):
        raise WeightsError(f"{where} is sparse and its indices do not fit its shape", fix=_INCOMPLETE)
    dense = torch.zeros(total, dtype=values.dtype)
    dense[indices] = values
    return dense.reshape(shape)


def external_file(location: str, model: Path, where: str) -> Path:
    """The file an external tensor names, made sure to lie in the model's own folder.

    A symbolic link may point beside the real model file (download caches do that) and nowhere else.

    Raises:
        UnsafeSourceError: an absolute path, ``..``, or a link that leads out of the folder.
        WeightsError: no such file.
    """
    safe = "export the model again with its data file beside it, named without a folder"
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location or Path(location).is_absolute() or ".." in parts or ":" in parts[0]:
        raise UnsafeSourceError(f'{where} keeps its data outside the model\'s folder, in "{location}"', fix=safe)
    file = model.parent / location
    homes = (model.parent.resolve(), model.resolve().parent)
    real = file.resolve()
    if not any(real.is_relative_to(home) for home in homes):
        raise UnsafeSourceError(f'{where} keeps its data in "{location}", a link that leaves the folder', fix=safe)
    if not real.is_file():
        raise WeightsError(
            f'{where} keeps its data in "{location}", which is not beside {model.name}',
            fix=f'copy "{location}" into {model.parent}',
        )
    return real


def _external_bytes(proto: TensorProto, model: Path, n_bytes: int, where: str) -> np.ndarray:
    """[n_bytes], read from the file beside the model."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    file = external_file(entries.get("location", ""), model, where)
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or n_bytes)
    except ValueError:
        raise WeightsError(f"{where} has an offset that is not a number", fix=_INCOMPLETE) from None
    if length != n_bytes or offset < 0:
        raise WeightsError(f"{where} holds {length} bytes from {offset} on, its shape needs {n_bytes}", fix=_INCOMPLETE)
    size = file.stat().st_size
    if offset + n_bytes > size:
        raise WeightsError(f'"{file.name}" has {size} bytes, {where} ends at {offset + n_bytes}', fix=_INCOMPLETE)
    return np.fromfile(file, dtype=np.uint8, count=n_bytes, offset=offset)


def _field_bytes(proto: TensorProto, dtype: torch.dtype, where: str) -> np.ndarray:
    """The typed fields (``float_data``, ``int32_data`` ...) as the bytes that raw_data would hold. [bytes]."""
    kind = proto.data_type
    values: np.ndarray
    if kind in (TensorProto.FLOAT, TensorProto.COMPLEX64):
        values = np.array(proto.float_data, dtype=np.float32)
    elif kind in (TensorProto.DOUBLE, TensorProto.COMPLEX128):
        values = np.array(proto.double_data, dtype=np.float64)
    elif kind == TensorProto.INT64:
        values = np.array(proto.int64_data, dtype=np.int64)
    elif kind in (TensorProto.UINT32, TensorProto.UINT64):
        values = np.array(proto.uint64_data, dtype=np.uint64).astype(f"uint{dtype.itemsize * 8}")
    elif kind in _FIELD_32:
        values = np.array(proto.int32_data, dtype=np.int32).astype(f"uint{dtype.itemsize * 8}")
    elif kind in SUB_BYTE_BITS:
        values = np.array(proto.int32_data, dtype=np.int32).astype(np.uint8)
    else:
        raise WeightsError(f"{where} has no data", fix=_INCOMPLETE)
    return np.ascontiguousarray(values).view(np.uint8)


def _unpack(data: np.ndarray, bits: int, count: int, *, signed: bool) -> np.ndarray:
    """Low bits first, as ONNX packs them; signed values are two's complement. ``data`` [bytes] -> [count]."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    values = ((data[:, None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8).reshape(-1)[:count]
    if not signed:
        return values
    return np.where(values >= 1 << (bits - 1), values.astype(np.int16) - (1 << bits), values).astype(np.int8)


def _wrong_length(where: str, have: int, need: int, shape: tuple[int, ...], dtype: torch.dtype) -> WeightsError:
    name = str(dtype).removeprefix("torch.")
    return WeightsError(f"{where} holds {have} bytes, its shape {name}{list(shape)} needs {need}", fix=_INCOMPLETE)
