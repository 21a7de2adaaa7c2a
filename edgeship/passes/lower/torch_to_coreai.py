"""Lower a torch program to Core AI."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from edgeship.core.model import CoreAIModel, Signature, TensorSpec, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import forms_of, other_runtime
from edgeship.core.profile import Request


@dataclass(frozen=True)
class TorchToCoreAI(Pass):
    """Lower to a Core AI asset, storing each weight exactly as it was decided.

    Args:
        compute: arithmetic of the program. The Neural Engine computes in float16.
    """

    name: ClassVar[str] = "lower/torch_to_coreai"
    tools: ClassVar[tuple[str, ...]] = ("torch", "coreai-torch", "coreai-core")
    compute: Literal["float16", "float32"] = "float16"

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """This pass, for the Core AI runtime."""
        if reason := other_runtime(request, CoreAIModel):
            return Skip(reason)
        return cls("float32" if request.choice.weights == "float32" else "float16")

    def run(self, model: TorchModel, ctx: Context) -> CoreAIModel:
        """Write ``model.aimodel`` into the step's folder.

        Raises:
            UnsupportedOpError: an operator has no lowering. LoweringError: the converter failed, or left a weight out.
            EncodingError: Core AI has no form for an encoding.
        """
        from edgeship.lowering.coreai.convert import convert, save
        from edgeship.lowering.coreai.graph import decomposed
        from edgeship.lowering.locate import check_floats, placements
        from edgeship.program.program import TorchProgram
        from edgeship.program.wide import named_wide
        from edgeship.runtimes.coreai.bytecode import unsteady_names
        from edgeship.runtimes.coreai.stored import stored_weights

        program = TorchProgram.open(model).in_forms(forms_of(CoreAIModel))
        check_floats(program.encoded, self.compute, "Core AI")
        ctx.progress(0, 3, "decompose")
        exported = decomposed(program, self.compute)
        ctx.progress(1, 3, "convert")
        converted, names = convert(exported, program.encoded, program.record.aliases, program.signature)
        ctx.progress(2, 3, "save")
        path = ctx.folder / "model.aimodel"
        save(converted, path)
        wide = named_wide(program.exported.graph) if self.compute == "float16" else {}
        return CoreAIModel(
            path,
            _narrowed(program.signature),
            files=tuple(sorted(str(file.relative_to(ctx.folder)) for file in path.rglob("*") if file.is_file())),
            placements=placements(program.encoded, names, stored_weights(path), "Core AI"),
            compute="f16" if self.compute == "float16" else "f32",
            facts=unsteady_names(path) | wide,
        )


def _narrowed(signature: Signature) -> Signature:
    """Core AI has no 64-bit tensors at the border: int64 ids go in and come out as int32."""

    def narrow(spec: TensorSpec) -> TensorSpec:
        return spec.with_dtype("i32") if spec.dtype == "i64" else spec

    return replace(
        signature, inputs=tuple(map(narrow, signature.inputs)), outputs=tuple(map(narrow, signature.outputs))
    )
