"""Where an error enters: the operator at which an artifact's values leave the reference's.

The program is cut at some of its values, lowered again as it was, and run; between the last value that is right and
the first that is not, it is cut again, until one operator is left.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.model import Artifact, TorchModel
from edgeship.core.passes import Context, Pass
from edgeship.core.registry import runtimes
from edgeship.core.report import Report
from edgeship.engine.chatter import Log, silenced
from edgeship.engine.executor import Execution
from edgeship.engine.gathering import Prepared
from edgeship.passes.check.verify import SHORT_ON, VerifyArtifact
from edgeship.program.trial import FED_BACK, GIVEN, NOISE

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.core.plan import Step
    from edgeship.program.program import TorchProgram

    Batch = Mapping[str, npt.NDArray[Any]]

# Values looked at in one round, and rounds at most: 24 * 24 operators.
LOOKS, ROUNDS = 24, 2
# Programs of more arithmetic than this are not lowered again and again.
MOST_MACS = 5 * 10**9
# What is this near to the reference is right, by the arithmetic; as in check/verify.
RIGHT_DB = {"f32": 70.0, "f16": 30.0}
OTHERWISE_DB = 18.0


@dataclass(frozen=True)
class Place:
    """An operator, with how near its value is and how near the values before it were."""

    node: str
    operator: str
    kind: str
    snr_db: float
    before_db: float

    def __str__(self) -> str:
        before = f", {self.before_db:.0f} dB before it" if self.before_db < 200 else ""
        return f"{self.operator} ({self.node}): {self.snr_db:.1f} dB on {self.kind}{before}"


def with_places(prepared: Prepared, execution: Execution, report: Report, log: Log) -> Report:
    """The report, with a note for each artifact whose answers fell short that says at which operator."""
    notes = []
    for row in report.rows:
        kinds = {
            figure.note
            for verdict in row.verdicts
            for figure in verdict.measurements
            if verdict.check == VerifyArtifact.name and figure.name == SHORT_ON
        }
        mine = _steps(prepared, row.runtime, row.target)
        chain = [step for step in mine if isinstance(execution.results.get(step.index), Artifact)]
        task = next((step.task for step in mine if isinstance(step.task, VerifyArtifact)), None)
        if not kinds or not chain or task is None or prepared.requests[0].decoder is not None:
            continue
        source = execution.results[next(iter(chain[0].inputs.values()))]
        assert isinstance(source, TorchModel)
        with silenced(log), tempfile.TemporaryDirectory() as folder:
            try:
                place = find_place(source, [step.task for step in chain], task, kinds, Path(folder))
            except Exception as error:  # a help to the reader must not hide the verdict
                log.line(f"the operator was not found: {type(error).__name__}: {error}")
                continue
        if place is not None:
            notes.append(f"{row.runtime}: the error enters at {place}")
    return dataclasses.replace(report, notes=(*report.notes, *notes))


def _steps(prepared: Prepared, runtime: str, targets: str) -> list[Step]:
    """The steps of one artifact, in order."""
    mine = {(target, runtime) for target in targets.split(",")}
    return [step for step in prepared.plan.steps if mine & set(step.routes)]


def find_place(
    source: TorchModel, passes: Sequence[Pass], check: VerifyArtifact, kinds: Collection[str], folder: Path
) -> Place | None:
    """The first operator whose value is not the reference's; None when no single one is found.

    Args:
        source: the program as it was lowered. passes: that lower it, in order. check: what fell short, with its
            inputs. kinds: of inputs on which it did. folder: for what is made on the way.
    """
    from edgeship.program.program import TorchProgram

    program = TorchProgram.open(source)
    if program.record.inventory.macs > MOST_MACS:
        return None
    asked = check.questions(program)
    known = {GIVEN: asked.given[:1], NOISE: asked.drawn[:1], FED_BACK: asked.usual[:1]}
    known |= {kind: [batch] for kind, batch in asked.probes.items()}
    questions = {kind: known[kind][0] for kind in sorted(kinds) if known.get(kind)}
    if not questions:
        return None
    names = _values(program)
    operators = {node.name: _operator(node) for node in program.exported.graph.nodes}
    first, last, before, found = 0, len(names) - 1, 200.0, None
    for turn in range(ROUNDS):
        looks = sorted({first + place * (last - first) // LOOKS for place in range(LOOKS + 1)})
        answers = _look(
            program, [names[place] for place in looks], questions, passes, check.runtime, folder / str(turn)
        )
        if answers is None:
            return found
        limit, near = answers
        wrong = next((place for place in looks if near[names[place]][0] < limit), None)
        if wrong is None:
            return found
        right = [place for place in looks if place < wrong]
        before = near[names[right[-1]]][0] if right else before
        ratio, kind = near[names[wrong]]
        found = Place(names[wrong], operators[names[wrong]], kind, ratio, before)
        first, last = (right[-1] + 1 if right else first), wrong
        if first >= last:
            return found
    return found


def _values(program: TorchProgram) -> list[str]:
    """Nodes that compute one float tensor, in order."""
    import torch

    from edgeship.compat.torch import is_view

    found = []
    for node in program.exported.graph.nodes:
        value = node.meta.get("val")
        moving = is_view(node.target)
        is_value = node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point()
        if is_value and not moving and any(size > 0 for size in value.shape):
            found.append(node.name)
    return found


def _operator(node: Any) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0] if node.op == "call_function" else node.op


def _look(
    program: TorchProgram,
    names: Sequence[str],
    questions: Mapping[str, Batch],
    passes: Sequence[Pass],
    runtime: str,
    folder: Path,
) -> tuple[float, dict[str, tuple[float, str]]] | None:
    """The limit, and how near each value is at its worst with the kind of inputs where; None for other lowerings."""
    from edgeship.program.compare import Comparison, Reference
    from edgeship.program.cut import cut_at
    from edgeship.program.trial import fitted

    cut = cut_at(program, names)
    cut.save(folder / "program")
    model: Any = TorchModel(folder / "program", cut.signature)
    for place, task in enumerate(passes):
        (folder / str(place)).mkdir()
        model = task.run(model, ctx=Context(folder / str(place)))
    if not isinstance(model, Artifact):
        return None
    limit = OTHERWISE_DB if program.activations else RIGHT_DB.get(model.compute, OTHERWISE_DB)
    reference = Reference(cut)
    near: dict[str, tuple[float, str]] = {}
    with runtimes()[runtime].open(model) as session:
        for kind, batch in questions.items():
            comparison = Comparison()
            comparison.add(reference.run(batch), session.run(fitted(model, batch)), slices=False)
            for name, error in comparison.outputs.items():
                ratio = error.snr_db if error.signal > 0 or error.not_finite else 200.0
                if ratio < near.get(name, (201.0, ""))[0]:
                    near[name] = (ratio, kind)
    return limit, near
