"""Core ML for language models: prefill, decode and states; by Core ML on macOS, by the evaluator elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.model import Artifact, CoreMLDecoder, Placement
from edgeship.core.runtimes import ActivationMode, Execution, Runtime
from edgeship.core.weights import Affine, Sparse
from edgeship.errors import ArtifactError, EdgeshipError
from edgeship.llm.generation import Stepper
from edgeship.runtimes.coreml.runtime import ON_MAC
from edgeship.runtimes.coreml.runtime import RUNTIME as FAMILY

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeship.core.inventory import WeightOp
    from edgeship.core.weights import EncodedTensor, Encoding
    from edgeship.llm.session import LanguageSession

    # Takes all values by name, gives those that it makes.
    Run = Callable[[Mapping[str, npt.NDArray[Any]]], dict[str, npt.NDArray[Any]]]


class CoreMLLanguage(Runtime):
    """Core ML with states and several functions (iOS 18 and later)."""

    name: ClassVar[str] = "coreml-lm"
    title: ClassVar[str] = "Core ML (language models)"
    artifact: ClassVar[type[Artifact]] = CoreMLDecoder
    packages: ClassVar[tuple[str, ...]] = FAMILY.packages
    extra: ClassVar[str] = FAMILY.extra
    language_of: ClassVar[str] = "coreml"
    execution: ClassVar[Execution] = FAMILY.execution
    eval_samples: ClassVar[int] = 200 if ON_MAC else 8
    timed: ClassVar[bool] = FAMILY.timed
    untimed_reason: ClassVar[str] = FAMILY.untimed_reason

    def open(self, artifact: Artifact) -> LanguageSession:
        """Load a package. Raises `ArtifactError` when it is damaged."""
        self.versions()
        from edgeship.llm.session import LanguageSession

        with _damage(artifact):
            return LanguageSession(_native(artifact) if ON_MAC else _evaluated(artifact))

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight, from the saved program and its weight file, its pieces joined."""
        self.versions()
        from edgeship.runtimes.coreml.pieces import joined
        from edgeship.runtimes.coreml.stored import encoded_weights

        with _damage(artifact):
            found = encoded_weights(artifact.path)
            placed: dict[str, list[Placement]] = {}
            for placement in artifact.placements:
                placed.setdefault(placement.weight, []).append(placement)
            weights: dict[str, EncodedTensor] = {}
            for weight, places in placed.items():
                missing = [place.stored for place in places if place.stored not in found]
                if missing:
                    raise ArtifactError(f"{artifact.path} does not hold {weight}", fix="build it again")
                order = places[0].permutation
                # What was read is let go as it is joined.
                pieces = [found.pop(place.stored) for place in places]
                weights[weight] = joined(pieces, None if order is None else len(order))
        return weights

    def holds(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
        """As Core ML holds it; activations stay float, and zeros are not left out."""
        if activations != "float":
            return "a language model in Core ML computes in floats"
        if isinstance(encoding, Sparse):
            return "a language model's weights are stored dense"
        return FAMILY.holds(op, encoding, activations)

    def container_bits(self, op: WeightOp, encoding: Encoding) -> int:
        """As Core ML's, but that all integers of 2 and 3 bits stand in 4."""
        if isinstance(encoding, Affine):
            return max(encoding.bits, 4)
        return FAMILY.container_bits(op, encoding)

    def resident_bits(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
        """As Core ML's."""
        return FAMILY.resident_bits(op, encoding, activations)


class _Stepper(Stepper):
    """The functions of a package with their states.

    Args:
        stages: function -> what runs it, in the order in which a long model's parts follow on one another.
        forget: puts zeros in the states.
    """

    def __init__(self, stages: Mapping[str, Run], forget: Callable[[], None], artifact: Artifact) -> None:
        self._stages, self._forget, self._artifact = stages, forget, artifact
        self.context, self.chunk = int(artifact.facts["context"]), int(artifact.facts["chunk"])
        for name in ("prefill", "decode"):
            if not any(stage.partition("_")[0] == name for stage in stages):
                raise ArtifactError(f"{artifact.path} has no function {name}", fix="build it again")

    def reset(self) -> None:
        """Forget the text."""
        self._forget()
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        """Take a chunk."""
        self._run("prefill", tokens)

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one token; logits of the next."""
        import numpy as np

        return self._run("decode", [token])["logits"].reshape(-1).astype(np.float32)

    def _run(self, function: str, tokens: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
        import numpy as np

        values = {
            "input_ids": np.array([tokens], np.int32),
            "position": np.array([self.position], np.int32),
        }
        with _damage(self._artifact):
            for name, run in self._stages.items():
                if name.partition("_")[0] == function:
                    values.update(run(values))
                    if "next_hidden" in values:
                        values["hidden"] = values.pop("next_hidden")
        self.position += len(tokens)
        return values


def _evaluated(artifact: Artifact) -> _Stepper:
    """Every function in the evaluator; they share constants and states."""
    import torch

    from edgeship.runtimes.coreml.evaluator import Evaluator

    first = Evaluator(artifact.path)
    others = [Evaluator(artifact.path, name, first) for name in first.function_names if name != first.name]
    states: dict[str, torch.Tensor] = {}

    def forget() -> None:
        for evaluator in (first, *others):
            states.update({name: torch.from_numpy(zeros) for name, zeros in evaluator.new_state().items()})

    def runner(evaluator: Evaluator) -> Run:
        wanted = [feature.name for feature in evaluator.inputs]
        return lambda values: evaluator.advance({name: values[name] for name in wanted}, states)

    forget()
    return _Stepper(
        {e.name: runner(e) for e in sorted((first, *others), key=lambda e: _part(e.name))}, forget, artifact
    )


def _native(artifact: Artifact) -> _Stepper:
    """Every function in Core ML; a state that one makes serves all."""
    import coremltools as ct

    from edgeship.runtimes.coreml.program import load_program

    functions = load_program(artifact.path).functions
    models = {name: ct.models.MLModel(str(artifact.path), function_name=name) for name in sorted(functions, key=_part)}
    inputs = {name: [port.name for port in f.inputs if port.type.kind != "state"] for name, f in functions.items()}
    # Parts of a long model have states of their own; prefill and decode of one part have the same.
    states: dict[str, Any] = {}

    def forget() -> None:
        states.clear()

    def runner(name: str) -> Run:
        part = name.partition("_")[2]

        def run(values: Mapping[str, Any]) -> dict[str, Any]:
            if part not in states:
                states[part] = models[name].make_state()
            answer: dict[str, Any] = models[name].predict({key: values[key] for key in inputs[name]}, states[part])
            return answer

        return run

    return _Stepper({name: runner(name) for name in models}, forget, artifact)


def _part(function: str) -> int:
    """Which part of a long model a function is: the number at its end."""
    number = function.partition("_")[2]
    return int(number) if number else 0


@contextmanager
def _damage(artifact: Artifact) -> Iterator[None]:
    try:
        yield
    except (EdgeshipError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[-300:] or type(error).__name__
        raise ArtifactError(f"{artifact.path} does not hold a language model: {reason}", fix="build again") from error


RUNTIME = CoreMLLanguage()
