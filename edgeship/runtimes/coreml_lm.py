"""Core ML for language models: prefill, decode and states; by Core ML on macOS, by the evaluator elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.forms import Forms, Lacks
from edgeship.core.model import Artifact, CoreMLDecoder
from edgeship.core.runtimes import ActivationMode, Arrays, Engine, Format, Runtime
from edgeship.core.weights import MXFP4, Affine, Sparse
from edgeship.errors import ArtifactError, EdgeshipError
from edgeship.llm.generation import Stepper
from edgeship.runtimes.coreml.forms import Integers
from edgeship.runtimes.coreml.runtime import ON_MAC
from edgeship.runtimes.coreml.runtime import RUNTIME as FAMILY

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeship.core.inventory import WeightOp
    from edgeship.core.weights import EncodedTensor
    from edgeship.llm.session import LanguageSession

    # Takes all values by name for some runs in a row, gives those that each makes.
    Run = Callable[[Sequence[Arrays]], Sequence[Arrays]]

# Tokens whose logits the evaluator finds together: each has a copy of the caches of the layer that is looked at.
IN_A_ROW = 32


class _Integers(Integers):
    """Integers of 4 and 8 bits; all that are shorter stand in 4."""

    def container_bits(self, op: WeightOp, encoding: Affine) -> int:
        """At least 4."""
        return max(encoding.bits, 4)


FORMS = FAMILY.forms.replaced(
    _Integers(),
    Lacks(MXFP4, "its packages are for iOS 18, where it takes more bytes than int8"),
    Lacks(Sparse, "a language model's weights are stored dense"),
)


class CoreMLLanguage(Runtime):
    """Core ML with states and several functions (iOS 18 and later)."""

    name: ClassVar[str] = "coreml-lm"
    title: ClassVar[str] = "Core ML (language models)"
    artifact: ClassVar[type[Artifact]] = CoreMLDecoder
    format: ClassVar[Format] = FAMILY.format
    engine: ClassVar[Engine] = FAMILY.engine.of_texts(200 if ON_MAC else 8, caches=("float16",))

    def open(self, artifact: Artifact) -> LanguageSession:
        """Load a package. Raises `ArtifactError` when it is damaged."""
        self.versions()
        from edgeship.llm.session import LanguageSession

        with _damage(artifact):
            return LanguageSession(_native(artifact) if ON_MAC else _evaluated(artifact))

    def read_weights(self, artifact: Artifact) -> Mapping[str, EncodedTensor]:
        """Every placed weight, from the saved program and its weight file, its pieces joined.

        Each has torch's own shape.
        """
        self.versions()
        from edgeship.runtimes.coreml.pieces import PlacedWeights

        with _damage(artifact):
            return PlacedWeights(artifact.path, artifact.placements)

    @property
    def forms(self) -> Forms:
        """As Core ML's, but that zeros are not left out and short integers stand in 4 bits."""
        return FORMS

    def refuses(self, op: WeightOp, activations: ActivationMode) -> str:
        """Its activations stay float."""
        return "" if activations == "float" else "a language model in Core ML computes in floats"


class _Stepper(Stepper):
    """The functions of a package with their states.

    Args:
        stages: function -> what runs it for some inputs in a row, in the order in which a long model's parts follow on
            one another.
        forget: puts zeros in the states.
    """

    def __init__(self, stages: Mapping[str, Run], forget: Callable[[], None], artifact: Artifact) -> None:
        self._stages, self._forget, self._artifact = stages, forget, artifact
        self.context, self.chunk = artifact.spoken().context, artifact.spoken().prefilled()
        for name in ("prefill", "decode"):
            if not any(stage.partition("_")[0] == name for stage in stages):
                raise ArtifactError(f"{artifact.path} has no function {name}", fix="build it again")

    def reset(self) -> None:
        """Forget the text."""
        self._forget()
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        """Take a chunk."""
        self._run("prefill", [tokens])

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one token; logits of the next. [vocabulary]."""
        return self.decode_each([token])[0]

    def decode_each(self, tokens: Sequence[int]) -> list[npt.NDArray[np.float32]]:
        """Take tokens one after the other, some of them in one run of the evaluator. [vocabulary] each."""
        found: list[npt.NDArray[np.float32]] = []
        for start in range(0, len(tokens), IN_A_ROW):
            rows = self._run("decode", [[token] for token in tokens[start : start + IN_A_ROW]])
            found += [row["logits"].reshape(-1).astype("float32") for row in rows]
        return found

    def _run(self, function: str, texts: Sequence[Sequence[int]]) -> list[Arrays]:
        import numpy as np

        rows: list[dict[str, npt.NDArray[Any]]] = []
        for tokens in texts:
            rows.append({"input_ids": np.array([tokens], np.int32), "position": np.array([self.position], np.int32)})
            self.position += len(tokens)
        with _damage(self._artifact):
            for name, run in self._stages.items():
                if name.partition("_")[0] != function:
                    continue
                for row, made in zip(rows, run(rows), strict=True):
                    row.update(made)
                    if "next_hidden" in row:
                        row["hidden"] = row.pop("next_hidden")
        return list(rows)


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
        return lambda rows: evaluator.advance_all([_chosen(row, wanted) for row in rows], states)

    forget()
    in_order = sorted((first, *others), key=lambda evaluator: _part(evaluator.name))
    return _Stepper({evaluator.name: runner(evaluator) for evaluator in in_order}, forget, artifact)


def _chosen(row: Arrays, names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _native(artifact: Artifact) -> _Stepper:
    """Every function in Core ML; a state that one makes serves all."""
    import coremltools as ct

    from edgeship.runtimes.coreml.program import load_program

    functions = load_program(artifact.path).functions
    models = {name: ct.models.MLModel(str(artifact.path), function_name=name) for name in sorted(functions, key=_part)}
    inputs: dict[str, list[str]] = {}
    for name, function in functions.items():
        inputs[name] = [port.name for port in function.inputs if port.type.kind != "state"]
    # Parts of a long model have states of their own; prefill and decode of one part have the same.
    states: dict[str, Any] = {}

    def forget() -> None:
        states.clear()

    def runner(name: str) -> Run:
        part = name.partition("_")[2]

        def run(rows: Sequence[Arrays]) -> list[Arrays]:
            if part not in states:
                states[part] = models[name].make_state()
            return [models[name].predict(_chosen(row, inputs[name]), states[part]) for row in rows]

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
