"""load/huggingface: a local Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.data.specs import parse_inputs
from edgeship.program.suppression import CANDIDATES, check_candidates

if TYPE_CHECKING:
    from edgeship.frontends.huggingface import LoadedFolder


@dataclass(frozen=True)
class LoadHuggingFace(Pass):
    """Load a local Hugging Face folder through transformers and export it.

    Args:
        part: of an encoder-decoder: ``encoder``, ``decoder`` (one step of it), or all of it when empty.
        context: positions that the step's cache has; the model's own, at most 2048, when None.
        cut: where the model ends instead of at its outputs: modules, or nodes of its graph.
        candidates: how many boxes, best first, go into one non-maximum suppression.
    """

    name: ClassVar[str] = "load/huggingface"
    tools: ClassVar[tuple[str, ...]] = ("torch", "transformers", "optimum")
    decided: ClassVar[dict[str, str]] = {"part": "--part", "context": "--context"}

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    part: str = ""
    context: int | None = None
    cut: tuple[str, ...] = ()
    candidates: int = CANDIDATES

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes a folder with ``config.json``."""
        if request.source.form == "decoder":
            return Skip("it is a language model; with --input it is loaded as a network")
        if request.source.form != "huggingface":
            return Skip(f"{request.source.reference} is not a Hugging Face folder")
        load = request.load
        part, context = str(load.get("part") or ""), load.get("context")
        ends = tuple(load.get("cut") or ())
        return cls(tuple(load["inputs"]), tuple(load["outputs"]), dict(load["notes"]), part, context, ends)

    def confirm(self, request: Request) -> None:
        """Refuse inputs that nobody can read before anything is imported."""
        check_candidates(self.candidates)
        parse_inputs(self.inputs)

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Load, trace with generated inputs, bring into normal form. Outputs keep the model's own names."""
        import torch

        from edgeship.data.specs import example_tensors, with_notes
        from edgeship.frontends.huggingface import call_by_name, load_folder, outputs_of
        from edgeship.program.export import does_not_run, make_program

        loaded = load_folder(model.path, parse_inputs(self.inputs))
        if self.part:
            return self._part(loaded, ctx)
        specs = with_notes(loaded.inputs, self.notes)
        # A range of the user's own asks for another example.
        same = [(a.low, a.high) == (b.low, b.high) for a, b in zip(specs, loaded.inputs, strict=True)]
        drawn = example_tensors(specs)
        examples = [loaded.examples[i] if kept else drawn[i] for i, kept in enumerate(same)]
        names = [spec.name for spec in specs]
        with torch.no_grad():
            try:
                found = list(outputs_of(loaded.model, dict(zip(names, examples, strict=True))))
            except Exception as error:
                raise does_not_run(specs, error) from error
        note = f"{self.name}: {type(loaded.model).__name__} {loaded.task}".strip()
        program = make_program(
            loaded.model,
            specs,
            examples,
            call=call_by_name(names),
            output_names=self.outputs,
            # What the model ends at instead has names of its own.
            own_names=[] if self.cut else found,
            note=note,
            cut=self.cut,
            candidates=self.candidates,
        )
        program.save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", program.signature)

    def _part(self, loaded: LoadedFolder, ctx: Context) -> TorchModel:
        from edgeship.data.specs import example_tensors, with_notes
        from edgeship.frontends.huggingface import part_of
        from edgeship.program.export import make_program

        module, specs, names = part_of(loaded, self.part, self.context, parse_inputs(self.inputs))
        specs = with_notes(specs, self.notes)
        note = f"{self.name}: {type(loaded.model).__name__}, {self.part}"
        program = make_program(
            module, specs, example_tensors(specs), output_names=self.outputs, own_names=names, note=note
        )
        program.save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", program.signature)
