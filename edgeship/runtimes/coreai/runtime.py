"""Core AI: opens ``.aimodel`` assets with Core AI's own runtime."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from edgeship.core.model import Artifact, CoreAIModel, Signature
from edgeship.core.runtimes import ActivationMode, Arrays, Execution, Runtime, Session, as_numpy
from edgeship.errors import ArtifactError, DataError
from edgeship.runtimes.apple import resident_bits
from edgeship.runtimes.coreai.forms import container_bits, refusal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeship.core.inventory import WeightOp
    from edgeship.core.weights import ActivationEncoding, EncodedTensor, Encoding

T = TypeVar("T")

ON_MAC = sys.platform == "darwin"


class CoreAIRuntime(Runtime):
    """Apple's Core AI (iOS and macOS 27). Its Linux build runs the program on the CPU, for its numbers."""

    name: ClassVar[str] = "coreai"
    title: ClassVar[str] = "Core AI"
    artifact: ClassVar[type[Artifact]] = CoreAIModel
    packages: ClassVar[tuple[str, ...]] = ("coreai-torch", "coreai-core")
    extra: ClassVar[str] = "coreai"
    execution: ClassVar[Execution] = "native" if ON_MAC else "emulated"
    eval_samples: ClassVar[int] = 2000 if ON_MAC else 500
    timed: ClassVar[bool] = False
    untimed_reason: ClassVar[str] = (
        "Core AI's CPU runtime is for numbers, not speed: weights are decompressed in every run"
    )

    def open(self, artifact: Artifact) -> Session:
        """Load an asset. Raises `ArtifactError` when it is damaged."""
        from edgeship.runtimes.coreai.stored import check_digest

        self.versions()
        check_digest(artifact.path)
        return CoreAISession(artifact)

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight, from the bytes of the saved program. Raises `ArtifactError` when one is not there."""
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

    def holds(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
        """See `edgeship.runtimes.coreai.forms`."""
        return refusal(op, encoding, activations)

    def container_bits(self, op: WeightOp, encoding: Encoding) -> int:
        """Four bits for 3-bit integers."""
        return container_bits(encoding)

    def resident_bits(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
        """What is known of the Neural Engine; see `edgeship.runtimes.apple`."""
        return resident_bits(encoding, self.container_bits(op, encoding))


class CoreAISession(Session):
    """A loaded program with an event loop of its own, in a thread: it works from sync code and in notebooks."""

    def __init__(self, artifact: Artifact) -> None:
        self._signature: Signature = artifact.signature
        self._folder = TemporaryDirectory(prefix="edgeship-coreai-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="coreai", daemon=True)
        self._thread.start()
        try:
            from coreai.authoring import AIModelAsset

            if ON_MAC:
                asset = AIModelAsset.load(artifact.path)
            else:
                from edgeship.runtimes.coreai.widened import runnable

                asset = runnable(artifact.path, Path(self._folder.name))
            self._model = asset.executable()
            model = self._wait(self._model.__aenter__())
            self._function = model.load_function("main")
            expected = {spec.name for spec in self._signature.inputs}
            names = set(self._function.desc.input_names)
            if names != expected:
                raise ArtifactError(
                    f"{artifact.path} takes {', '.join(sorted(names))}, not {', '.join(sorted(expected))}",
                    fix="build it again",
                )
        except ArtifactError:
            self._stop()
            raise
        except Exception as error:
            self._stop()
            raise ArtifactError(
                f"Core AI cannot load {artifact.path}: {' '.join(str(error).split())[:200]}", fix="build it again"
            ) from error

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once on the CPU."""
        from coreai.runtime import NDArray

        given = {}
        for spec in self._signature.inputs:
            if spec.name not in inputs:
                raise DataError(f"input {spec.name} is missing", fix="give every input of the signature")
            array = as_numpy(inputs[spec.name], spec.numpy_dtype)
            if array.shape != spec.shape:
                raise DataError(f"input {spec.name} has shape {array.shape}", fix=f"the model takes {spec.shape}")
            given[spec.name] = NDArray(_contiguous(array))
        results = self._wait(self._function(given))
        return {
            spec.name: as_numpy(results[spec.name].numpy().copy(), spec.numpy_dtype) for spec in self._signature.outputs
        }

    def close(self) -> None:
        """Free the program and end the thread."""
        if self._loop.is_running():
            del self._function
            self._wait(self._model.__aexit__(None, None, None))
            self._stop()

    def _wait(self, step: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.cleanup()


def _contiguous(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    import numpy as np

    return np.ascontiguousarray(array)


RUNTIME = CoreAIRuntime()
