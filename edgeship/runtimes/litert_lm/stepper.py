"""One step at a time through LiteRT's interpreter: the engine's own graphs and kernels, and its way of masking.

LiteRT-LM takes text and gives text. Logits come from running the signatures of the same file as it does.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.runtimes import as_numpy
from edgeship.errors import ArtifactError
from edgeship.llm.generation import Stepper
from edgeship.runtimes.litert_lm.container import Section

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

THREADS = 2
# What the engine puts where a token may not look, as a share of float32's largest.
_MASKED = -0.7


class SignatureStepper(Stepper):
    """Runs ``prefill_<chunk>`` and ``decode``. The interpreter is made at the first step, or by `load`.

    Args:
        path, model: the ``.litertlm``, and where in it the ``.tflite`` lies.
    """

    def __init__(self, path: Path, model: Section, chunk: int, context: int) -> None:
        self.path, self.model, self.chunk, self.context = path, model, chunk, context
        self._runners: dict[int, Any] = {}
        self._caches: dict[str, Any] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._interpreter: Any = None

    def load(self) -> None:
        """Make the interpreter. Raises `ArtifactError` when it refuses the model, or lacks a signature."""
        from ai_edge_litert.interpreter import Interpreter

        if self._interpreter is not None:
            return
        # The interpreter reads whole files only; in memory, the model would be there twice.
        self._folder = tempfile.TemporaryDirectory(prefix="edgeship-litert-lm-")
        copy = Path(self._folder.name, "model.tflite")
        with self.path.open("rb") as source, copy.open("wb") as target:
            source.seek(self.model.start)
            shutil.copyfileobj(source, target, 1 << 22)
            target.truncate(self.model.size)
        try:
            self._interpreter = Interpreter(model_path=str(copy), num_threads=THREADS)
            keys = {self.chunk: f"prefill_{self.chunk}", 0: "decode"}
            self._runners = {size: self._interpreter.get_signature_runner(key) for size, key in keys.items()}
            shape = tuple(self._runners[0].get_input_details()["mask"]["shape"])
        except (ValueError, RuntimeError, KeyError, MemoryError, AttributeError) as error:
            self.free()
            raise ArtifactError(f"{self.path} does not load in LiteRT: {error}", fix="build again") from None
        if shape != (1, 1, 1, self.context):
            self.free()
            raise ArtifactError(f"{self.path} has another context than its record", fix="build again")

    def reset(self) -> None:
        """Forget the text."""
        import numpy as np

        self.load()
        details = self._runners[0].get_input_details()
        self._caches = {
            name: np.zeros(item["shape"], item["dtype"]) for name, item in details.items() if name.startswith("kv_")
        }
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        """Take a chunk."""
        self._step(self.chunk, tokens)

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one token; logits of the next."""
        logits: npt.NDArray[np.float32] = self._step(0, [token])["logits"].reshape(-1)
        return logits

    def free(self) -> None:
        """Let go of the interpreter and of its copy of the model."""
        self._runners, self._caches, self._interpreter = {}, {}, None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _step(self, size: int, tokens: Sequence[int]) -> dict[str, Any]:
        import numpy as np

        if not self._caches:
            self.reset()
        positions = np.arange(self.position, self.position + len(tokens), dtype=np.int32)
        seen = np.arange(self.context)[None, :] <= positions[:, None]
        mask = np.where(seen, np.float32(0), np.float32(_MASKED * np.finfo(np.float32).max))[None, None]
        ids = as_numpy(np.array([tokens]), "int32")
        try:
            found = self._runners[size](tokens=ids, input_pos=positions, mask=mask, **self._caches)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ArtifactError(f"LiteRT stopped while running {self.path.name}: {error}", fix="build again") from None
        self._caches = {name: found[name] for name in self._caches}
        self.position += len(tokens)
        return dict(found)
