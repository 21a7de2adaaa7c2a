"""Give every weight of a program its final encoding, by the method asked for.

Methods that look at data walk the program once (`edgeship.compression.walk`): each layer is encoded against the inputs
that the encoded layers before it make. The others take each weight alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never, cast

from edgeship.compression.affine import quantize_nearest, to_float16
from edgeship.compression.palette import palettize
from edgeship.core.weights import (
    Affine,
    AffineTensor,
    Dense,
    EncodedTensor,
    Encoding,
    Float,
    FloatTensor,
    Palette,
    PaletteTensor,
    Sparse,
    SparseTensor,
    rebuild,
)
from edgeship.program.stored import WeightStore

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

    from edgeship.compression.hessian import Hessian
    from edgeship.compression.walk import Layer, Replacement
    from edgeship.core.inventory import WeightUse
    from edgeship.program.program import TorchProgram

# A table of 128k tokens takes a gigabyte in float32; rounding it whole takes several. Parts that stay in the
# processor's cache are six times as fast as parts that each operator fetches from fresh memory.
CHUNK_ELEMENTS = 1 << 20
# Against data a part is copied ten times over (8 MB each, more where rows are long: steps cost alike for any number).
PART_ELEMENTS, PART_ROWS = 1 << 21, 1024

Plain = FloatTensor | AffineTensor | PaletteTensor


@dataclass
class Encoder:
    """Encodes the weights of one program.

    Args:
        wanted: weight name -> encoding. method: ``nearest``, ``clipped``, ``gptq`` or ``awq``.
        npu_block: group scales on the grid that Hexagon holds.
        bias_correction: move what rounding does to the mean of each output channel into the operator's bias (Nagel et
            al. 2019, arXiv:1906.04721).
        scratch: where activations go that do not fit into memory; the system's temporary folder when None.
    """

    program: TorchProgram
    wanted: Mapping[str, Encoding]
    method: str = "nearest"
    npu_block: bool = False
    bias_correction: bool = False
    progress: Callable[[int, int, str], None] = lambda done, total, what: None
    scratch: Path | None = None
    _last: list[tuple[Node, Hessian]] = field(default_factory=list)

    def encode(
        self, batches: Sequence[dict[str, Any]] = (), into: MutableMapping[str, EncodedTensor] | None = None
    ) -> tuple[MutableMapping[str, EncodedTensor], dict[str, torch.Tensor]]:
        """Encoded weights by name, and float weights that changed on the way (corrected biases).

        Args:
            batches: calibration inputs; none for methods that look at weights alone.
            into: takes the encoded weights one by one, such as a file; a dictionary when None.
        """
        encoded: MutableMapping[str, EncodedTensor] = {} if into is None else into
        changed: dict[str, torch.Tensor] = {}
        if batches:
            from edgeship.compression.walk import walk

            def visit(layer: Layer) -> Replacement | None:
                return self._visit(layer, encoded, changed)

            walk(self.program, batches, visit, self.progress, reference=self.method == "gptq", folder=self.scratch)
        uses = self.program.record.inventory.weights
        for done, use in enumerate(uses):
            encoding = self.wanted.get(use.name)
            if encoding is None or use.name in encoded:
                continue
            self.progress(done, len(uses), use.name)
            weights = self.program.weights
            floating = weights.is_floating(use.name) if isinstance(weights, WeightStore) else None
            if weights[use.name].is_floating_point() if floating is None else floating:
                encoded[use.name] = self.encode_alone(use)
        return encoded, changed

    def encode_alone(self, use: WeightUse) -> EncodedTensor:
        """One weight from its own numbers. The shape of the weight stays."""
        encoding, weights = self.wanted[use.name], self.program.weights
        if isinstance(weights, WeightStore) and self._by_rows(use, encoding):
            rows = max(1, CHUNK_ELEMENTS * use.shape[0] // use.elements)
            return _joined(
                use.shape[0],
                (
                    self._encode(use, weights.rows(use.name, start, start + rows), encoding)
                    for start in range(0, use.shape[0], rows)
                ),
            )
        return self._encode(use, weights[use.name].float(), encoding)

    def _by_rows(self, use: WeightUse, encoding: Encoding) -> bool:
        """Whether a weight is large, and none of its rows needs to know of another."""
        if use.elements <= CHUNK_ELEMENTS or use.channel_axis != 0 or self.npu_block:
            return False
        return encoding.rows_alone and len(use.shape) == 2 and use.name not in self.program.record.pruned

    def encode_one(self, use: WeightUse, encoding: Encoding, layer: Layer | None = None) -> EncodedTensor:
        """One weight in one of several ways: against a layer's inputs where one is given, else from its own numbers.

        The shape of the weight stays.
        """
        if layer is None:
            return Encoder(self.program, {use.name: encoding}, self.method, self.npu_block).encode_alone(use)
        return self._encode(use, layer.weight, encoding, layer)

    def _visit(
        self, layer: Layer, encoded: MutableMapping[str, EncodedTensor], changed: dict[str, torch.Tensor]
    ) -> Replacement | None:
        """Encode the weight of one layer, and let later layers see it as it is stored, in its own shape."""
        import torch

        from edgeship.compression.walk import Replacement

        name = self.program.record.aliases.get(layer.use.name, layer.use.name)
        encoding = self.wanted.get(name)
        if encoding is None:
            return None
        tensor = self._encode(layer.use, layer.weight, encoding, layer)
        encoded[name] = tensor

        def made() -> torch.Tensor:
            return torch.from_numpy(tensor.dequantize().copy())

        correct = self.bias_correction and layer.use.op in ("linear", "conv", "depthwise_conv")
        if not correct or layer.bias is None or isinstance(encoding, Float):
            return Replacement(made)
        bias = self._corrected(layer, made())
        changed[layer.bias] = bias
        return Replacement(made, bias)

    def _corrected(self, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
        """The bias, [out], that takes back what rounding the weight adds to the outputs' means."""
        from edgeship.compression.bias_correction import corrected_bias

        assert layer.bias is not None
        bias = self.program.weight(layer.bias).float()
        window = _window(layer) if layer.use.op != "linear" else {}
        groups = layer.use.groups
        return corrected_bias(bias, layer.weight, weight, layer.inputs, groups=groups, name=layer.use.name, **window)

    def _encode(
        self, use: WeightUse, weight: torch.Tensor, encoding: Encoding, layer: Layer | None = None
    ) -> EncodedTensor:
        """``weight`` in its own shape: [out, in], or [out, in / groups, ...kernel]."""
        if isinstance(encoding, Sparse):
            kept = weight != 0
            return _masked(self._plain(use, weight, encoding.inner, layer, kept), kept, encoding)
        # What pruning made zero stays zero, stored or not. A palette stored densely has no entry kept for it: there
        # zeros are values like any other, and get the entry nearest to them.
        masked = use.name in self.program.record.pruned and not isinstance(encoding, Palette)
        if not isinstance(encoding, Dense):
            values = encoding.encode(
                weight.numpy(), axis=use.channel_axis, clip=self.method != "nearest", name=use.name
            )
            return values
        return self._plain(use, weight, encoding, layer, weight != 0 if masked else None)

    def _plain(
        self,
        use: WeightUse,
        weight: torch.Tensor,
        encoding: Dense,
        layer: Layer | None,
        mask: torch.Tensor | None,
    ) -> Plain:
        """As `_encode`, without sparsity; ``mask`` has the weight's shape and is True where it is kept."""
        if isinstance(encoding, Float):
            return FloatTensor(weight.float().numpy()) if encoding.bits == 32 else to_float16(weight, use.name)
        if isinstance(encoding, Affine) and encoding.granularity == "group" and self.npu_block:
            from edgeship.compression.lpbq import quantize_npu_block

            return quantize_npu_block(weight, encoding, clip=self.method != "nearest", name=use.name)
        if self.method == "gptq" and layer is not None and use.op in ("linear", "conv", "depthwise_conv"):
            from edgeship.compression.gptq import quantize_gptq, quantize_gptq_conv

            hessian = self._hessian(layer)
            if use.op == "linear":

                def some(rows: slice) -> Plain:
                    kept = None if mask is None else mask[rows]
                    return quantize_gptq(weight[rows], hessian, encoding, mask=kept, name=use.name)  # type: ignore[arg-type]

                return _by_parts(weight, encoding, some)
            return quantize_gptq_conv(
                weight, (), encoding, groups=use.groups, mask=mask, hessian=hessian, name=use.name
            )
        match encoding:
            case Palette():
                return palettize(weight, encoding, importance=None if mask is None else mask.float(), name=use.name)
            case Affine():
                return self._integers(use, weight, encoding, layer)
            case _:
                assert_never(encoding)

    def _integers(self, use: WeightUse, weight: torch.Tensor, encoding: Affine, layer: Layer | None) -> Plain:
        """Integers by any method but GPTQ."""
        if self.method == "awq" and layer is not None and use.op == "linear":
            from edgeship.compression.awq import quantize_awq

            seen = self._hessian(layer)
            return _by_parts(weight, encoding, lambda rows: quantize_awq(weight[rows], seen, encoding, name=use.name))
        return quantize_nearest(weight, encoding, axis=use.channel_axis, clip=self.method != "nearest", name=use.name)

    def _hessian(self, layer: Layer) -> Hessian:
        """Of a layer's inputs. Query, key and value read the same ones: one Hessian serves the three."""
        from edgeship.compression.hessian import hessian_of, hessian_of_conv

        if layer.use.op != "linear":
            return hessian_of_conv(
                layer.inputs, layer.weight.shape, groups=layer.use.groups, wanted=layer.wanted, **_window(layer)
            )
        if not self._last or self._last[0][0] is not layer.source:
            # Gone before the next one is made.
            self._last.clear()
            self._last.append((layer.source, hessian_of(layer.inputs, layer.weight.shape[1], layer.wanted)))
        return self._last[0][1]


def _by_parts(weight: torch.Tensor, encoding: Encoding, encode: Callable[[slice], Plain]) -> Plain:
    """A large weight some rows at a time, where none of its rows needs to know of another."""
    rows = max(PART_ROWS, PART_ELEMENTS // weight.shape[1])
    if not encoding.rows_alone or rows >= weight.shape[0]:
        return encode(slice(None))
    parts = (encode(slice(start, start + rows)) for start in range(0, weight.shape[0], rows))
    return cast("AffineTensor", _joined(weight.shape[0], parts))


def _joined(rows: int, parts: Iterable[EncodedTensor]) -> EncodedTensor:
    """Rows that were encoded one part after another, as one weight."""
    import numpy as np

    arrays: dict[str, Any] = {}
    start = 0
    for part in parts:
        for role, array in part.arrays().items():
            if role not in arrays:
                arrays[role] = np.empty((rows, *array.shape[1:]), array.dtype)
            arrays[role][start : start + len(array)] = array
        start += part.shape[0]
        encoding = part.encoding
    return rebuild(encoding, arrays)


def _window(layer: Layer) -> dict[str, Any]:
    """Stride, padding and dilation of ``aten.conv*d(input, weight, bias, stride, padding, dilation, groups)``."""
    return dict(zip(("stride", "padding", "dilation"), layer.node.args[3:6], strict=False))


def _masked(inner: Plain, mask: torch.Tensor, encoding: Sparse) -> SparseTensor:
    """The sparse form, with canonical zeros outside the mask. ``mask`` has the shape of the weight."""
    import numpy as np

    kept = mask.numpy()
    match inner:
        case FloatTensor():
            inside: Plain = FloatTensor(np.where(kept, inner.values, inner.values.dtype.type(0)))
        case AffineTensor():
            zero = inner.values.dtype.type(0)
            inside = AffineTensor(np.where(kept, inner.values, zero), inner.scale, inner.zero_point, inner.encoding)
        case PaletteTensor():
            inside = PaletteTensor(np.where(kept, inner.indices, np.uint8(0)), inner.table, inner.encoding)
        case _:
            assert_never(inner)
    return SparseTensor(kept, inside, encoding)
