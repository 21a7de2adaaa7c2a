"""Weights of a saved Core AI asset, as the file holds them.

The program is loaded with Core AI's own reader and walked; the numbers come from the bytes of the file
(`bytecode.named_blobs`), because that reader does not hand out constants of fewer than eight bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeship.core.weights import (
    Affine,
    AffineTensor,
    FloatTensor,
    MXFP4Tensor,
    Palette,
    PaletteTensor,
    Sparse,
    SparseTensor,
)
from edgeship.errors import ArtifactError
from edgeship.runtimes.coreai.bytecode import named_blobs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from edgeship.core.model import Placement
    from edgeship.core.weights import Array, EncodedTensor

PROGRAM = "main.mlirb"
# What fills the zeros of a sparse weight in.
FILLED = "coreai.sparse_with_bitmask_to_dense"
LOOKED_UP = "coreai.lut_to_sparse_with_bitmask"
# Elements and scales of MXFP4, packed as unsigned integers of that width.
MICROSCALED = {"f4E2M1FN": 4, "f8E8M0FNU": 8}
FLOATS = {"f16": np.float16, "f32": np.float32}


def check_digest(asset: Path) -> None:
    """Compare the program with the SHA-256 that Core AI keeps beside it; `ArtifactError` when they differ."""
    try:
        wanted = (asset / "main.hash").read_bytes()
        with (asset / PROGRAM).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").digest()
        json.loads((asset / "metadata.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{asset} is not a whole asset: {error}", fix="build it again") from None
    if wanted != found:
        raise ArtifactError(f"{asset} is damaged: {PROGRAM} does not match main.hash", fix="build it again")


def stored_weights(asset: Path) -> Mapping[str, EncodedTensor]:
    """Every constant that can be a weight, by its name in the asset, in its stored shape.

    Small floats may be written into the program itself; the k-th constant is then named ``constant[k]``.
    """
    blobs = named_blobs(asset / PROGRAM)
    found: dict[str, EncodedTensor] = {}
    index = 0
    for operation in operations(asset):
        weight = _compressed(operation, blobs)
        if weight is not None:
            found[weight[0]] = weight[1]
        elif operation.name == "coreai.constant":
            constant = _constant(operation.results[0], blobs)
            if constant is None:
                inline = _inline_floats(operation)
                if inline is not None:
                    found[f"constant[{index}]"] = FloatTensor(inline)
            elif constant.element in FLOATS:
                # Overwritten by the sparse weight whose floats these are, if there is one.
                found[constant.name] = FloatTensor(constant.array())
            index += 1
    return found


def operations(asset: Path) -> Iterator[Any]:
    """Every operation of the program; it lives as long as the iterator does."""
    from coreai.authoring import AIModelAsset

    from edgeship.compat.coreai import module_of
    from edgeship.runtimes.coreai.widened import walk

    try:
        program = AIModelAsset.load(asset).program
        module = module_of(program)
    except Exception as error:
        raise ArtifactError(
            f"{asset} cannot be read: {' '.join(str(error).split())[:200]}", fix="build it again"
        ) from None
    yield from walk(module.operation)


def _compressed(operation: Any, blobs: Mapping[str, memoryview]) -> tuple[str, EncodedTensor] | None:
    """The weight that an operation decompresses, and its name; None for every other operation.

    The integers of a weight with zeros left out are put among zeros before they are scaled.
    """
    if operation.name == "coreai.blockwise_shift_scale":
        maker = _maker(operation.operands[0])
        if maker is not None and maker.name == FILLED:
            values, mask, integers = _sparse_integers(maker, blobs)
            inner: Any = _affine(operation, values, blobs, integers)
            return values.name, SparseTensor(mask, inner, Sparse(inner.encoding))
        constant = _constant(operation.operands[0], blobs)
        if constant is None:
            return None
        read = _microscaled if constant.element in MICROSCALED else _affine
        return constant.name, read(operation, constant, blobs, constant.array())
    if operation.name == "coreai.lut_to_dense":
        constant = _constant(operation.operands[0], blobs)
        return None if constant is None else (constant.name, _palette(operation, constant, blobs, constant.array()))
    if operation.name != FILLED:
        return None
    maker = _maker(operation.operands[0])
    if maker is not None and maker.name == LOOKED_UP:
        indices, mask = _inside(maker, blobs)
        table = _constant(maker.operands[1], blobs)
        if table is None or table.element not in FLOATS:
            return None
        inner = _palette(maker, indices, blobs, _dense(indices, mask))
        return indices.name, SparseTensor(mask, inner, Sparse(inner.encoding))
    values, mask = _inside(operation, blobs)
    if values.element not in FLOATS:
        return None
    inner = FloatTensor(_dense(values, mask))
    return values.name, SparseTensor(mask, inner, Sparse(inner.encoding))


def _sparse_integers(filled: Any, blobs: Mapping[str, memoryview]) -> tuple[_Constant, Array, Array]:
    """The constant of a weight of sparse integers, its mask, and the integers among zeros.

    Integers of fewer than 8 bits are indices into a list of integers.
    """
    maker = _maker(filled.operands[0])
    if maker is None or maker.name != LOOKED_UP:
        values, mask = _inside(filled, blobs)
        return values, mask, _dense(values, mask)
    values, mask = _inside(maker, blobs)
    listed = _constant(maker.operands[1], blobs)
    if listed is None or listed.element != "si8" or listed.array().size != 1 << int(values.element[2:]):
        raise ArtifactError(f"{values.name} has no list of integers", fix="build it again")
    integers = np.zeros(mask.shape, np.int8)
    integers[mask] = listed.array().reshape(-1)[_dense(values, mask)[mask]]
    return replace(values, element=f"si{values.element[2:]}"), mask, integers


def _inside(operation: Any, blobs: Mapping[str, memoryview]) -> tuple[_Constant, Array]:
    """The values that the mask of an operation's sparse operand lets in, and the mask."""
    sparse = _maker(operation.operands[0])
    if sparse is not None and sparse.name == "coreai.build_sparse_with_bitmask":
        values, mask = (_constant(operand, blobs) for operand in sparse.operands)
        if values is not None and mask is not None:
            return values, mask.array().astype(bool)
    raise ArtifactError("a sparse weight is not made of two constants", fix="build it again")


def _dense(values: _Constant, mask: Array) -> Array:
    stored = values.array()
    if stored.size != int(np.count_nonzero(mask)):
        raise ArtifactError(f"the mask of {values.name} does not fit its {stored.size} values", fix="build it again")
    full = np.zeros(mask.shape, stored.dtype)
    full[mask] = stored
    return full


def _maker(value: Any) -> Any:
    owner: Any = getattr(value, "owner", None)
    return owner if hasattr(owner, "operands") else None


def in_torch_layout(tensor: EncodedTensor, placement: Placement) -> EncodedTensor:
    """The weight as torch lays it out: a placement's reshape and permutation undone."""
    if placement.permutation is None or not isinstance(tensor, FloatTensor):
        return tensor
    order = placement.permutation
    # Axes longer than one keep the order of the permutation, wherever axes of size one stand; those are at its end.
    long = [size for size in tensor.shape if size != 1]
    own = tensor.values.reshape(long + [1] * (len(order) - len(long)))
    return FloatTensor(np.ascontiguousarray(own.transpose(np.argsort(order))))


@dataclass(frozen=True)
class _Constant:
    """A constant with its data in the file; ``element`` is a type such as ``si4``."""

    name: str
    element: str
    shape: tuple[int, ...]
    data: memoryview

    def array(self) -> Array:
        """One number an element, unpacked."""
        count = int(np.prod(self.shape, dtype=np.int64))
        if self.element in FLOATS:
            return self._exactly(np.frombuffer(self.data, FLOATS[self.element]), count)
        if self.element not in MICROSCALED and not self.element.startswith(("si", "ui")):
            raise ArtifactError(
                f"constant {self.name} holds {self.element}, which is not a weight", fix="build it again"
            )
        bits = MICROSCALED.get(self.element) or int(self.element[2:])
        raw = np.frombuffer(self.data, np.uint8)
        if bits == 8:
            unpacked = raw
        else:
            stream = np.unpackbits(raw, bitorder="little")
            whole = stream[: stream.size // bits * bits].reshape(-1, bits)
            unpacked = whole @ (1 << np.arange(bits, dtype=np.uint8))
        # As many as fill whole bytes come together: four of six bits, eight of three.
        if not count <= unpacked.size < count + math.lcm(bits, 8) // bits:
            raise ArtifactError(
                f"constant {self.name} holds {unpacked.size} integers, not {count}", fix="build it again"
            )
        values = self._exactly(unpacked[:count], count)
        if not self.element.startswith("si"):
            return values
        sign = 1 << (bits - 1)
        return ((values.astype(np.int16) ^ sign) - sign).astype(np.int8)

    def _exactly(self, values: Array, count: int) -> Array:
        if values.size != count:
            raise ArtifactError(f"constant {self.name} holds {values.size} numbers, not {count}", fix="build it again")
        return values.reshape(self.shape)


def _constant(value: Any, blobs: Mapping[str, memoryview]) -> _Constant | None:
    """The named constant that makes ``value``; None when it is computed, or written into the program itself."""
    owner: Any = getattr(value, "owner", None)
    if getattr(owner, "name", "") != "coreai.constant":
        return None
    attribute = owner.attributes["value"]
    name = _resource_name(attribute)
    if name is None:
        return None
    if name not in blobs:
        raise ArtifactError(f"the data of constant {name} is not in {PROGRAM}", fix="build it again")
    kind = attribute.type
    return _Constant(name, str(kind.element_type), tuple(int(size) for size in kind.shape), blobs[name])


def _inline_floats(operation: Any) -> Array | None:
    from edgeship.compat.coreai import DenseElementsAttr

    attribute = operation.attributes["value"]
    if not DenseElementsAttr.isinstance(attribute) or str(attribute.type.element_type) not in FLOATS:
        return None
    return np.array(DenseElementsAttr(attribute))


def _resource_name(attribute: Any) -> str | None:
    from edgeship.compat.coreai import DenseResourceElementsAttr

    if not DenseResourceElementsAttr.isinstance(attribute):
        return None
    text = str(attribute)
    return text[len("dense_resource<") : text.rindex("> : ")].strip('"')


def _palette(operation: Any, indices: _Constant, blobs: Mapping[str, memoryview], dense: Array) -> PaletteTensor:
    """Tables lie along axis 0 only, and an entry is one number."""
    table = _constant(operation.operands[1], blobs)
    bits = int(indices.element[2:])
    if table is None or table.shape != (table.shape[0], *[1] * (dense.ndim - 1), 1 << bits, 1):
        raise ArtifactError(f"{indices.name} has no table for groups of channels", fix="build it again")
    groups = table.shape[0]
    encoding = Palette(bits, dense.shape[0] // groups if groups > 1 else None)
    return PaletteTensor(dense, table.array().reshape(groups, 1 << bits).astype(np.float32), encoding)


def _affine(operation: Any, values: _Constant, blobs: Mapping[str, memoryview], integers: Array) -> AffineTensor:
    scale = _constant(operation.operands[1], blobs)
    if scale is None:
        raise ArtifactError(f"the scale of {values.name} is not a constant of its own", fix="build it again")
    zero = _constant(operation.operands[2], blobs)
    symmetric = values.element.startswith("si")
    if symmetric and not _is_zero(operation.operands[2]):
        raise ArtifactError(f"{values.name} has signed integers and a zero point", fix="build it again")
    if not _is_zero(operation.operands[3]):
        raise ArtifactError(f"{values.name} has a float offset, which edgeship never writes", fix="build it again")
    scales = scale.array().astype(np.float32)
    zeros = None
    if not symmetric:
        zeros = np.zeros(scale.shape, np.uint8) if zero is None else zero.array()
    encoding = _encoding(int(values.element[2:]), symmetric, integers.shape, scale.shape)
    return AffineTensor(integers, scales, zeros, encoding)


def _microscaled(operation: Any, elements: _Constant, blobs: Mapping[str, memoryview], codes: Array) -> MXFP4Tensor:
    """E2M1 elements with E8M0 scales, and no offset."""
    scale = _constant(operation.operands[1], blobs)
    if scale is None or scale.element != "f8E8M0FNU":
        raise ArtifactError(f"{elements.name} has no E8M0 scales of its own", fix="build it again")
    if not (_is_zero(operation.operands[2]) and _is_zero(operation.operands[3])):
        raise ArtifactError(f"{elements.name} has an offset, which edgeship never writes", fix="build it again")
    return MXFP4Tensor(codes, scale.array())


def _is_zero(value: Any) -> bool:
    from edgeship.compat.coreai import DenseElementsAttr

    owner: Any = getattr(value, "owner", None)
    if getattr(owner, "name", "") != "coreai.constant":
        return False
    attribute = owner.attributes["value"]
    if not DenseElementsAttr.isinstance(attribute):
        return False
    dense = DenseElementsAttr(attribute)
    return bool(dense.is_splat) and str(attribute).startswith(("dense<0>", "dense<0.000000e+00>"))


def _encoding(bits: int, symmetric: bool, shape: tuple[int, ...], blocks: tuple[int, ...]) -> Affine:
    wide = [axis for axis, size in enumerate(blocks) if size > 1]
    if not wide and shape[0] != 1:
        return Affine(bits, symmetric, "tensor")
    if all(blocks[axis] == shape[axis] for axis in wide) and len(wide) <= 1:
        return Affine(bits, symmetric, "channel")
    return Affine(bits, symmetric, "group", shape[1] // blocks[1])
