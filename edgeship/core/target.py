"""A target: the facts about one device that decide what is built for it, each with its source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgeship.errors import UsageError


@dataclass(frozen=True)
class Fact:
    """One fact and where it comes from. ``trust``: measured, vendor, reported or derived."""

    value: Any
    source: str
    trust: str = "vendor"

    def __post_init__(self) -> None:
        if len(self.source.strip()) < 8:
            raise UsageError(f"the fact {self.value!r} has no source", fix="say where it comes from")


@dataclass(frozen=True)
class Target:
    """One device.

    Args:
        name: as in ``--target``. title: for people.
        chip: system on chip. os: operating system with the versions that artifacts must run on, oldest first.
        runtimes: names of runtimes, or of formats for all their engines, in order of preference.
        app_memory_bytes: what one app may use before the system ends it.
        bandwidth_bytes_s: peak DRAM bandwidth.
        peak_ops_s: peak multiply-accumulates x 2 a second by unit and dtype, keys such as ``npu.int8``, ``cpu.f32``.
        encodings: weight encodings that its runtimes decode, by runtime name.
        settings: what a lowering must know (``coreml.minimum_deployment_target``, ``qnn.soc_model``, ``qnn.htp_arch``).
    """

    name: str
    title: str
    chip: Fact
    os: Fact
    runtimes: Fact
    app_memory_bytes: Fact
    bandwidth_bytes_s: Fact
    peak_ops_s: dict[str, Fact] = field(default_factory=dict)
    encodings: dict[str, Fact] = field(default_factory=dict)
    settings: dict[str, Fact] = field(default_factory=dict)

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of one setting."""
        return self.settings[key].value if key in self.settings else default

    @property
    def runtime_names(self) -> tuple[str, ...]:
        """Runtimes in order of preference."""
        return tuple(self.runtimes.value)
