"""QNN: context binaries for Hexagon, run in the HTP emulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.model import Artifact, OnnxModel, QnnModel
from edgeship.core.runtimes import ActivationMode, Arrays, Execution, Runtime, Session, as_numpy
from edgeship.core.weights import Affine, EncodedTensor, Encoding, Float
from edgeship.errors import ArtifactError, DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.core.inventory import WeightOp
    from edgeship.runtimes.qnn.emulator import Emulator

GRAPH = "model.qdq.onnx"
CONTEXT = "model_ctx.onnx"
GROUP_SIZES = (16, 32, 64, 128)


class QnnSession(Session):
    """A context in the emulator, and the QDQ graph on this machine's CPU beside it."""

    def __init__(self, emulator: Emulator, artifact: Artifact) -> None:
        self._emulator = emulator
        self._artifact = artifact
        self._cpu: Session | None = None

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the context once in the emulator."""
        found = self._emulator.run(_fitting(inputs, self._artifact))
        return {spec.name: found[spec.name] for spec in self._artifact.signature.outputs}

    def run_on_cpu(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the QDQ graph once with ONNX Runtime's CPU kernels: some operators are silently wrong on the HTP."""
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
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime-qnn", "onnxruntime", "onnx")
    extra: ClassVar[str] = "qnn"
    unseen: ClassVar[ActivationMode] = "int16"
    unbounded: ClassVar[ActivationMode] = "float"
    float_products: ClassVar[bool] = False
    computes: ClassVar[tuple[ActivationMode, ...]] = ("int8", "int16")
    execution: ClassVar[Execution] = "emulated"
    # One sample is then the half point that the profiles allow.
    eval_samples: ClassVar[int] = 200
    timed: ClassVar[bool] = False
    untimed_reason: ClassVar[str] = "the emulator's cycle counts are this host's noise, not Hexagon's"

    def open(self, artifact: Artifact) -> QnnSession:
        """Load the context in an emulator process. Raises `ArtifactError` when it is damaged or not for its chip."""
        self.versions()
        from edgeship.runtimes.qnn.emulator import Emulator

        for name in (GRAPH, CONTEXT):
            if not (artifact.path / name).is_file():
                raise ArtifactError(f"{artifact.path / name} is not there", fix="build again")
        return QnnSession(Emulator(artifact.path / CONTEXT, chip_of(artifact)), artifact)

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight as the QDQ graph holds it; `readback` shows that the compiler takes the same integers."""
        self.versions()
        from edgeship.runtimes.qnn.stored import read_graph_weights

        return read_graph_weights(graph_of(artifact))

    def holds(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
        """Empty when Hexagon computes with exactly these integers; else why not."""
        if activations == "dynamic":
            return "Hexagon has no activations decided while running; use int8 or int16"
        if isinstance(encoding, Float):
            if activations == "float":
                return ""
            return "with integer activations Hexagon wants integer weights" if op != "other" else ""
        if not isinstance(encoding, Affine):
            return "Hexagon has no compressed form of it"
        if op == "other":
            return "biases, norms and shared tensors follow the activations"
        if activations == "float":
            return "integer weights want integer activations; profiles balanced and fast have them"
        if not encoding.symmetric and (encoding.bits != 8 or encoding.granularity != "tensor"):
            return "weights want zero point 0, or 8 bits with one for all"
        if encoding.bits == 2:
            return "2 bits are silently wrong on Hexagon"
        if op == "embedding":
            if encoding.bits != 8 or encoding.granularity == "group":
                return "rows are looked up in 8 bits, with one scale a row or a table"
            return ""
        if encoding.granularity == "group":
            return _group_refusal(op, encoding, activations)
        if encoding.granularity == "tensor" and encoding.bits != 8 and op != "linear":
            return "short weights of convolutions want one scale a channel"
        return ""

    def scale_bits(self, encoding: Encoding) -> int:
        """Scales are float32 in the file."""
        return 32

    def container_bits(self, op: WeightOp, encoding: Encoding) -> int:
        """8 bits, or 4 for anything shorter; floats as they are."""
        return encoding.bits if isinstance(encoding, Float) or encoding.bits == 8 else 4


def _group_refusal(op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
    """Groups exist as multiples of a unit (`edgeship.compression.lpbq`); the lowering refuses other scales."""
    if op != "linear":
        return "groups are for linear layers; use one scale a channel"
    if encoding.bits == 8 or activations != "int16":
        return "groups are of 4-bit weights, with 16-bit activations"
    if encoding.group_size not in GROUP_SIZES:
        return f"group sizes are {', '.join(map(str, GROUP_SIZES))}"
    return ""


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
