"""lower/decoder_to_qnn: a language model to steps of fixed shape for Hexagon."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.decoder import LanguageFacts, context_of
from edgeship.core.model import Placement, QnnDecoder, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import forms_of, other_runtime
from edgeship.core.profile import DataRef, Request
from edgeship.errors import UsageError

if TYPE_CHECKING:
    from edgeship.lowering.qnn.decoder import Step

# Above this the compiler needs more memory than a build host is sure to have; the graphs ship without contexts.
MAX_COMPILED_BYTES = 1 << 29


@dataclass(frozen=True)
class DecoderToQnn(Pass):
    """Write prefill and decode for Hexagon: QDQ ONNX with 16-bit activations and, for small models, context binaries.

    Args:
        context: positions of the caches; the model's own, at most 2048, when None.
        chunk: tokens that prefill takes at once.
        soc_model: Qualcomm's number of the chip. htp_arch: its Hexagon's version.
        data: texts that the activations of each step are calibrated on; drawn from ``seed`` when not given.
        samples: inputs of a step that are looked at.
        timeout_s: for the context of one step.
    """

    name: ClassVar[str] = "lower/decoder_to_qnn"
    tools: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnxruntime-qnn", "onnxruntime", "onnx", "onnxscript")
    decided: ClassVar[dict[str, str]] = {"context": "--context"}

    context: int | None = None
    chunk: int = 32
    soc_model: int = 0
    htp_arch: int = 0
    data: DataRef | None = None
    samples: int = 32
    seed: int = 0
    timeout_s: int = 900

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Configured with the target's chip, for Hexagon's language models."""
        if reason := other_runtime(request, QnnDecoder):
            return Skip(reason)
        if request.choice.activations != "int16":
            return Skip(
                f"profile {request.profile.name} has {request.choice.activations} activations, and a language model on "
                "Hexagon 16-bit ones: use balanced, small or auto"
            )
        soc_model, htp_arch = request.target.setting("qnn.soc_model"), request.target.setting("qnn.htp_arch")
        if soc_model is None or htp_arch is None:
            return Skip(f"{request.target.name} has no Hexagon (no qnn.soc_model and qnn.htp_arch)")
        return cls(request.context, soc_model=int(soc_model), htp_arch=int(htp_arch), data=request.calibration)

    def confirm(self, request: Request) -> None:
        """Refuse a chunk of no tokens."""
        if self.chunk < 2:
            raise UsageError(f"{self.name}.chunk={self.chunk} is not a chunk length", fix="leave it out for 32")

    def run(self, model: TorchModel, ctx: Context) -> QnnDecoder:
        """Write ``model_qnn/`` with a graph and perhaps a context for each step, rotations and the tokenizer's files.

        Raises:
            UnsupportedOpError: an operator would fall back to the CPU; names it.
            LoweringError: the compiler failed, crashed or took too long.
            UsageError: a context that the model has not.
        """
        from edgeship.data.batches import calibration_batches
        from edgeship.llm.hosted import Host
        from edgeship.lowering.qnn.compiler import Compiler
        from edgeship.lowering.qnn.decoder import angle_tables, step_program, write_step
        from edgeship.lowering.qnn.provider import Hexagon
        from edgeship.program.program import TorchProgram
        from edgeship.program.stored import TensorWriter

        program = TorchProgram.open(model).in_forms(forms_of(QnnDecoder))
        decoder, origin = program.language()
        context = context_of(decoder, self.context)
        chunk = min(self.chunk, context)
        folder = ctx.folder / "model_qnn"
        folder.mkdir()
        angles = angle_tables(program, context)
        with TensorWriter(folder / "angles.safetensors", len(angles)) as writer:
            for name, table in angles.items():
                writer.add(name, table)
        host = Host.of(decoder, context, angles)
        steps = {
            "prefill": step_program(program, host, chunk, logits=False),
            "decode": step_program(program, host, 1, logits=True),
        }
        texts = calibration_batches(self.data, program.signature, self.samples, self.seed)
        steps = self._calibrated(steps, host, [batch["input_ids"].reshape(-1).tolist() for batch in texts])
        placements: dict[str, Placement] = {}
        compiled = True
        for place, (name, step) in enumerate(steps.items()):
            ctx.progress(place, len(steps), name)
            graph = folder / f"{name}.qdq.onnx"
            placements |= {item.weight: item for item in write_step(step, graph, self.htp_arch)}
            if graph.stat().st_size > MAX_COMPILED_BYTES:
                compiled = False
                continue
            chip = Hexagon(self.soc_model, self.htp_arch)
            Compiler(graph, chip, self.timeout_s, ctx.log).write_context(f"{name}_ctx.onnx")
        for name in decoder.files:
            shutil.copyfile(origin / name, folder / name)
        facts = {
            "qnn.soc_model": str(self.soc_model),
            "qnn.htp_arch": str(self.htp_arch),
            "qnn.contexts": "in the folder" if compiled else "to be made from the graphs on a host with more memory",
        }
        return QnnDecoder(
            folder,
            program.signature,
            files=tuple(f"{folder.name}/{path.name}" for path in sorted(folder.iterdir())),
            placements=tuple(placements.values()),
            compute="int",
            facts=facts,
            language=LanguageFacts.of(decoder, context, "float32", chunk),
        )

    def _calibrated(self, steps: Mapping[str, Step], host: Any, texts: list[list[int]]) -> dict[str, Step]:
        from edgeship.compression.calibrate import decide_activations
        from edgeship.lowering.qnn.decoder import record_steps
        from edgeship.program.rewrites import for_static_activations

        given = record_steps({step.tokens: step for step in steps.values()}, host, texts, self.samples)
        found = {}
        for name, step in steps.items():
            # Modules hold themselves: what was run last would stay beside what is run next, all of it in float32.
            gc.collect()
            static = for_static_activations(step.program, 16)
            decided = decide_activations(static, given[step.tokens], bits=16, method="minmax")
            # Prefill has no head: what only the head's layer reads of the cache has no place in its graph.
            read = {node.name for node in static.exported.graph.nodes if node.users}
            activations = {node: grid for node, grid in decided.items() if node in read}
            found[name] = replace(step, program=replace(static, record=replace(static.record, activations=activations)))
        return found
