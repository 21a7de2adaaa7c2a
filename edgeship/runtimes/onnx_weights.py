"""Read the weights of a saved ONNX file: initializers, and the operators that make floats of them.

DequantizeLinear; ONNX Runtime's MatMulNBits and GatherBlockQuantized on packed integers; Cast and Mul before a layer,
or behind a Gather of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.core.model import Artifact, Placement
from edgeship.core.weights import Affine, AffineTensor, EncodedTensor, FloatTensor
from edgeship.errors import ArtifactError

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

PACKED = ("MatMulNBits", "GatherBlockQuantized")
INTEGER_BITS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}


def read_placed_weights(artifact: Artifact) -> dict[str, EncodedTensor]:
    """Every placed weight by torch name, in the torch weight's own layout.

    Raises `ArtifactError` when a weight is not in the file, or nothing dequantizes it.
    """
    import onnx

    model = onnx.load(artifact.path, load_external_data=False)
    graph = _Graph(model, artifact)
    return {placement.weight: graph.weight(placement) for placement in artifact.placements}


class _Graph:
    """Initializers and consumers of one file, by name."""

    def __init__(self, model: onnx.ModelProto, artifact: Artifact) -> None:
        self._folder = artifact.path.parent
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        self._producers: dict[str, onnx.NodeProto] = {}
        for node in model.graph.node:
            for name in node.output:
                self._producers[name] = node
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def array(self, name: str) -> npt.NDArray[Any]:
        """The content of one initializer. Any shape."""
        import onnx

        if name not in self._initializers:
            raise ArtifactError(f"the file holds no tensor {name}", fix="build again")
        tensor = self._initializers[name]
        if onnx.external_data_helper.uses_external_data(tensor):
            loaded = onnx.TensorProto()
            loaded.CopyFrom(tensor)
            onnx.external_data_helper.load_external_data_for_tensor(loaded, self._folder.as_posix())
            tensor = loaded
        array: npt.NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        return array

    def weight(self, placement: Placement) -> EncodedTensor:
        """One weight, turned back to the torch layout. [out, in], or [out, in / groups, ...kernel]."""
        import numpy as np

        stored = self.array(placement.stored)
        if np.issubdtype(stored.dtype, np.floating):
            return FloatTensor(_restore(stored, placement))
        readers = self._readers(placement.stored)
        for node in readers:
            if node.op_type in PACKED:
                return self._packed(stored, node)
        for node in readers:
            if node.op_type == "Cast":
                stored, scale, zero = self._widened(stored, node)
                return _affine(stored, scale, zero, placement)
        scale, zero, axis = self._numbers(placement.stored)
        if zero is not None:
            zero = _blocks(zero, stored.shape, axis)
        return _affine(stored, _blocks(scale, stored.shape, axis), zero, placement)

    def _readers(self, name: str) -> list[onnx.NodeProto]:
        """What reads a tensor, or its elements in another shape."""
        found = []
        for node in self._consumers.get(name, []):
            found += self._readers(node.output[0]) if node.op_type == "Reshape" else [node]
        return found

    def _origin(self, name: str) -> npt.NDArray[Any]:
        """Stored numbers that are cast to float32 or repeated at load. Any shape."""
        while name not in self._initializers and name in self._producers:
            if self._producers[name].op_type not in ("Cast", "Expand"):
                break
            name = self._producers[name].input[0]
        return self.array(name)

    def _packed(self, stored: npt.NDArray[Any], node: onnx.NodeProto) -> AffineTensor:
        """A weight [N, K] in rows of packed blocks."""
        import numpy as np

        settings = {attribute.name: attribute.i for attribute in node.attribute}
        bits = settings["bits"]
        rows = _unpacked(stored.reshape(stored.shape[0], -1), bits)
        values = rows[:, : settings.get("K", rows.shape[1])]
        # Both take scales and zero points third and fourth.
        scale = self._origin(node.input[2]).astype(np.float32)
        if len(node.input) < 4 or not node.input[3]:
            signed = (values.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
            return AffineTensor(signed, scale, None, _encoding(bits, True, values.shape, scale.shape))
        zero = _unpacked(self._origin(node.input[3]), bits)[:, : scale.shape[1]]
        return AffineTensor(values, scale, zero, _encoding(bits, False, values.shape, scale.shape))

    def _widened(
        self, stored: npt.NDArray[Any], cast: onnx.NodeProto
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Integers, scales and zero points of Cast -> (Sub ->) Mul (-> Reshape, which joins blocks)."""
        import numpy as np

        node, zero = self._next(cast), None
        if node.op_type == "Sub":
            zero, node = self._origin(node.input[1]), self._next(node)
        if node.op_type != "Mul":
            raise ArtifactError(f"nothing in the file scales {cast.input[0]}", fix="build again")
        scale = self._origin(node.input[1]).astype(np.float32)
        following = self._consumers.get(node.output[0], [])
        if len(following) == 1 and following[0].op_type == "Reshape":
            whole = tuple(int(size) for size in self.array(following[0].input[1]))
            axis = next(axis for axis, size in enumerate(whole) if stored.shape[axis] != size)
            stored, scale = stored.reshape(whole), scale.squeeze(axis + 1)
            zero = None if zero is None else zero.squeeze(axis + 1)
        return stored, scale, zero

    def _next(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The one node that reads another's result."""
        following = self._consumers.get(node.output[0], [])
        if len(following) != 1:
            raise ArtifactError(f"{len(following)} nodes read {node.output[0]}, not one", fix="build again")
        return following[0]

    def _numbers(self, stored: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None, int]:
        """Scale, zero point and axis with which the file turns these integers into floats."""
        for node in self._consumers.get(stored, []):
            if node.op_type == "DequantizeLinear" and node.input[0] == stored:
                axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
                zero = self.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
                return self._scale(node.input[1]), zero, axis
        for node in self._consumers.get(stored, []):
            if node.op_type == "Gather":
                return self.array(self._row_scale(node)), None, 0
        raise ArtifactError(f"nothing in the file dequantizes {stored}", fix="build again")

    def _scale(self, name: str) -> npt.NDArray[Any]:
        """A scale: stored, or the product of stored steps and a unit for each channel."""
        import numpy as np

        node = None if name in self._initializers else self._producers.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return self.array(name)
        steps, unit, zero = (self.array(part) for part in node.input)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        shape = [-1 if place == axis else 1 for place in range(steps.ndim)]
        scale: npt.NDArray[Any] = (steps - zero.reshape(shape)).astype(np.float32) * unit.reshape(shape)
        return scale

    def _row_scale(self, gather: onnx.NodeProto) -> str:
        """The scale of gathered rows: Gather -> Cast -> Mul by the scale, or by the scale gathered in the same way."""
        for cast in self._consumers.get(gather.output[0], []):
            for product in self._consumers.get(cast.output[0], []):
                factors = [name for name in product.input if name != cast.output[0]]
                if product.op_type == "Mul" and len(factors) == 1:
                    name = str(factors[0])
                    while name not in self._initializers and name in self._producers:
                        name = str(self._producers[name].input[0])
                    return name
        raise ArtifactError(f"nothing in the file dequantizes the rows of {gather.input[0]}", fix="build again")


def _affine(
    stored: npt.NDArray[Any], scale: npt.NDArray[Any], zero: npt.NDArray[Any] | None, placement: Placement
) -> AffineTensor:
    """Integers, with scales and zero points of the same rank, in the torch layout.

    [out, in] with scales [out, 1] or [out, in / group].
    """
    import numpy as np

    bits = INTEGER_BITS.get(stored.dtype.name)
    if bits is None:
        raise ArtifactError(f"{placement.stored} holds {stored.dtype.name}, no weight encoding", fix="build again")
    signed = not stored.dtype.name.startswith("u")
    values = _restore(stored.astype(np.int8 if signed else np.uint8), placement)
    scale = _restore(scale, placement)
    if signed and (zero is None or not zero.astype(np.int8).any()):
        return AffineTensor(values, scale, None, _encoding(bits, True, values.shape, scale.shape))
    zeros = np.zeros(scale.shape, values.dtype)
    if zero is not None:
        zeros = _restore(zero.astype(values.dtype), placement)
    return AffineTensor(values, scale, zeros, _encoding(bits, False, values.shape, scale.shape))


def _unpacked(data: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """Unsigned integers from rows of bytes, the first in the lowest bits."""
    import numpy as np

    shifts = (np.arange(8 // bits) * bits).astype(np.uint8)
    parts = (data[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(parts.reshape(data.shape[0], -1).astype(np.uint8))


def _blocks(numbers: npt.NDArray[Any], shape: tuple[int, ...], axis: int) -> npt.NDArray[Any]:
    """Scales with the rank of the weight: a scalar, one a channel, or one a block."""
    if numbers.ndim == len(shape) and numbers.ndim > 1:
        return numbers
    wanted = [1] * len(shape)
    if numbers.size > 1:
        wanted[axis % len(shape)] = numbers.size
    return numbers.reshape(wanted)


def _restore(stored: npt.NDArray[Any], placement: Placement) -> npt.NDArray[Any]:
    """Undo the placement's permutation. The torch weight's shape."""
    import numpy as np

    if placement.permutation is None:
        return stored
    return np.ascontiguousarray(stored.transpose(np.argsort(placement.permutation)))


def _encoding(bits: int, symmetric: bool, shape: tuple[int, ...], scale: tuple[int, ...]) -> Affine:
    """The encoding that these shapes amount to."""
    blocked = [n // s for n, s in zip(shape, scale, strict=True) if s not in (1, n)]
    if blocked:
        return Affine(bits, symmetric, "group", blocked[0])
    return Affine(bits, symmetric, "tensor" if max(scale, default=1) == 1 else "channel")
