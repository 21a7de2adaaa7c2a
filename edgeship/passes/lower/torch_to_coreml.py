"""Lower a torch program to Core ML."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeship.core.model import CoreMLModel, Signature, TensorSpec, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import forms_of, other_runtime
from edgeship.core.profile import Request
from edgeship.errors import EncodingError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgeship.core.weights import EncodedTensor
    from edgeship.program.program import TorchProgram

TARGETS = ("iOS16", "iOS17", "iOS18", "iOS26")


@dataclass(frozen=True)
class TorchToCoreML(Pass):
    """Lower to a Core ML package, storing each weight exactly as it was decided.

    Args:
        target: the oldest system that the package must run on. int4, groups, grouped palettes and sparse integers need
            iOS18, static activations iOS17.
        compute: arithmetic of the program. The Neural Engine computes in float16.
    """

    name: ClassVar[str] = "lower/torch_to_coreml"
    tools: ClassVar[tuple[str, ...]] = ("torch", "coremltools")
    target: str = "iOS17"
    compute: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f'no Core ML target "{self.target}"', fix=f"use one of {', '.join(TARGETS)}")

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """This pass with the target's system, for the Core ML runtime."""
        if reason := other_runtime(request, CoreMLModel):
            return Skip(reason)
        oldest = request.target.setting("coreml.minimum_deployment_target", "iOS17")
        compute: Literal["float16", "float32"] = "float32" if request.choice.weights == "float32" else "float16"
        return cls(str(oldest), compute)

    def run(self, model: TorchModel, ctx: Context) -> CoreMLModel:
        """Write ``model.mlpackage`` into the step's folder.

        Raises:
            UnsupportedOpError: an operator has no lowering. LoweringError: the converter lost a weight.
            EncodingError: the target has no form for an encoding.
        """
        from edgeship.lowering.coreml.convert import convert
        from edgeship.lowering.coreml.package import save
        from edgeship.lowering.locate import check_floats, placements
        from edgeship.program.program import TorchProgram
        from edgeship.runtimes.coreml.stored import encoded_weights

        program = TorchProgram.open(model).in_forms(forms_of(CoreMLModel))
        check_floats(program.encoded, self.compute, "Core ML")
        self._check_system(program.encoded)
        ctx.progress(0, 2, "convert")
        converted, names = convert(program, self.target, self.compute)
        ctx.progress(1, 2, "save")
        path = ctx.folder / "model.mlpackage"
        save(converted, path)
        return CoreMLModel(
            path,
            _narrowed(program.signature),
            files=tuple(sorted(str(file.relative_to(ctx.folder)) for file in path.rglob("*") if file.is_file())),
            placements=placements(program.encoded, names, encoded_weights(path), "Core ML"),
            compute="f16" if self.compute == "float16" else "f32",
            facts={"minimum_deployment_target": self.target, **self._wide(program)},
        )

    def _wide(self, program: TorchProgram) -> dict[str, str]:
        """What is computed in float32 although the rest is in float16, for the artifact's facts."""
        from edgeship.program.wide import named_wide

        return named_wide(program.exported.graph) if self.compute == "float16" else {}

    def _check_system(self, encoded: Mapping[str, EncodedTensor]) -> None:
        """Refuse what the oldest system cannot hold, and say what it can."""
        from edgeship.runtimes.coreml.forms import lacking

        system = int(self.target.removeprefix("iOS"))
        for weight, tensor in encoded.items():
            reason = lacking(tensor.encoding, system)
            if reason:
                newer = next((name for name in TARGETS if not lacking(tensor.encoding, int(name[3:]))), TARGETS[-1])
                raise EncodingError(
                    f"Core ML of iOS {system} cannot hold {tensor.encoding} for {weight}: {reason}",
                    fix=f"use that, or --set {self.name}.target={newer}",
                )


def _narrowed(signature: Signature) -> Signature:
    """Core ML's border has float32 and int32: other integers and bools go in and come out as int32."""

    def narrow(spec: TensorSpec) -> TensorSpec:
        return spec if spec.is_float else spec.with_dtype("i32")

    return replace(
        signature, inputs=tuple(map(narrow, signature.inputs)), outputs=tuple(map(narrow, signature.outputs))
    )
