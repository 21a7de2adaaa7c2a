"""What a user may order: one record, made from the words of the command line and from arguments in Python alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeship.core.decoder import CacheType


@dataclass(frozen=True)
class BuildOrder:
    """Everything a user can say to ``build`` and ``plan``.

    Args:
        source: factory, file or folder. targets: names. runtimes: names; empty means each target's own list.
        renames: names for inputs, each ``OLD=NEW``.
        output: bundle folder; ``<name>.edgeship`` here when None. options: ``{"compress/quantize": {"bits": 8}}``.
        metric: see `edgeship.data.metrics`; accuracy when None.
        context: positions that a language model's artifacts keep. lora: folder of a PEFT adapter to merge.
        part: ``encoder`` or ``decoder`` of an encoder-decoder; the whole network when None.
        kv_cache: how a language model's artifacts keep keys and values; each engine's own way when None.
        adapters: PEFT adapters that ship beside a language model, each as ``NAME=DIR``.
        keep: weights that keep more bits than the profile has, each as ``PATTERN`` or ``PATTERN=ENCODING``.
        max_drop: fraction. max_size_bytes: limit for each artifact's files.
        trust: run code that comes with the source: Python that its sample.toml names, pickles in a .pt2.
    """

    source: str
    targets: tuple[str, ...]
    runtimes: tuple[str, ...] = ()
    profile: str = "balanced"
    output: Path | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    renames: tuple[str, ...] = ()
    factory: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    metric: str | None = None
    max_size_bytes: int | None = None
    max_drop: float | None = None
    context: int | None = None
    kv_cache: CacheType | None = None
    lora: str | None = None
    part: str | None = None
    adapters: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    use_cache: bool = True
    trust: bool = False

    @property
    def bundle(self) -> Path:
        """Where the bundle goes."""
        if self.output is not None:
            return self.output if self.output.name not in ("", "..") else self.output.resolve()
        head, _, function = self.source.rpartition(":")
        name = Path(head or self.source).resolve().stem if head and function.isidentifier() else ""
        return Path(f"{name or Path(self.source).resolve().stem}.edgeship")
