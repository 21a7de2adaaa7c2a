"""What a bundle holds, by encoding and by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from edgeship.core.artifact import MANIFEST, ArtifactRecord
from edgeship.errors import ArtifactError
from edgeship.shipping.bundle import check_there, read_bundle


def inspect_path(path: Path) -> dict[str, Any]:
    """A bundle, or one artifact inside a bundle, as plain data: I/O, bytes by encoding and
    by layer, error by layer, bits per weight.

    Raises:
        ArtifactError: neither.
    """
    folder = path if (path / MANIFEST).is_file() else None
    inner = ""
    if folder is None:
        folder = next((parent for parent in path.absolute().parents if (parent / MANIFEST).is_file()), None)
        if folder is None or not path.exists():
            raise ArtifactError(f"{path} is not a bundle, nor in one", fix="give the folder that edgeship build wrote")
        inner = path.absolute().relative_to(folder).as_posix()
    bundle = read_bundle(folder)
    records = [
        item
        for item in bundle.manifest.artifacts
        if not inner or item.main == inner or inner == item.main.split("/")[0]
    ]
    if not records:
        raise ArtifactError(
            f"{inner} is not an artifact of {folder}",
            fix="give one of " + ", ".join(r.main for r in bundle.manifest.artifacts),
        )
    check_there(bundle, records)
    return {
        "bundle": str(folder),
        "source": bundle.manifest.source.reference,
        "profile": bundle.manifest.profile,
        "artifacts": [_artifact(record) for record in records],
    }


def _artifact(record: ArtifactRecord) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for encoding in record.encodings.values():
        row = rows.setdefault(
            encoding.encoding, {"encoding": encoding.encoding, "weights": 0, "elements": 0, "bytes": 0}
        )
        row["weights"] += 1
        row["elements"] += math.prod(encoding.shape)
        row["bytes"] += encoding.bytes
    return {
        "main": record.main,
        "runtime": record.runtime,
        "bytes": sum(file.bytes for file in record.files),
        "inputs": [str(spec) for spec in record.signature.inputs],
        "outputs": [str(spec) for spec in record.signature.outputs],
        "weight_bytes": record.weight_bytes,
        "bits_per_weight": record.bits_per_weight,
        "encodings": list(rows.values()),
        "layers": {
            name: {
                "encoding": item.encoding,
                "shape": list(item.shape),
                "bytes": item.bytes,
                "snr_db": item.snr_db,
                "loss": item.loss,
                "stored": item.placement.stored,
            }
            for name, item in record.encodings.items()
        },
    }
