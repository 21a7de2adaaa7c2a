"""QNN: context binaries for Hexagon, run in the HTP emulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgeship.core.model import Artifact, OnnxModel, QnnModel
from edgeship.core.runtimes import ActivationMode, Arrays, Engine, Format, Roofline, Runtime, Session, as_numpy
from edgeship.core.weights import EncodedTensor
from edgeship.errors import ArtifactError, DataError
from edgeship.runtimes.qnn.forms import FORMS, refuses_scales

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from edgeship.core.encodings.family import Encoding
    from edgeship.core.inventory import WeightOp
    from edgeship.core.profile import Choice
    from edgeship.core.target import Target
    from edgeship.runtimes.qnn.emulator import Emulator

GRAPH = "model.qdq.onnx"
CONTEXT = "model_ctx.onnx"


FORMAT = Format("qnn", "QNN", ("onnxruntime-qnn", "onnx"), forms=FORMS)


class QnnSession(Session):
    """A context in the emulator, and the QDQ graph on this machine's CPU beside it."""

    def __init__(self, emulator: Emulator, artifact: Artifact) -> None:
        self._emulator = emulator
        self._artifact = artifact
        self._cpu: Session | None = None

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the context once in the emulator. Shapes are the signature's."""
        found = self._emulator.run(_fitting(inputs, self._artifact))
        return {spec.name: found[spec.name] for spec in self._artifact.signature.outputs}

    def run_on_cpu(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the QDQ graph once with ONNX Runtime's CPU kernels: some operators are silently wrong on the HTP.

        Shapes are the signature's.
        """
        if self._cpu is None:
            from edgeship.runtimes.onnxruntime import RUNTIME as CPU

            self._cpu = CPU.open(graph_of(self._artifact))
        return self._cpu.run(inputs)

    def close(self) -> None:
        """End the emulator's process."""
        self._emulator.close()
        if self._cpu is not None:
            self._cpu.close()


class QnnRuntime(Runtime):
    """The HTP emulator of onnxruntime-qnn."""

    name: ClassVar[str] = "qnn"
    title: ClassVar[str] = "QNN (Hexagon)"
    artifact: ClassVar[type[Artifact]] = QnnModel
    format: ClassVar[Format] = FORMAT
    engine: ClassVar[Engine] = Engine(
        packages=("onnxruntime-qnn", "onnxruntime"),
        extra="qnn",
        unseen="int16",
        unbounded="float",
        float_products=False,
        computes=("int8", "int16"),
        execution="emulated",
        # One sample is then the half point that the profiles allow.
        eval_samples=200,
        untimed="the emulator's cycle counts are this host's noise, not Hexagon's",
        # The rates in Qualcomm targets are the best that any published model reached; typical layers reach about half.
        # The shortest run published for any model on Galaxy S24 is 0.056 ms.
        # It runs 8-bit weights with 16-bit activations at the rate of float16 (AI Hub: 7.5 and 7.2 T/s on S24).
        roofline=Roofline("npu", 0.5, 5.0e-5, int16="f16"),
    )
    through: ClassVar[tuple[type[Artifact], ...]] = (OnnxModel,)

    def refused_by_system(self, encoding: Encoding, target: Target, options: Mapping[str, Mapping[str, Any]]) -> str:
        """Groups whose scales Hexagon does not hold, as they will be rounded."""
        return refuses_scales(encoding, options)

    def open(self, artifact: Artifact) -> QnnSession:
        """Load the context in an emulator process. Raises `ArtifactError` when it is damaged or not for its chip."""
        self.versions()
        from edgeship.runtimes.qnn.emulator import Emulator

        for name in (GRAPH, CONTEXT):
            if not (artifact.path / name).is_file():
                raise ArtifactError(f"{artifact.path / name} does not exist", fix="build again")
        return QnnSession(Emulator(artifact.path / CONTEXT, chip_of(artifact)), artifact)

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight as the QDQ graph holds it; `readback` shows that the compiler takes the same integers.

        Each has torch's own shape.
        """
        self.versions()
        from edgeship.runtimes.qnn.stored import read_graph_weights

        return read_graph_weights(graph_of(artifact))

    def float_bits(self, choice: Choice) -> Literal[16, 32]:
        """Float programs compute in float16, whatever the weights are; beside integers floats are float32."""
        return 16 if choice.activations == "float" else 32

    def refuses(self, op: WeightOp, activations: ActivationMode) -> str:
        """It has no activations decided while running."""
        dynamic = activations == "dynamic"
        return "Hexagon has no activations decided while running; use int8 or int16" if dynamic else ""


def graph_of(artifact: Artifact) -> OnnxModel:
    """The QDQ graph inside the artifact, as ONNX Runtime opens it."""
    return OnnxModel(artifact.path / GRAPH, artifact.signature, placements=artifact.placements, facts=artifact.facts)


def chip_of(artifact: Artifact) -> dict[str, Any]:
    """The chip that the context was made for. Raises `ArtifactError` when the artifact does not say."""
    try:
        soc_model, htp_arch = int(artifact.facts["qnn.soc_model"]), int(artifact.facts["qnn.htp_arch"])
    except (KeyError, ValueError):
        raise ArtifactError(f"{artifact.path} does not say which chip it is for", fix="build again") from None
    return {"soc_model": soc_model, "htp_arch": htp_arch, "float16": artifact.compute == "f16"}


def _fitting(inputs: Arrays, artifact: Artifact) -> dict[str, npt.NDArray[Any]]:
    """Inputs in the signature's dtypes and shapes; the emulator's own message would not name them."""
    fitted: dict[str, npt.NDArray[Any]] = {}
    for spec in artifact.signature.inputs:
        found = spec.of(inputs)
        if found is None:
            raise DataError(f"input {spec.name} is missing", fix=f"give {spec}")
        array = as_numpy(found, spec.numpy_dtype)
        if tuple(array.shape) != spec.shape:
            raise DataError(f"input {spec.name} has shape {tuple(array.shape)}", fix=f"give {spec}")
        fitted[spec.name] = array
    return fitted


RUNTIME = QnnRuntime()
