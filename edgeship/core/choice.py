"""How weights are stored and activations computed for one runtime."""

from __future__ import annotations

from dataclasses import dataclass

from edgeship.core.forms import ActivationMode
from edgeship.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """How to store weights and compute activations for one runtime.

    Args:
        weights: short name of an encoding (`edgeship.core.encodings`), or ``auto``: chosen layer by layer from
            ``candidates`` within the bytes there are.
        activations: ``float``, ``int8``, ``int16`` (static), or ``dynamic`` (int8, decided while running).
        embeddings: short name for tables of which rows are looked up; as ``weights`` when empty.
        candidates: short names that ``auto`` may choose; those that the runtime cannot hold for an operator are left
            out there.
        quickest: ``activations`` give way to what is quicker for the model at hand (`edgeship.core.speed`).
    """

    weights: str = "float16"
    activations: ActivationMode = "float"
    embeddings: str = ""
    candidates: tuple[str, ...] = ()
    quickest: bool = False

    def __post_init__(self) -> None:
        from edgeship.core.encodings import encoding_named

        named = [*self.candidates, *filter(None, [self.embeddings])]
        for text in named if self.weights == "auto" else [self.weights, *named]:
            encoding_named(text)
        if (self.weights == "auto") != bool(self.candidates):
            raise UsageError("auto chooses from candidates, and only auto does", fix="give both or neither")
