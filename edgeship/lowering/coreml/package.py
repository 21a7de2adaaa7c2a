"""Write an ``.mlpackage`` whose bytes depend on the model alone: no dates, no random identifiers, sorted maps."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import coremltools as ct

if TYPE_CHECKING:
    from pathlib import Path

# Any fixed namespace will do: identifiers only have to differ inside one manifest.
NAMESPACE = uuid.UUID("6f2c1a57-0d0b-5d4e-9d3f-0c8f5d2c7e11")
CHANGING = ("com.github.apple.coremltools.conversion_date",)


def save(model: Any, path: Path) -> None:
    """Save a converted model as a package."""
    model.save(str(path))
    for extra in path.glob("*debug_handle_mapping.json"):
        extra.unlink()
    _stable_spec(path / "Data" / "com.apple.CoreML" / "model.mlmodel")
    _stable_manifest(path / "Manifest.json")


def _stable_spec(path: Path) -> None:
    spec = ct.proto.Model_pb2.Model()
    spec.ParseFromString(path.read_bytes())
    for key in CHANGING:
        spec.description.metadata.userDefined.pop(key, None)
    path.write_bytes(spec.SerializeToString(deterministic=True))


def _stable_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    items = sorted(manifest["itemInfoEntries"].values(), key=lambda item: str(item["path"]))
    entries = {_identifier(item["path"]): item for item in items}
    stable = {"fileFormatVersion": manifest["fileFormatVersion"], "itemInfoEntries": entries}
    path.write_text(json.dumps({**stable, "rootModelIdentifier": _identifier(root)}, indent=4) + "\n")


def _identifier(path: str) -> str:
    return str(uuid.uuid5(NAMESPACE, path)).upper()
