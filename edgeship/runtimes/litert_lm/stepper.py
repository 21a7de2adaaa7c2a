"""One step at a time through LiteRT: the graphs, kernels and buffers that LiteRT-LM runs, and its way of masking.

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
DECODE = "decode"
# What the engine puts where a token may not look, as a share of float32's largest.
_MASKED = -0.7


class SignatureStepper(Stepper):
    """Runs ``prefill_<chunk>`` and ``decode``. The model is loaded at the first step, or by `load`.

    Args:
        path, model: the ``.litertlm``, and where in it the ``.tflite`` lies.
    """

    def __init__(self, path: Path, model: Section, chunk: int, context: int) -> None:
        self.path, self.model, self.chunk, self.context = path, model, chunk, context
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._compiled: Any = None
        self._inputs: dict[str, dict[str, Any]] = {}
        # Caches that the next step reads, and those that it writes.
        self._old: dict[str, Any] = {}
        self._new: dict[str, Any] = {}
        self._logits: Any = None
        self._vocabulary = 0

    def load(self) -> None:
        """Load the model. Raises `ArtifactError` when LiteRT refuses it, or it is not what its record says."""
        if self._compiled is not None:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="edgeship-litert-lm-")
        try:
            self._load(Path(self._folder.name))
        except (ValueError, RuntimeError, KeyError, MemoryError, AttributeError, TypeError) as error:
            self.free()
            raise ArtifactError(f"{self.path} does not load in LiteRT: {error}", fix="build again") from None

    def _load(self, folder: Path) -> None:
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.cpu_options import CpuOptions
        from ai_edge_litert.options import Options

        # LiteRT reads whole files only; given as bytes, the model would be in memory twice.
        copy = folder / "model.tflite"
        with self.path.open("rb") as source, copy.open("wb") as target:
            source.seek(self.model.start)
            shutil.copyfileobj(source, target, 1 << 22)
            target.truncate(self.model.size)
        # Weights as kernels want them lie in a file, as the engine keeps them: signatures share them, and memory does
        # not hold them a second time.
        processor = CpuOptions(num_threads=THREADS, xnnpack_weight_cache_path=str(folder / "packed"))
        compiled = CompiledModel.from_file(str(copy), options=Options(cpu_options=processor))
        details = compiled.get_input_tensor_details(DECODE)
        if details["mask"]["shape"] != [1, 1, 1, self.context]:
            raise ValueError("it has another context than its record")
        caches = [name for name in details if name.startswith("kv_cache_")]
        given = [name for name in details if name not in caches]
        self._inputs = {}
        for key in compiled.get_signature_list():
            self._inputs[key] = {name: compiled.create_input_buffer_by_name(key, name) for name in given}
        self._old = {name: compiled.create_input_buffer_by_name(DECODE, name) for name in caches}
        self._new = {name: compiled.create_output_buffer_by_name(DECODE, name) for name in caches}
        self._logits = compiled.create_output_buffer_by_name(DECODE, "logits")
        self._vocabulary = int(compiled.get_output_tensor_details(DECODE)["logits"]["shape"][-1])
        self._compiled = compiled
        self._forget()

    def reset(self) -> None:
        """Forget the text."""
        self.load()
        self._forget()

    def _forget(self) -> None:
        import numpy as np

        for name, details in self._compiled.get_input_tensor_details(DECODE).items():
            if name in self._old:
                self._old[name].write(np.zeros(details["shape"], np.float32))
        self.position = 0

    @property
    def chunks(self) -> tuple[int, ...]:
        """Of each prefill signature; what the longest leaves of a prompt is taken by the shorter."""
        self.load()
        found = (key.partition("_")[2] for key in self._inputs)
        return tuple(sorted((int(text) for text in found if text), reverse=True))

    def prefill(self, tokens: Sequence[int]) -> None:
        """Take a chunk of one of the signatures."""
        self._step(f"prefill_{len(tokens)}", tokens, {})

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one token; logits of the next. [vocabulary]."""
        import numpy as np

        self._step(DECODE, [token], {"logits": self._logits})
        found: npt.NDArray[np.float32] = self._logits.read(self._vocabulary, np.float32)
        return found

    def free(self) -> None:
        """Let go of the model, and of the files that it was loaded from."""
        self._inputs, self._old, self._new, self._logits = {}, {}, {}, None
        if self._compiled is not None:
            self._compiled.close()
            self._compiled = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _step(self, key: str, tokens: Sequence[int], outputs: dict[str, Any]) -> None:
        import numpy as np

        self.load()
        positions = np.arange(self.position, self.position + len(tokens), dtype=np.int32)
        seen = np.arange(self.context)[None, :] <= positions[:, None]
        mask = np.where(seen, np.float32(0), np.float32(_MASKED * np.finfo(np.float32).max))[None, None]
        given = self._inputs[key]
        given["tokens"].write(as_numpy(np.array([tokens]), "int32"))
        given["input_pos"].write(positions)
        given["mask"].write(mask)
        try:
            self._compiled.run_by_name(key, {**given, **self._old}, {**self._new, **outputs})
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ArtifactError(f"LiteRT stopped while running {self.path.name}: {error}", fix="build again") from None
        self._old, self._new = self._new, self._old
        self.position += len(tokens)
