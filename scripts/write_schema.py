"""Write edgeship/schemas/manifest.schema.json from the manifest's records."""

import json
from pathlib import Path

from edgeship.shipping.schema import manifest_schema

place = Path(__file__).resolve().parents[1] / "edgeship" / "schemas" / "manifest.schema.json"
place.write_text(json.dumps(manifest_schema(), indent=2) + "\n", encoding="utf-8")
