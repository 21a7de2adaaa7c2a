"""compress/quantize: decide how each weight is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.core.weights import Affine, EncodedTensor, Float, Granularity
from edgeship.errors import DataError

if TYPE_CHECKING:
    import torch

    from edgeship.core.inventory import WeightUse
    from edgeship.program.program import TorchProgram

# Integers cost more than they save on the handful of numbers of a bias or a norm.
QUANTIZABLE = ("linear", "conv", "depthwise_conv", "conv_transpose", "embedding")
Method = Literal["nearest", "clipped", "gptq"]


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Decide how each weight is stored: float16, or integers with a scale for each channel or group.

    Args:
        form: ``float16``, or ``int`` for an affine grid of ``bits``.
        granularity, group_size: how far one scale reaches. A weight whose input channels the group does not divide,
            and a convolution, gets one scale a channel.
        symmetric: zero point 0 and the narrow range.
        method: ``nearest`` covers each block's range; ``clipped`` shrinks it to the least squared error; ``gptq``
            rounds linear layers column by column against calibration data, and clips the rest.
        data, samples: calibration inputs for ``gptq``.
    """

    name: ClassVar[str] = "compress/quantize"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    settles: ClassVar[str] = "weights"

    form: Literal["float16", "int"] = "int"
    bits: int = 8
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = True
    method: Method = "nearest"
    data: DataRef | None = None
    samples: int = 128

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Configured from the profile."""
        choice = request.choice
        if choice.weights == "float32":
            return Skip(f"profile {request.profile.name} keeps weights in float32")
        if choice.weights == "float16":
            return cls(form="float16", bits=16)
        return cls(bits=int(choice.weights[3:]), data=request.calibration)

    def confirm(self, request: Request) -> None:
        """Refuse what the runtime cannot hold, and a method without its data."""
        from edgeship.core.planning import refuse_unholdable

        if self.method == "gptq" and self.data is None:
            raise DataError("method gptq needs calibration data", fix="add --calibration DATA")
        refuse_unholdable(request, self.encoding)

    def encoding(self, use: WeightUse) -> Float | Affine | None:
        """How one weight is stored; None for biases, norms and scalars, which stay as they are."""
        if use.op not in QUANTIZABLE:
            return None
        if self.form == "float16":
            return Float(16)
        if self.granularity == "group":
            size = self.group_size or 32
            if use.op in ("linear", "embedding") and use.shape[1] % size == 0:
                return Affine(self.bits, self.symmetric, "group", size)
            return Affine(self.bits, self.symmetric)
        return Affine(self.bits, self.symmetric, self.granularity)

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Encode every weight of a linear, convolution or embedding."""
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model)
        encoded = dict(program.encoded)
        encoded.update(self._by_walk(program, ctx) if self.method == "gptq" else {})
        uses = program.record.inventory.weights
        for done, use in enumerate(uses):
            ctx.progress(done, len(uses), use.name)
            encoding = self.encoding(use)
            if encoding is None or use.name in program.record.aliases or use.name in encoded:
                continue
            weight = program.weights[use.name]
            if weight.dtype.is_floating_point:
                encoded[use.name] = self._alone(use, weight, encoding)
        record = replace(
            program.record,
            encodings={name: tensor.encoding for name, tensor in encoded.items()},
            history=(*program.record.history, f"{self.name}: {self.form}{self.bits}, {self.method}"),
        )
        replace(program, encoded=encoded, record=record).save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", model.signature)

    def _alone(self, use: WeightUse, weight: torch.Tensor, encoding: Float | Affine) -> EncodedTensor:
        """One weight from its own numbers."""
        from edgeship.compression.affine import quantize_nearest, to_float16

        if isinstance(encoding, Float):
            return to_float16(weight.float(), use.name)
        clip = self.method != "nearest"
        return quantize_nearest(weight, encoding, axis=use.channel_axis, clip=clip, name=use.name)

    def _by_walk(self, program: TorchProgram, ctx: Context) -> dict[str, EncodedTensor]:
        """Linear layers, in the order of the graph, each against inputs that the quantized layers before it made."""
        import torch

        from edgeship.compression.gptq import Hessian, hessian_of, quantize_gptq
        from edgeship.compression.walk import Layer, walk
        from edgeship.data.batches import load_batches

        assert self.data is not None
        batches = load_batches(self.data.reference, program.signature, self.samples)
        made: dict[str, EncodedTensor] = {}
        last: list[tuple[tuple[torch.Tensor, ...], Hessian]] = []

        def visit(layer: Layer) -> torch.Tensor | None:
            encoding = self.encoding(layer.use)
            if not isinstance(encoding, Affine):
                return None
            tensor: EncodedTensor
            if layer.use.op == "linear" and layer.inputs[0].is_floating_point():
                # Query, key and value read the same input: one Hessian serves the three.
                known = bool(last) and all(a is b for a, b in zip(last[0][0], layer.inputs, strict=True))
                if not known:
                    last[:] = [(layer.inputs, hessian_of(layer.inputs, layer.weight.shape[1]))]
                tensor = quantize_gptq(layer.weight, last[0][1], encoding, name=layer.use.name)
            else:
                tensor = self._alone(layer.use, layer.weight, encoding)
            made[layer.use.name] = tensor
            return torch.from_numpy(tensor.dequantize().copy())

        walk(program, batches, visit, ctx.progress)
        return made
