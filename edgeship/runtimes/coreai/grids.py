"""Static grids of activations, as a saved Core AI asset holds them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeship.core.weights import ActivationEncoding
from edgeship.errors import ArtifactError
from edgeship.runtimes.coreai.stored import operations

if TYPE_CHECKING:
    from pathlib import Path

# The location of a quantize operation names its activation.
_LOCATION = re.compile(r'loc\("activation ([^"]+)":0:0\)')


def stored_grids(asset: Path) -> dict[str, ActivationEncoding]:
    """Graph node -> the grid that its quantize operation has in the asset."""
    found: dict[str, ActivationEncoding] = {}
    for operation in operations(asset):
        located = _LOCATION.search(str(operation.location)) if operation.name == "coreai.quantize" else None
        if located is None:
            continue
        name = located.group(1)
        scale, zero = (_inline_number(operation.operands[place]) for place in (1, 2))
        if scale is None or zero is None or not str(operation.results[0].type).endswith("xsi8>"):
            raise ArtifactError(
                f"the grid of activation {name} is not an int8 grid with one scale", fix="build it again"
            )
        grid = ActivationEncoding(8, float(scale), int(zero))
        if found.setdefault(name, grid) != grid:
            raise ArtifactError(f"{asset} has two grids for activation {name}", fix="build it again")
    return found


def _inline_number(value: Any) -> float | None:
    """A number that is written into the program itself."""
    from edgeship.compat.coreai import DenseElementsAttr

    owner: Any = getattr(value, "owner", None)
    if getattr(owner, "name", "") != "coreai.constant":
        return None
    attribute = owner.attributes["value"]
    if not DenseElementsAttr.isinstance(attribute) or list(attribute.type.shape):
        return None
    return float(np.array(DenseElementsAttr(attribute)))
