"""ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.model import Artifact, OnnxModel, TensorSpec
from edgeship.core.runtimes import Arrays, Engine, Format, Roofline, Runtime, Session, as_numpy
from edgeship.core.weights import EncodedTensor
from edgeship.errors import ArtifactError, DataError
from edgeship.runtimes.onnx_forms import FORMS

if TYPE_CHECKING:
    import numpy.typing as npt


INTRA_OP_THREADS = 2
# Errors arrive as exceptions; the log would say them twice.
FATAL_ONLY = 4
# Session options that edgeship writes into a manifest (`edgeship.lowering.onnx.options`).
SESSION_OPTIONS = ("session.qdq_matmulnbits_accuracy_level", "session.x64quantprecision")
MAX_OPTION = 16


FORMAT = Format("onnx", "ONNX", ("onnx",), forms=FORMS)


class OnnxSession(Session):
    """A loaded ONNX model."""

    def __init__(self, session: Any, artifact: Artifact) -> None:
        self._session = session
        self._artifact = artifact

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once, by name. Raises `DataError` for a wrong input, `ArtifactError` when the model fails.

        Shapes are the signature's.
        """
        signature = self._artifact.signature
        feeds = {spec.name: _fitting(inputs, spec) for spec in signature.inputs}
        names = [spec.name for spec in signature.outputs]
        with _damage(self._artifact, "run"):
            return dict(zip(names, self._session.run(names, feeds), strict=True))

    def close(self) -> None:
        """Free the session."""
        self._session = None


class OnnxRuntime(Runtime):
    """ONNX Runtime, CPU execution provider."""

    name: ClassVar[str] = "onnx"
    title: ClassVar[str] = "ONNX Runtime"
    artifact: ClassVar[type[Artifact]] = OnnxModel
    format: ClassVar[Format] = FORMAT
    engine: ClassVar[Engine] = Engine(
        packages=("onnxruntime",),
        extra="onnx",
        unseen="dynamic",
        computes=("int8", "int16", "dynamic"),
        clips_inside=False,
        # Unfitted: matrix kernels of MLAS on hot caches, less what threads and phone clocks cost.
        roofline=Roofline("cpu", 0.5, 2.0e-5),
    )

    def open(self, artifact: Artifact, *, threads: int = INTRA_OP_THREADS) -> OnnxSession:
        """Load with the session options that ship with the artifact: its facts named ``session.*``.

        What is verified and timed is thus what the app gets when it sets the same options.

        Args:
            artifact: an `OnnxModel`.
            threads: intra-op threads.

        Raises:
            ArtifactError: the file is damaged, or its inputs and outputs are not the signature's.
        """
        self.versions()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = FATAL_ONLY
        for key, value in artifact.facts.items():
            if key.startswith("session."):
                # A bundle may come from anywhere; other entries read files and load libraries.
                if key not in SESSION_OPTIONS or len(value) > MAX_OPTION:
                    raise ArtifactError(
                        f"{artifact.path.name} wants the session option {key[:80]}, which edgeship does not write",
                        fix="build again",
                    )
                options.add_session_config_entry(key, value)
        with _damage(artifact, "load"):
            _check(artifact)
            session = onnxruntime.InferenceSession(
                artifact.path.as_posix(), options, providers=["CPUExecutionProvider"]
            )
            _check_ends(session, artifact)
        return OnnxSession(session, artifact)

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight as the file holds it. Raises `ArtifactError` when one is not where it should be.

        Each has torch's own shape.
        """
        self.versions()
        from edgeship.runtimes.onnx_weights import read_placed_weights

        with _damage(artifact, "read"):
            return read_placed_weights(artifact)

    def warm_imports(self) -> None:
        """Import onnxruntime, and onnx, which checks files before they are loaded."""
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401


def _fitting(inputs: Arrays, spec: TensorSpec) -> npt.NDArray[Any]:
    """One input in the signature's type and shape."""
    found = spec.of(inputs)
    if found is None:
        raise DataError(f"input {spec.name} is missing", fix=f"give {spec}")
    array = as_numpy(found, spec.numpy_dtype)
    if tuple(array.shape) != spec.shape:
        raise DataError(f"input {spec.name} has shape {tuple(array.shape)}", fix=f"give {spec}")
    return array


def _check(artifact: Artifact) -> None:
    """ONNX's own checker first: it answers with errors where a runtime may crash."""
    import onnx

    if not artifact.path.is_file():
        raise ArtifactError(f"{artifact.path} does not exist", fix="build again")
    onnx.checker.check_model(artifact.path.as_posix())


def _check_ends(session: Any, artifact: Artifact) -> None:
    for kind, found, wanted in (
        ("inputs", session.get_inputs(), artifact.signature.inputs),
        ("outputs", session.get_outputs(), artifact.signature.outputs),
    ):
        have = [(end.name, tuple(end.shape)) for end in found]
        if have != [(spec.name, spec.shape) for spec in wanted]:
            raise ArtifactError(
                f"{artifact.path.name} has {kind} {have}, not those of its signature", fix="build again"
            )


@contextmanager
def _damage(artifact: Artifact, doing: str) -> Iterator[None]:
    """Whatever a damaged file provokes in onnx and onnxruntime becomes an `ArtifactError`."""
    try:
        yield
    except (ArtifactError, MemoryError):
        raise
    except Exception as error:
        # The last part says what happened; the parts before it are places in ONNX Runtime's source.
        said = re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", " ".join(str(error).split()))[-1]
        reason = said[:300] or type(error).__name__
        raise ArtifactError(f"{artifact.path.name} does not {doing}: {reason}", fix="build again") from error


RUNTIME = OnnxRuntime()
