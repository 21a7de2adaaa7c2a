"""TorchModel to a ``.tflite`` for LiteRT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.forms import ActivationMode
from edgeship.core.model import TFLiteModel, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import forms_of, other_runtime
from edgeship.core.profile import Request
from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from edgeship.core.weights import AffineTensor, FloatTensor
    from edgeship.program.program import TorchProgram


@dataclass(frozen=True)
class TorchToTFLite(Pass):
    """Write a .tflite for LiteRT, with every weight stored exactly as decided.

    Args:
        activations: ``float`` computes in float32, with integer weights dequantized first; ``dynamic`` lets kernels
            quantize activations to int8 while running, where they can; ``int8`` and ``int16`` compute in integers on
            the grids that calibration decided, and in float where no integer kernel is known to be right.
    """

    name: ClassVar[str] = "lower/torch_to_tflite"
    tools: ClassVar[tuple[str, ...]] = ("torch", "litert-torch", "litert-converter", "ai-edge-litert")
    activations: ActivationMode = "float"

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Itself for the LiteRT runtime, with the activations that the profile chose."""
        if reason := other_runtime(request, TFLiteModel):
            return Skip(reason)
        return cls(activations=request.choice.activations)

    def run(self, model: TorchModel, ctx: Context) -> TFLiteModel:
        """Convert the graph with its weights as inputs, then store the weights.

        Raises:
            UnsupportedOpError, LoweringError, EncodingError: see `edgeship.lowering.litert`.
        """
        from edgeship.lowering.litert.convert import SIGNATURE_KEY, convert, refuse_unrunnable
        from edgeship.lowering.litert.flatbuffer import drop_unused, main_graph, parse, write
        from edgeship.lowering.litert.grids import unmark, with_marked_pairs
        from edgeship.lowering.litert.integer import IntegerGraph
        from edgeship.lowering.litert.interface import name_interface, on_device
        from edgeship.lowering.litert.layout import fold_pads, keep_layout
        from edgeship.lowering.litert.names import shorten_names
        from edgeship.lowering.litert.opened import open_weights, stored_weights
        from edgeship.lowering.litert.store import WeightStorer, refuse_encodings
        from edgeship.lowering.litert.survey import survey
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model).in_forms(forms_of(TFLiteModel))
        refuse_encodings(program, self.activations)
        ctx.progress(0, 3, "convert")
        opened = open_weights(with_marked_pairs(program), stored_weights(program))
        converted = parse(convert({SIGNATURE_KEY: opened}))
        refuse_unrunnable(converted)
        ctx.progress(1, 3, "store weights")
        graph = main_graph(converted)
        nodes = unmark(converted, graph, program.activations)
        tensors = name_interface(converted, program.signature, len(opened.weights))
        storer = WeightStorer(converted, graph, "dynamic" if self.activations == "dynamic" else "float")
        placements = storer.store(tensors, [(name, _as_stored(program, name)) for name in opened.weights])
        if nodes:
            IntegerGraph(converted, graph, nodes, program.activations).fuse()
        keep_layout(converted, graph)
        fold_pads(converted, graph)
        drop_unused(converted)
        shorten_names(converted, {placement.stored for placement in placements})
        ctx.progress(2, 3, "write")
        path = ctx.folder / "model.tflite"
        write(converted, path)
        return TFLiteModel(
            path,
            on_device(program.signature),
            files=(path.name,),
            placements=tuple(placements),
            compute="int" if nodes or self.activations == "dynamic" else "f32",
            facts={"activations": self.activations, **survey(converted)},
        )

    def ensures(self, output: Any, **inputs: Any) -> None:
        """Every weight that compression decided has a place in the file."""
        from edgeship.program.program import read_record

        placed = {placement.weight for placement in output.placements}
        missing = [name for name in read_record(inputs["model"]).encodings if name not in placed]
        if missing:
            raise LoweringError(f"weight {missing[0]} is not in {output.path.name}", fix="report this as a bug")


def _as_stored(program: TorchProgram, name: str) -> FloatTensor | AffineTensor:
    from edgeship.core.weights import FloatTensor
    from edgeship.lowering.litert.store import storable

    if name in program.encoded:
        return storable(name, program.encoded[name])
    return FloatTensor(program.weight(name).detach().float().numpy())
