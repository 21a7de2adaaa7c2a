"""onnxruntime-genai: ONNX Runtime's engine for language models, on this machine's CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.artifact import ADAPTER_SUFFIX, ADAPTERS
from edgeship.core.forms import STATIC_MODES, ActivationMode
from edgeship.core.model import Artifact, GenaiModel
from edgeship.core.runtimes import Engine, Format, Runtime
from edgeship.core.weights import EncodedTensor, Encoding, Float
from edgeship.errors import ArtifactError, UsageError
from edgeship.runtimes.genai_config import check_configuration
from edgeship.runtimes.onnxruntime import RUNTIME as FAMILY

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeship.core.inventory import WeightOp
    from edgeship.llm.dialogue import Dialogue
    from edgeship.llm.session import LanguageSession

GRAPH = "model.onnx"
CHUNK = 64
# Activations of more tokens take more memory, and no less time for each.
AT_ONCE = 512


def _stepper(model: Any, folder: Path, context: int) -> Any:
    import numpy as np
    import onnxruntime_genai as genai

    from edgeship.llm.generation import Stepper, never

    class GenaiStepper(Stepper):
        """A generator that is given its tokens instead of choosing them."""

        chunk = CHUNK

        def __init__(self) -> None:
            self.context = context
            self._generator: Any = None
            self._loaded: dict[str, Any] = {}
            self._adapter = ""
            self.reset()

        def reset(self) -> None:
            """Forget the text."""
            self._generator = None
            params = genai.GeneratorParams(model)
            params.set_search_options(max_length=context, do_sample=False)
            self._generator = genai.Generator(model, params)
            if self._adapter:
                self._generator.set_active_adapter(self._loaded[self._adapter], self._adapter)
            self.position = 0

        def adapt(self, name: str) -> None:
            """Answer with an adapter from the next text on; without one when ``name`` is empty."""
            if name and name not in self._loaded:
                adapters = genai.Adapters(model)
                adapters.load(str(folder / ADAPTERS / f"{name}{ADAPTER_SUFFIX}"), name)
                self._loaded[name] = adapters
            self._adapter = name
            self.reset()

        def prefill(self, tokens: Sequence[int]) -> None:
            """Take a chunk."""
            self._generator.append_tokens(np.array([tokens], np.int32))
            self.position += len(tokens)

        def read(self, tokens: Sequence[int], stopped: Callable[[], bool] = never) -> npt.NDArray[np.float32] | None:
            """Take a prompt as the engine takes it: any number of tokens at once, some hundreds where it is long.

            [vocabulary]: the logits behind the last token.
            """
            self._refuse(tokens)
            for start in range(0, len(tokens), AT_ONCE):
                if stopped():
                    return None
                self.prefill(tokens[start : start + AT_ONCE])
            return self._logits()

        def decode(self, token: int) -> npt.NDArray[np.float32]:
            """Take one token; logits of the next. [vocabulary]."""
            self.prefill([token])
            return self._logits()

        def _logits(self) -> npt.NDArray[np.float32]:
            """[1, tokens, vocabulary] -> [vocabulary] of the last token."""
            found: npt.NDArray[np.float32] = np.asarray(self._generator.get_output("logits"))
            last: npt.NDArray[np.float32] = found.reshape(-1, found.shape[-1])[-1].astype(np.float32, copy=True)
            return last

        def write(self, tokens: Sequence[int], new: int) -> Iterator[int]:
            """The engine's own loop: take a prompt, then choose ``new`` tokens."""
            self._generator.append_tokens(np.array([tokens], np.int32))
            for _ in range(new):
                self._generator.generate_next_token()
                yield int(self._generator.get_next_tokens()[0])

        def free(self) -> None:
            """Let go of the generator and adapters before their model goes."""
            self._generator = None
            self._loaded.clear()

    return GenaiStepper()


def _dialogue(model: Any, context: int, artifact: Artifact) -> Dialogue:
    import json

    import onnxruntime_genai as genai

    from edgeship.llm.dialogue import Answer, Dialogue

    class GenaiDialogue(Dialogue):
        """As an app talks: the template of the folder, and searches as its configuration has them."""

        interface = "onnxruntime-genai's tokenizer and generator"

        def __init__(self) -> None:
            self._tokenizer = genai.Tokenizer(model)
            self._eos = {int(token) for token in self._tokenizer.eos_token_ids}
            self._turns: list[dict[str, str]] = []
            self._plain = not _has_template(artifact.path)

        def say(self, text: str, limit: int) -> Answer:
            """The whole conversation to a new generator."""
            self._turns.append({"role": "user", "content": text})
            with _damage(artifact, "answer a message"):
                heard = text
                if not self._plain:
                    turns = json.dumps(self._turns)
                    heard = self._tokenizer.apply_chat_template(messages=turns, add_generation_prompt=True)
                params = genai.GeneratorParams(model)
                params.set_search_options(max_length=context)
                generator = genai.Generator(model, params)
                generator.append_tokens(self._tokenizer.encode(heard))
                found: list[int] = []
                while not generator.is_done() and len(found) < limit:
                    generator.generate_next_token()
                    found.append(int(generator.get_next_tokens()[0]))
                del generator
                ended = bool(found) and found[-1] in self._eos
                written = found[:-1] if ended else found
                said = str(self._tokenizer.decode(written)) if written else ""
            self._turns.append({"role": "assistant", "content": said})
            return Answer(heard, said, len(written), ended, tuple(written))

        def close(self) -> None:
            """The tokenizer goes before its model."""
            self._tokenizer = None

    return GenaiDialogue()


def _has_template(folder: Path) -> bool:
    from edgeship.llm.chat import template_source

    return bool(template_source(folder))


class Genai(Runtime):
    """onnxruntime-genai, CPU execution provider."""

    name: ClassVar[str] = "genai"
    title: ClassVar[str] = "onnxruntime-genai"
    artifact: ClassVar[type[Artifact]] = GenaiModel
    format: ClassVar[Format] = FAMILY.format
    engine: ClassVar[Engine] = Engine(
        "language models",
        packages=("onnxruntime-genai", "onnxruntime"),
        extra="genai",
        computes=("dynamic",),
        caches=("float32", "int8"),
        adapters=True,
        eval_samples=200,
        overhead_bytes=60_000_000,
        roofline=FAMILY.engine.roofline,
    )

    def open(self, artifact: Artifact) -> LanguageSession:
        """Load the folder. Raises `ArtifactError` when it is damaged."""
        self.versions()
        import onnxruntime_genai as genai

        from edgeship.llm.session import LanguageSession, TextTimes

        genai.disable_telemetry_events()
        check_configuration(artifact.path)
        with _damage(artifact, "load"):
            model = genai.Model(str(artifact.path))
            stepper = _stepper(model, artifact.path, artifact.spoken().context)

        class Opened(LanguageSession):
            def time_text(self, prompt: Sequence[int], new: int, depth: Sequence[int] = ()) -> TextTimes:
                """Timed in the engine's own loop, which stops for nothing."""
                stepper.reset()
                if depth:
                    stepper.prefill(depth)
                start = time.perf_counter()
                written = stepper.write(prompt, new)
                tokens = [next(written)]
                first = time.perf_counter()
                tokens += list(written)
                end = time.perf_counter()
                return TextTimes(first - start, end - first, len(prompt), len(tokens) - 1, tuple(tokens))

            def dialogue(self, folder: Path, eos: Sequence[int]) -> Dialogue:
                """Its own tokenizer, template, search options and stop tokens, all from the artifact."""
                return _dialogue(model, artifact.spoken().context, artifact)

            def adapt(self, name: str) -> None:
                """Answer with an adapter of the artifact; without one when ``name`` is empty."""
                known = artifact.spoken().adapters
                if name and name not in known:
                    fix = f"it has {', '.join(known)}" if known else "build it with --adapter NAME=DIR"
                    raise UsageError(f"{artifact.path.name} has no adapter {name!r}", fix=fix)
                with _damage(artifact, "load its adapter"):
                    stepper.adapt(name)

            def close(self) -> None:
                """The generator goes before the model: the engine ends the process otherwise."""
                nonlocal model
                stepper.free()
                model = None
                gc.collect()

        return Opened(stepper)

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight as the file holds it. Raises `ArtifactError` when one is not where it should be.

        Each has torch's own shape.
        """
        self.versions()
        from edgeship.runtimes.onnx_weights import read_placed_weights

        with _damage(artifact, "read"):
            return read_placed_weights(replace(artifact, path=artifact.path / GRAPH))

    def read_adapters(self, artifact: Artifact) -> dict[str, dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]]:
        """Every adapter's matrices. Raises `ArtifactError` when a file is damaged.

        [in, rank] and [rank, out] by layer.
        """
        import onnxruntime

        found: dict[str, dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = {}
        for name in artifact.spoken().adapters:
            with _damage(artifact, "read"):
                file = onnxruntime.AdapterFormat.read_adapter(str(artifact.path / ADAPTERS / f"{name}{ADAPTER_SUFFIX}"))
                held = {key: value.numpy().copy() for key, value in file.get_parameters().items()}
                layers = sorted({key.rpartition(".")[0] for key in held})
                found[name] = {layer: (held[f"{layer}.lora_A"], held[f"{layer}.lora_B"]) for layer in layers}
        return found

    def refuses(self, op: WeightOp, activations: ActivationMode) -> str:
        """Its activations stay float or are rounded while running."""
        static = activations in STATIC_MODES
        return "its attention computes in float32; use dynamic" if static else ""

    def table_bits(self, encoding: Encoding, activations: ActivationMode) -> int:
        """Floats are kept twice: packed for the head's kernel, and as a table."""
        return self.resident_bits("linear", encoding, activations) if isinstance(encoding, Float) else 0

    def warm_imports(self) -> None:
        """Import the engine."""
        import onnxruntime_genai  # noqa: F401


@contextmanager
def _damage(artifact: Artifact, doing: str) -> Iterator[None]:
    try:
        yield
    except (ArtifactError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[-300:] or type(error).__name__
        raise ArtifactError(f"{artifact.path.name} does not {doing}: {reason}", fix="build again") from error


RUNTIME = Genai()
