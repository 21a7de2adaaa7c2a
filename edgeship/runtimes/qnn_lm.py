"""QNN for language models: a context for each step in the HTP emulator, positions, masks and caches by the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgeship.core.model import Artifact, Dtype, OnnxModel, QnnDecoder, Signature, TensorSpec
from edgeship.core.runtimes import ActivationMode, Engine, Format, Runtime, Session
from edgeship.core.weights import same_numbers
from edgeship.errors import ArtifactError, EdgeshipError
from edgeship.llm.hosted import Host, HostedStepper
from edgeship.llm.session import LanguageSession
from edgeship.runtimes.qnn.forms import refuses_scales
from edgeship.runtimes.qnn.runtime import RUNTIME as FAMILY
from edgeship.runtimes.qnn.runtime import chip_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgeship.core.encodings.family import Encoding
    from edgeship.core.inventory import WeightOp
    from edgeship.core.profile import Choice
    from edgeship.core.target import Target
    from edgeship.core.weights import EncodedTensor
    from edgeship.runtimes.qnn.emulator import Emulator

STEPS = ("prefill", "decode")
MASK = "mask_"


class QnnLanguage(Runtime):
    """The HTP emulator of onnxruntime-qnn, one step after another."""

    name: ClassVar[str] = "qnn-lm"
    title: ClassVar[str] = "QNN (language models)"
    artifact: ClassVar[type[Artifact]] = QnnDecoder
    format: ClassVar[Format] = FAMILY.format
    engine: ClassVar[Engine] = FAMILY.engine.of_texts(4, computes=("int16",))

    def refused_by_system(self, encoding: Encoding, target: Target, options: Mapping[str, Mapping[str, Any]]) -> str:
        """Groups whose scales Hexagon does not hold, as they will be rounded."""
        return refuses_scales(encoding, options)

    def open(self, artifact: Artifact) -> LanguageSession:
        """Load the contexts in emulator processes; graphs without contexts run on this machine's CPU.

        Raises `ArtifactError` when something is damaged or not for its chip.
        """
        self.versions()
        return _Session(_Stepper(artifact))

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight as the graphs hold it. Raises `ArtifactError` when two steps hold another one."""
        from edgeship.runtimes.qnn.stored import read_graph_weights

        self.versions()
        weights = read_graph_weights(_graph(artifact, "decode"))
        read = read_graph_weights(_graph(artifact, "prefill"))
        for name, tensor in read.items():
            if difference := same_numbers(weights[name], tensor):
                raise ArtifactError(f"the steps do not share {name}: {difference}", fix="build again")
        return weights

    def refuses(self, op: WeightOp, activations: ActivationMode) -> str:
        """Its activations have 16 bits."""
        return "" if activations == "int16" else "a language model on Hexagon has 16-bit activations"

    def float_bits(self, choice: Choice) -> Literal[16, 32]:
        """As Hexagon's."""
        return FAMILY.float_bits(choice)


class _Session(LanguageSession):
    stepper: _Stepper

    def close(self) -> None:
        """End the emulators."""
        self.stepper.close()


class _Stepper(HostedStepper):
    """Two steps and their host."""

    def __init__(self, artifact: Artifact) -> None:
        from edgeship.program.stored import tensor_file

        self._steps: dict[str, Emulator | Session] = {}
        try:
            context, chunk = artifact.spoken().context, artifact.spoken().prefilled()
            file = tensor_file(artifact.path / "angles.safetensors")
            angles = {name: file.read(name) for name in file}
            signature = _graph(artifact, "decode").signature
        except (EdgeshipError, KeyError) as error:
            raise ArtifactError(f"{artifact.path} is damaged: {error}", fix="build again") from error
        caches = {spec.name: spec.shape for spec in signature.inputs if spec.name[:2] in ("k_", "v_")}
        masks = [spec.name.removeprefix(MASK) for spec in signature.inputs if spec.name.startswith(MASK)]
        if not caches or not masks or any(shape[2] != context for shape in caches.values()):
            raise ArtifactError(f"{artifact.path} has caches of another context", fix="build again")
        host = Host(caches, [None if kind == "all" else int(kind) for kind in masks], angles)
        super().__init__(host, chunk, lambda step, inputs: self._steps[step].run(inputs))
        try:
            for name in STEPS:
                self._steps[name] = _opened(artifact, name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the emulators."""
        for step in self._steps.values():
            step.close()
        self._steps.clear()


def _opened(artifact: Artifact, step: str) -> Emulator | Session:
    from edgeship.runtimes.onnxruntime import RUNTIME as CPU
    from edgeship.runtimes.qnn.emulator import Emulator

    context = artifact.path / f"{step}_ctx.onnx"
    if context.is_file():
        return Emulator(context, chip_of(artifact))
    if artifact.facts.get("qnn.contexts") == "in the folder":
        raise ArtifactError(f"{context} does not exist", fix="build again")
    return CPU.open(_graph(artifact, step))


def _graph(artifact: Artifact, step: str) -> OnnxModel:
    """The QDQ graph of one step, as ONNX Runtime opens it."""
    import onnx

    path = artifact.path / f"{step}.qdq.onnx"
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf's own, of several types
        raise ArtifactError(f"{path} is damaged: {error}", fix="build again") from None
    constants = {tensor.name for tensor in graph.initializer}

    def specs(values: Any) -> tuple[TensorSpec, ...]:
        found: list[TensorSpec] = []
        for value in values:
            tensor = value.type.tensor_type
            dtype: Dtype = "f32" if tensor.elem_type == onnx.TensorProto.FLOAT else "i32"
            found.append(TensorSpec(value.name, dtype, tuple(axis.dim_value for axis in tensor.shape.dim)))
        return tuple(found)

    placed = tuple(item for item in artifact.placements if item.stored in constants)
    return OnnxModel(path, Signature(specs(graph.input), specs(graph.output)), placements=placed, facts={})


RUNTIME = QnnLanguage()
