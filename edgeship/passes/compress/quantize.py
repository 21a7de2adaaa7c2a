"""compress/quantize: decide how each weight is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.core.weights import Affine, Float, Granularity

if TYPE_CHECKING:
    from edgeship.core.inventory import WeightUse

# Integers cost more than they save on the handful of numbers of a bias or a norm.
QUANTIZABLE = ("linear", "conv", "depthwise_conv", "conv_transpose", "embedding")


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Decide how each weight is stored: float16, or integers rounded to nearest with one scale a channel.

    Args:
        form: ``float16``, or ``int`` for an affine grid of ``bits``.
        granularity, group_size: how far one scale reaches.
        symmetric: zero point 0 and the narrow range.
    """

    name: ClassVar[str] = "compress/quantize"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    settles: ClassVar[str] = "weights"

    form: Literal["float16", "int"] = "int"
    bits: int = 8
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = True
    method: Literal["nearest"] = "nearest"

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Configured from the profile; refuses what the runtime cannot hold, weight by weight."""
        from edgeship.core.planning import refuse_unholdable

        choice = request.choice
        if choice.weights == "float32":
            return Skip(f"profile {request.profile.name} keeps weights in float32")
        task = cls(form="float16", bits=16) if choice.weights == "float16" else cls(bits=int(choice.weights[3:]))
        refuse_unholdable(request, task.encoding)
        return task

    @property
    def encoding(self) -> Float | Affine:
        """The encoding that its options name."""
        if self.form == "float16":
            return Float(16)
        return Affine(self.bits, self.symmetric, self.granularity, self.group_size)

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Encode every weight of a linear, convolution or embedding; with float16, every float weight."""
        import torch

        from edgeship.compression.affine import quantize_nearest, to_float16
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model)
        uses = [use for use in program.record.inventory.weights if self.takes(use)]
        encoded = dict(program.encoded)
        for done, use in enumerate(uses):
            ctx.progress(done, len(uses), use.name)
            if use.name in program.record.aliases:
                continue
            weight = program.weights[use.name]
            if not weight.dtype.is_floating_point:
                continue
            if isinstance(self.encoding, Affine):
                encoded[use.name] = quantize_nearest(weight, self.encoding, axis=use.channel_axis, name=use.name)
            else:
                encoded[use.name] = to_float16(weight.to(torch.float32), use.name)
        record = replace(
            program.record,
            encodings={name: tensor.encoding for name, tensor in encoded.items()},
            history=(*program.record.history, f"{self.name}: {self.encoding}, {self.method}"),
        )
        replace(program, encoded=encoded, record=record).save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", model.signature)

    def takes(self, use: WeightUse) -> bool:
        """Whether a weight is encoded: matrices and kernels; scalars, biases and norms stay as they are."""
        return use.op in QUANTIZABLE
