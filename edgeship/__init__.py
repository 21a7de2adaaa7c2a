"""edgeship: take a trained model to verified artifacts for a phone or a board.

``edgeship.build(model, inputs, target="pixel9")`` returns a `Bundle`; ``edgeship.open_bundle(path)`` opens one that was
built before. Everything is loaded when it is first asked for: ``import edgeship`` imports no library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgeship.version import __version__ as __version__

if TYPE_CHECKING:
    from edgeship.api.bundles import Bundle, BundleArtifact, open_bundle
    from edgeship.api.bundles import open_bundle as load
    from edgeship.api.checking import availability, bench, verify
    from edgeship.api.python import build, plan
    from edgeship.api.sessions import LanguageModel, Network
    from edgeship.api.settings import (
        Accuracy,
        Allocate,
        Benchmark,
        Calibrate,
        Finetune,
        Layers,
        Prune,
        Quantize,
        Sensitivity,
        Size,
        Smooth,
        Verify,
    )
    from edgeship.conversation import open_encoder_decoder
    from edgeship.core.settings import Settings, settings_of
    from edgeship.errors import EdgeshipError, GateError, UsageError

# Where each name comes from, and what it is called there.
_FROM = {
    "edgeship.api.bundles": ("Bundle", "BundleArtifact", "open_bundle"),
    "edgeship.api.checking": ("availability", "bench", "verify"),
    "edgeship.api.python": ("build", "plan"),
    "edgeship.api.sessions": ("LanguageModel", "Network"),
    "edgeship.api.settings": (
        "Accuracy", "Allocate", "Benchmark", "Calibrate", "Finetune", "Layers", "Prune", "Quantize", "Sensitivity",
        "Size", "Smooth", "Verify",
    ),
    "edgeship.conversation": ("open_encoder_decoder",),
    "edgeship.core.settings": ("Settings", "settings_of"),
    "edgeship.errors": ("EdgeshipError", "GateError", "UsageError"),
}  # fmt: skip
_PLACES = {name: (module, name) for module, names in _FROM.items() for name in names}
_PLACES["load"] = ("edgeship.api.bundles", "open_bundle")

__all__ = [
    "Accuracy",
    "Allocate",
    "Benchmark",
    "Bundle",
    "BundleArtifact",
    "Calibrate",
    "EdgeshipError",
    "Finetune",
    "GateError",
    "LanguageModel",
    "Layers",
    "Network",
    "Prune",
    "Quantize",
    "Sensitivity",
    "Settings",
    "Size",
    "Smooth",
    "UsageError",
    "Verify",
    "availability",
    "bench",
    "build",
    "load",
    "open_bundle",
    "open_encoder_decoder",
    "plan",
    "settings_of",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'edgeship' has no attribute {name!r}")
    module, inner = _PLACES[name]
    return getattr(import_module(module), inner)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
