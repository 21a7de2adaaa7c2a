"""Check a ``genai_config.json`` before onnxruntime-genai reads it: it can name libraries that the engine loads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgeship.errors import ArtifactError

CONFIGURATION = "genai_config.json"
MAX_BYTES = 1 << 20
# What a decoder's session may be told. Others load libraries, write profiles, or take files from elsewhere.
SESSION = ("log_id", "log_severity_level", "intra_op_num_threads", "inter_op_num_threads", "provider_options",
           "enable_mem_pattern", "enable_cpu_mem_arena", "graph_optimization_level", "config_entries")  # fmt: skip
ENTRIES = (
    "session.qdq_matmulnbits_accuracy_level",
    "session.intra_op.allow_spinning",
    "session.inter_op.allow_spinning",
)
# Keys that name files, which must lie in the folder.
FILES = ("filename", "config_filename", "adapter_filename", "tokenizer_filename", "spatial_merge_filename")


def check_configuration(folder: Path) -> None:
    """Raise `ArtifactError` when the configuration says what edgeship does not write: libraries, providers, paths."""
    path = folder / CONFIGURATION
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{path} is not a configuration that edgeship wrote", fix="build again")
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(f"{path} cannot be read: {reason}", fix="build again") from None
    pending: list[tuple[str, Any]] = [("", settings)]
    while pending:
        where, value = pending.pop()
        items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
        if isinstance(value, list):
            items = enumerate(value)
        for key, item in items:
            _check(path, str(key), item)
            pending.append((f"{where}.{key}", item))


def _check(path: Path, key: str, value: Any) -> None:
    if key == "session_options":
        stray = [name for name in value if name not in SESSION] if isinstance(value, dict) else [str(value)]
        if stray:
            raise ArtifactError(f"{path} sets {stray[0][:60]}, which edgeship does not write", fix="build again")
        entries = value.get("config_entries") or {}
        if not isinstance(entries, dict) or any(name not in ENTRIES for name in entries):
            raise ArtifactError(f"{path} sets entries that edgeship does not write", fix="build again")
    if key in ("provider_options", "custom_ops_library", "run_options") and value:
        raise ArtifactError(f"{path} sets {key}, which edgeship does not write", fix="build again")
    named = key in FILES or key.endswith("filename")
    if named and (not isinstance(value, str) or "/" in value or "\\" in value or value in ("", "..")):
        raise ArtifactError(f"{path} names a file outside of its folder", fix="build again")
