"""Write an ``.mlpackage`` whose bytes depend on the model alone: no dates, no random identifiers, sorted maps."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import coremltools as ct

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
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


def write_package(spec: Any, path: Path, facts: Mapping[str, str]) -> None:
    """Write the model and the manifest of a package whose weight file is in its place already.

    Args:
        spec: the model. facts: strings for its metadata.
    """
    spec.description.metadata.userDefined.update(facts)
    folder = path / "Data" / "com.apple.CoreML"
    (folder / "model.mlmodel").write_bytes(spec.SerializeToString(deterministic=True))
    items = (("model.mlmodel", "CoreML Model Specification"), ("weights", "CoreML Model Weights"))
    entries = [
        {"author": "com.apple.CoreML", "description": text, "name": name, "path": f"com.apple.CoreML/{name}"}
        for name, text in items
    ]
    _write_manifest(path / "Manifest.json", "1.0.0", entries, entries[0]["path"])


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
    _write_manifest(path, manifest["fileFormatVersion"], items, root)


def _write_manifest(path: Path, version: str, items: Sequence[Mapping[str, str]], root: str) -> None:
    entries = {_identifier(item["path"]): dict(item) for item in items}
    stable = {"fileFormatVersion": version, "itemInfoEntries": entries}
    path.write_text(json.dumps({**stable, "rootModelIdentifier": _identifier(root)}, indent=4) + "\n")


def _identifier(path: str) -> str:
    return str(uuid.uuid5(NAMESPACE, path)).upper()
