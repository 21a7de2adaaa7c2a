"""Core AI for language models: prefill, decode and states, in Core AI's own runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.decoder import CacheType
from edgeship.core.forms import Forms, Lacks
from edgeship.core.model import Artifact, CoreAIDecoder
from edgeship.core.runtimes import ActivationMode, Engine, Format, Runtime
from edgeship.core.weights import Sparse
from edgeship.errors import ArtifactError
from edgeship.llm.generation import Stepper
from edgeship.llm.session import LanguageSession
from edgeship.runtimes.coreai.asset import ON_MAC, LoadedAsset
from edgeship.runtimes.coreai.runtime import RUNTIME as FAMILY

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeship.core.inventory import WeightOp
    from edgeship.core.profile import Choice
    from edgeship.core.weights import EncodedTensor

FORMS = FAMILY.forms.replaced(Lacks(Sparse, "a language model's weights are stored dense"))
ENTRIES = ("prefill", "decode")


class CoreAILanguage(Runtime):
    """Core AI with states and several entry points."""

    name: ClassVar[str] = "coreai-lm"
    title: ClassVar[str] = "Core AI (language models)"
    artifact: ClassVar[type[Artifact]] = CoreAIDecoder
    format: ClassVar[Format] = FAMILY.format
    engine: ClassVar[Engine] = FAMILY.engine.of_texts(200 if ON_MAC else 8, caches=("float16", "float32"))

    def open(self, artifact: Artifact) -> LanguageSession:
        """Load an asset. Raises `ArtifactError` when it is damaged."""
        from edgeship.runtimes.coreai.stored import check_digest

        self.versions()
        check_digest(artifact.path)
        return _Session(_Stepper(artifact))

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight, from the bytes of the saved program. Each has torch's own shape."""
        return FAMILY.read_weights(artifact)

    def cache_of(self, asked: CacheType | None, choice: Choice) -> CacheType:
        """As it computes, unless something else is asked for."""
        return super().cache_of(asked or ("float32" if choice.weights == "float32" else "float16"), choice)

    @property
    def forms(self) -> Forms:
        """As Core AI's, but that zeros are not left out."""
        return FORMS

    def refuses(self, op: WeightOp, activations: ActivationMode) -> str:
        """Its activations stay float."""
        return "" if activations == "float" else "a language model in Core AI computes in floats"


class _Session(LanguageSession):
    stepper: _Stepper

    def close(self) -> None:
        """Free the program and end its thread."""
        self.stepper.close()


class _Stepper(Stepper):
    """The entry points of an asset, over the same states."""

    def __init__(self, artifact: Artifact) -> None:
        self.context, self.chunk = artifact.spoken().context, artifact.spoken().prefilled()
        self._path = artifact.path
        self._asset = LoadedAsset(artifact.path, ENTRIES)
        try:
            self._states = self._zeros()
        except BaseException:
            self._asset.close()
            raise

    def reset(self) -> None:
        """Forget the text."""
        self._states = self._zeros()
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        """Take a chunk."""
        self._run("prefill", tokens)

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one token; logits of the next. [vocabulary]."""
        import numpy as np

        return self._run("decode", [token])["logits"].reshape(-1).astype(np.float32)

    def close(self) -> None:
        """Free the program and end its thread."""
        self._states = {}
        self._asset.close()

    def _run(self, entry: str, tokens: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
        """Run an entry point once; ``logits`` [1, 1, vocabulary] of ``decode``."""
        import numpy as np

        inputs = {"input_ids": np.array([tokens], np.int32), "position": np.array([self.position], np.int32)}
        results = self._asset.run(entry, inputs, self._states)
        self.position += len(tokens)
        return results

    def _zeros(self) -> dict[str, Any]:
        """New states; both entry points have the same, of the length that the artifact says."""
        from coreai.runtime import NDArray

        states, others = (self._asset.new_states(entry) for entry in ENTRIES)
        # [1, heads, context, width] each
        fits = bool(states) and states.keys() == others.keys()
        for name, array in states.items():
            fits = fits and array.shape == others[name].shape and array.shape[2] == self.context
        if not fits:
            raise ArtifactError(f"{self._path} has states of another shape", fix="build it again")
        return {name: NDArray(array) for name, array in states.items()}


RUNTIME = CoreAILanguage()
