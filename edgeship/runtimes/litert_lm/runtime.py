"""LiteRT-LM: LiteRT's engine for language models, on this machine's CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from edgeship.core.forms import STATIC_MODES, ActivationMode
from edgeship.core.model import Artifact, LiteRTLMModel
from edgeship.core.runtimes import Engine, Format, Runtime
from edgeship.core.weights import EncodedTensor, Encoding, Float
from edgeship.runtimes.litert.runtime import RUNTIME as FAMILY

if TYPE_CHECKING:
    from edgeship.core.inventory import WeightOp
    from edgeship.llm.session import LanguageSession

# Decode, and prefill of two lengths.
SIGNATURES = 3


class LiteRTLM(Runtime):
    """LiteRT-LM with its CPU backend, which runs LiteRT's own kernels (XNNPACK)."""

    name: ClassVar[str] = "litert-lm"
    title: ClassVar[str] = "LiteRT-LM"
    artifact: ClassVar[type[Artifact]] = LiteRTLMModel
    format: ClassVar[Format] = FAMILY.format
    engine: ClassVar[Engine] = Engine(
        "language models",
        packages=("litert-lm-api", "litert-lm-builder"),
        extra="litert-lm",
        computes=("dynamic",),
        eval_samples=200,
        overhead_bytes=65_000_000,
        # A step reads one set of caches and writes another.
        cache_copies=2,
        roofline=FAMILY.engine.roofline,
    )

    def open(self, artifact: Artifact) -> LanguageSession:
        """Check the file, then load its signatures. Raises `ArtifactError` when it is damaged."""
        from edgeship.runtimes.litert_lm.session import open_session

        self.versions()
        return open_session(artifact, load=True)

    def open_fast(self, artifact: Artifact) -> LanguageSession:
        """Check the file. Timing runs LiteRT-LM itself, so signatures load only when they are asked for."""
        from edgeship.runtimes.litert_lm.session import open_session

        self.versions()
        return open_session(artifact, load=False)

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight, from the graph of ``decode``; the prefill graphs must hold the same constants."""
        self.versions()
        from edgeship.runtimes.litert.stored import read_placed, refuse_other_weights
        from edgeship.runtimes.litert_lm.session import open_graphs

        file, graphs, _ = open_graphs(artifact.path)
        for key, number in graphs.items():
            if key != "decode":
                refuse_other_weights(file, graphs["decode"], number, artifact)
        return read_placed(file, graphs["decode"], artifact)

    def refuses(self, op: WeightOp, activations: ActivationMode) -> str:
        """Its activations stay float or are rounded while running."""
        static = activations in STATIC_MODES
        return "its caches and attention are float32; use dynamic" if static else ""

    def working_bits(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
        """The file is mapped while kernels keep the weights as they want them. What is dequantized is float32 once more
        in each signature: a long prompt goes through both of prefill, and decode writes. Dequantized integers are no
        constants to the weight cache, so each signature has its own for the kernels too."""
        copies = SIGNATURES if isinstance(encoding, Float) else 2 * SIGNATURES - 1
        return self.container_bits(op, encoding) + copies * self._dequantized(op, encoding, activations)

    def table_bits(self, encoding: Encoding, activations: ActivationMode) -> int:
        """Floats are dequantized for the lookup in each signature, but prefill has no head."""
        return self._dequantized("embedding", encoding, activations)

    def _dequantized(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
        widened = self.resident_bits(op, encoding, activations) == 32 and encoding.bits < 32
        return 32 if widened else 0

    def warm_imports(self) -> None:
        """Import the engine."""
        import litert_lm  # noqa: F401


RUNTIME = LiteRTLM()
