"""`TorchToOnnx`: a torch program to an ONNX file for ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from edgeship.core.forms import STATIC_MODES, ActivationMode
from edgeship.core.model import OnnxModel, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import forms_of, other_runtime
from edgeship.core.profile import Request
from edgeship.errors import LoweringError


@dataclass(frozen=True)
class TorchToOnnx(Pass):
    """Lower to ONNX (opset 21), each weight stored as decided and static activations as QuantizeLinear pairs.

    Args:
        activations: what the profile chose; it decides the form of integer weights (see
            `edgeship.lowering.onnx.weights`) and, for forms that leave it open, session options that the app must set,
            which ship as the artifact's facts and as the file's own metadata.
        packed_rows: beside static activations, rows of 8-bit tables are taken while they are integers: ONNX Runtime
            would dequantize the whole table at every run. Compilers of such files have a form of their own.
    """

    name: ClassVar[str] = "lower/torch_to_onnx"
    tools: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnx-ir")
    activations: ActivationMode = "float"
    packed_rows: bool = False

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Itself for runtimes that take ONNX."""
        from edgeship.core.registry import runtimes

        if reason := other_runtime(request, OnnxModel):
            return Skip(reason)
        activations, uses = request.choice.activations, request.inventory.weights if request.inventory else ()
        tables = activations in STATIC_MODES and any(use.looked_up for use in uses)
        return cls(activations, packed_rows=tables and runtimes()[request.runtime].artifact is OnnxModel)

    def run(self, model: TorchModel, ctx: Context) -> OnnxModel:
        """Write ``model.onnx``. Raises `UnsupportedOpError`, `LoweringError` or `EncodingError`."""
        from edgeship.lowering.onnx.activations import store_activations
        from edgeship.lowering.onnx.export import export_graph
        from edgeship.lowering.onnx.folds import fold_pads
        from edgeship.lowering.onnx.options import session_options
        from edgeship.lowering.onnx.save import save_model
        from edgeship.lowering.onnx.weights import place_weights
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model).in_forms(forms_of(OnnxModel))
        graph, weights = export_graph(program)
        placements = place_weights(graph, weights, program, self.activations, packed_rows=self.packed_rows)
        if program.activations:
            store_activations(graph, program)
        fold_pads(graph)
        narrow = any(grid.bits <= 8 for grid in program.activations.values())
        options = session_options(graph, self.activations, bytes_meet=narrow or self.activations == "dynamic")
        graph.metadata_props.update(options)
        path = ctx.folder / "model.onnx"
        files = save_model(graph, path)
        integer = bool(program.activations) or self.activations == "dynamic"
        return OnnxModel(
            path,
            program.signature,
            files=files,
            placements=placements,
            compute="int" if integer else "f32",
            facts=dict(options),
        )

    def ensures(self, output: Any, **inputs: Any) -> None:
        """Every weight that compression decided has a place in the file."""
        from edgeship.program.program import read_record

        placed = {placement.weight for placement in output.placements}
        missing = [name for name in read_record(inputs["model"]).encodings if name not in placed]
        if missing:
            raise LoweringError(f"weight {missing[0]} is not in {output.path.name}", fix="report this as a bug")
