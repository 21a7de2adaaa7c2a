"""`OnnxToQnn`: an ONNX file to what Hexagon runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from edgeship.core.model import OnnxModel, QnnModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import other_runtime
from edgeship.core.profile import Request
from edgeship.errors import LoweringError

# QNN addresses a graph with 32 bits.
MAX_GRAPH_BYTES = 2**31


@dataclass(frozen=True)
class OnnxToQnn(Pass):
    """Compile for Hexagon: QDQ ONNX for any chip, a context binary for this one, and a DLC.

    Args:
        soc_model: Qualcomm's number of the chip. htp_arch: its Hexagon's version.
        timeout_s: for the context, and again for the DLC.
    """

    name: ClassVar[str] = "lower/onnx_to_qnn"
    tools: ClassVar[tuple[str, ...]] = ("onnxruntime-qnn", "onnxruntime", "onnx")

    soc_model: int = 0
    htp_arch: int = 0
    timeout_s: int = 900

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Configured with the target's chip."""
        if reason := other_runtime(request, QnnModel):
            return Skip(reason)
        soc_model, htp_arch = request.target.setting("qnn.soc_model"), request.target.setting("qnn.htp_arch")
        if soc_model is None or htp_arch is None:
            return Skip(f"{request.target.name} has no Hexagon (no qnn.soc_model and qnn.htp_arch)")
        return cls(int(soc_model), int(htp_arch))

    def run(self, model: OnnxModel, ctx: Context) -> QnnModel:
        """Write ``model_qnn/``: model.qdq.onnx, model_ctx.onnx with model_ctx_qnn.bin, and model.dlc.

        Raises:
            UnsupportedOpError: an operator would fall back to the CPU; names it.
            LoweringError: the compiler failed, crashed or took too long.
        """
        from edgeship.lowering.qnn.compiler import Compiler
        from edgeship.lowering.qnn.provider import Hexagon
        from edgeship.lowering.qnn.whole import rewrite_graph

        sources = [model.path.parent / name for name in model.files]
        if sum(path.stat().st_size for path in sources) > MAX_GRAPH_BYTES:
            raise LoweringError("the graph is above QNN's 2 GB", fix="split it, or store the weights in fewer bits")
        folder = ctx.folder / "model_qnn"
        folder.mkdir()
        graph = folder / "model.qdq.onnx"
        rewrite_graph(model.path, graph, self.htp_arch)
        chip = Hexagon(self.soc_model, self.htp_arch, float16=model.compute != "int")
        compiler = Compiler(graph, chip, self.timeout_s, ctx.log)
        ctx.progress(0, 2, "context binary")
        compiler.write_context("model_ctx.onnx")
        ctx.progress(1, 2, "DLC")
        compiler.write_dlc("model.dlc")
        names = sorted(path.name for path in folder.iterdir())
        facts = {
            **model.facts,
            "qnn.soc_model": str(self.soc_model),
            "qnn.htp_arch": str(self.htp_arch),
            "qnn.context_bytes": str((folder / "model_ctx_qnn.bin").stat().st_size),
        }
        return QnnModel(
            folder,
            model.signature,
            files=tuple(f"{folder.name}/{name}" for name in names),
            placements=model.placements,
            compute="int" if model.compute == "int" else "f16",
            facts=facts,
        )
