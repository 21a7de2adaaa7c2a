"""Core AI: opens ``.aimodel`` assets with Core AI's own runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.forms import ActivationMode
from edgeship.core.model import Artifact, CoreAIModel, Signature
from edgeship.core.runtimes import Arrays, Engine, Format, Roofline, Runtime, Session, as_numpy
from edgeship.errors import ArtifactError, DataError
from edgeship.runtimes.coreai.asset import ON_MAC, LoadedAsset
from edgeship.runtimes.coreai.forms import FORMS

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.core.inventory import WeightOp
    from edgeship.core.weights import ActivationEncoding, EncodedTensor

ENTRY = "main"


FORMAT = Format("coreai", "Core AI", ("coreai-torch", "coreai-core"), float_bits=16, forms=FORMS)


class CoreAIRuntime(Runtime):
    """Apple's Core AI (iOS and macOS 27). Its Linux build runs the program on the CPU, for its numbers."""

    name: ClassVar[str] = "coreai"
    title: ClassVar[str] = "Core AI"
    artifact: ClassVar[type[Artifact]] = CoreAIModel
    format: ClassVar[Format] = FORMAT
    engine: ClassVar[Engine] = Engine(
        extra="coreai",
        execution="native" if ON_MAC else "emulated",
        eval_samples=2000 if ON_MAC else 500,
        untimed="Core AI's CPU runtime is for numbers, not speed: weights are decompressed in every run",
        # No figures are published: taken as Core ML's, on the same Neural Engine.
        roofline=Roofline("npu", 0.32, 1.0e-4),
    )

    def open(self, artifact: Artifact) -> Session:
        """Load an asset. Raises `ArtifactError` when it is damaged."""
        from edgeship.runtimes.coreai.stored import check_digest

        self.versions()
        check_digest(artifact.path)
        return CoreAISession(artifact)

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight, from the bytes of the saved program. Raises `ArtifactError` when one is not there.

        Each has torch's own shape.
        """
        from edgeship.runtimes.coreai.stored import check_digest, in_torch_layout, stored_weights

        self.versions()
        check_digest(artifact.path)
        found = stored_weights(artifact.path)
        weights: dict[str, EncodedTensor] = {}
        for placement in artifact.placements:
            if placement.stored not in found:
                raise ArtifactError(f"{artifact.path} does not hold {placement.weight}", fix="build it again")
            weights[placement.weight] = in_torch_layout(found[placement.stored], placement)
        return weights

    def read_activations(self, artifact: Artifact) -> dict[str, ActivationEncoding]:
        """The static grids of activations, from the bytes of the saved program."""
        from edgeship.runtimes.coreai.grids import stored_grids
        from edgeship.runtimes.coreai.stored import check_digest

        self.versions()
        check_digest(artifact.path)
        return stored_grids(artifact.path)

    def refuses(self, op: WeightOp, activations: ActivationMode) -> str:
        """Its activations are floats, or static integers of 8 bits."""
        if activations == "int16":
            return "Core AI refuses int16 activations"
        return "Core AI has no dynamic activations from torch" if activations == "dynamic" else ""


class CoreAISession(Session):
    """A loaded program."""

    def __init__(self, artifact: Artifact) -> None:
        self._signature: Signature = artifact.signature
        self._asset = LoadedAsset(artifact.path, [ENTRY])
        try:
            self._asset.expect(ENTRY, [spec.name for spec in self._signature.inputs])
        except ArtifactError:
            self._asset.close()
            raise

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once on the CPU. Shapes are the signature's."""
        given = {}
        for spec in self._signature.inputs:
            found = spec.of(inputs)
            if found is None:
                raise DataError(f"input {spec.name} is missing", fix="give every input of the signature")
            given[spec.name] = as_numpy(found, spec.numpy_dtype)
            if given[spec.name].shape != spec.shape:
                raise DataError(
                    f"input {spec.name} has shape {given[spec.name].shape}", fix=f"the model takes {spec.shape}"
                )
        results = self._asset.run(ENTRY, given)
        return {spec.name: as_numpy(results[spec.name], spec.numpy_dtype) for spec in self._signature.outputs}

    def close(self) -> None:
        """Free the program and end the thread."""
        self._asset.close()


RUNTIME = CoreAIRuntime()
