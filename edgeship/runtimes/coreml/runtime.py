"""Core ML: packages run by Core ML itself on macOS, and by the evaluator elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.forms import ActivationMode
from edgeship.core.model import Artifact, CoreMLModel, Signature
from edgeship.core.runtimes import Arrays, Engine, Format, Roofline, Runtime, Session, as_numpy
from edgeship.errors import ArtifactError, DataError, EdgeshipError
from edgeship.runtimes.coreml.forms import FORMS, lacking

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from edgeship.core.inventory import WeightOp
    from edgeship.core.target import Target
    from edgeship.core.weights import ActivationEncoding, EncodedTensor, Encoding

ON_MAC = sys.platform == "darwin"


FORMAT = Format("coreml", "Core ML", ("coremltools",), float_bits=16, forms=FORMS)


class CoreMLRuntime(Runtime):
    """Apple's Core ML (iOS 16 and later)."""

    name: ClassVar[str] = "coreml"
    title: ClassVar[str] = "Core ML"
    artifact: ClassVar[type[Artifact]] = CoreMLModel
    format: ClassVar[Format] = FORMAT
    engine: ClassVar[Engine] = Engine(
        extra="coreml",
        execution="native" if ON_MAC else "emulated",
        eval_samples=2000 if ON_MAC else 500,
        untimed=""
        if ON_MAC
        else "Core ML runs on macOS and iOS only; here an evaluator computes the saved program's numbers",
        # Apple's ResNet-50 on A17 Pro (Core ML Tools guide): 8.2e9 operations in 0.77 ms (W8A8) are 0.30 of the Neural
        # Engine's peak, in 1.38 ms (float16) 0.34 of it. MobileNetV3-small takes 0.13 ms on A16, nearly all of it
        # dispatch.
        roofline=Roofline("npu", 0.32, 1.0e-4),
    )

    def open(self, artifact: Artifact) -> Session:
        """Load a package. Raises `ArtifactError` when it is damaged."""
        self.versions()
        return _NativeSession(artifact) if ON_MAC else _EvaluatedSession(artifact)

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight, from the saved program and its weight file. Each has torch's own shape."""
        from edgeship.runtimes.coreml.stored import encoded_weights, in_torch_layout

        self.versions()
        try:
            found = encoded_weights(artifact.path)
        except EdgeshipError:
            raise
        except Exception as error:
            raise _damaged(artifact.path, error) from error
        weights: dict[str, EncodedTensor] = {}
        for placement in artifact.placements:
            if placement.stored not in found:
                raise ArtifactError(f"{artifact.path} does not hold {placement.weight}", fix="build it again")
            weights[placement.weight] = in_torch_layout(found[placement.stored], placement)
        return weights

    def read_activations(self, artifact: Artifact) -> dict[str, ActivationEncoding]:
        """The static grids of activations, from the saved program."""
        from edgeship.runtimes.coreml.grids import activation_grids

        self.versions()
        try:
            return activation_grids(artifact.path)
        except EdgeshipError:
            raise
        except Exception as error:
            raise _damaged(artifact.path, error) from error

    def refused_by_system(self, encoding: Encoding, target: Target, options: Mapping[str, Mapping[str, Any]]) -> str:
        """Older versions of iOS have fewer forms; see `edgeship.runtimes.coreml.forms`."""
        oldest = str(target.setting("coreml.minimum_deployment_target", "iOS17"))
        oldest = options.get("lower/torch_to_coreml", {}).get("target", oldest)
        version = oldest.removeprefix("iOS")
        # The lowering refuses names that are none.
        reason = lacking(encoding, int(version)) if version.isdigit() else ""
        return reason and f"{oldest} is built for, and {reason}"

    def refuses(self, op: WeightOp, activations: ActivationMode) -> str:
        """Its activations are floats, or static integers of 8 bits."""
        if activations == "int16":
            return "Core ML quantizes activations to int8 only"
        if activations == "dynamic":
            return "Core ML has no dynamic activations"
        on_a_grid = op == "other" and activations == "int8"
        return "a constant among static activations is stored on their grid" if on_a_grid else ""


class _EvaluatedSession(Session):
    """The saved program, evaluated operation by operation in the precision that it declares."""

    def __init__(self, artifact: Artifact) -> None:
        from edgeship.runtimes.coreml.evaluator import Evaluator

        self._signature: Signature = artifact.signature
        self._path = artifact.path
        try:
            self._evaluator = Evaluator(artifact.path)
        except EdgeshipError:
            raise
        except Exception as error:
            raise _damaged(artifact.path, error) from error
        for kind, features, specs in (
            ("takes", self._evaluator.inputs, artifact.signature.inputs),
            ("gives", self._evaluator.outputs, artifact.signature.outputs),
        ):
            names, wanted = sorted(feature.name for feature in features), sorted(spec.name for spec in specs)
            if names != wanted:
                raise ArtifactError(
                    f"{artifact.path} {kind} {', '.join(names)}, not {', '.join(wanted)}", fix="build it again"
                )

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once. Shapes are the signature's."""
        given = _given(self._signature, inputs)
        try:
            results = self._evaluator.run(given)
        except EdgeshipError:
            raise
        except Exception as error:
            raise _damaged(self._path, error) from error
        return {spec.name: as_numpy(results[spec.name], spec.numpy_dtype) for spec in self._signature.outputs}


class _NativeSession(Session):
    """The package in Core ML itself."""

    def __init__(self, artifact: Artifact) -> None:
        import coremltools as ct

        self._signature: Signature = artifact.signature
        try:
            self._model = ct.models.MLModel(str(artifact.path))
        except Exception as error:
            raise ArtifactError(
                f"Core ML cannot load {artifact.path}: {' '.join(str(error).split())[:200]}", fix="build it again"
            ) from error

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once, on the units that Core ML chooses. Shapes are the signature's."""
        results = self._model.predict(_given(self._signature, inputs))
        return {spec.name: as_numpy(results[spec.name], spec.numpy_dtype) for spec in self._signature.outputs}


def _damaged(path: Path, error: Exception) -> ArtifactError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ArtifactError(f"{path} does not hold a program that runs: {reason}", fix="build it again")


def _given(signature: Signature, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
    """The inputs in the signature's types; shapes as given."""
    given: dict[str, npt.NDArray[Any]] = {}
    for spec in signature.inputs:
        found = spec.of(inputs)
        if found is None:
            raise DataError(f"input {spec.name} is missing", fix="give every input of the signature")
        given[spec.name] = as_numpy(found, spec.numpy_dtype)
    return given


RUNTIME = CoreMLRuntime()
