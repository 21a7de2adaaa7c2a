"""Questions that passes ask while they are planned."""

from __future__ import annotations

from collections.abc import Callable

from edgeship.core.inventory import WeightUse
from edgeship.core.profile import Request
from edgeship.core.weights import Affine, Encoding
from edgeship.errors import EncodingError


def refuse_unholdable(request: Request, decide: Callable[[WeightUse], Encoding | None]) -> None:
    """Raise `EncodingError` when the runtime cannot hold what ``decide`` says of a weight of the model.

    Asked while planning, before anything is converted; names the first weight it would fail on.
    """
    from edgeship.core.registry import runtimes

    if request.inventory is None:
        return
    runtime = runtimes()[request.runtime]
    asked = set()
    for use in request.inventory.weights:
        encoding = decide(use)
        if encoding is None or (use.op, encoding) in asked:
            continue
        asked.add((use.op, encoding))
        reason = runtime.holds(use.op, encoding, request.choice.activations)
        if reason:
            raise EncodingError(
                f"{runtime.title} cannot hold {encoding} for {use.op} ({use.name}): {reason}",
                fix="choose another profile or encoding, or leave the runtime out with --runtime",
            )


def planned_affine(request: Request) -> str:
    """Short name of the integers that compress/quantize will make of this request, its ``--set`` options counted;
    ``int8`` when it makes others."""
    from edgeship.core.encodings import encoding_named, short_name

    given = request.options.get("compress/quantize", {})
    choice = request.choice.weights
    base = encoding_named(choice) if choice != "auto" else Affine()
    base = base if isinstance(base, Affine) else Affine()
    granularity = given.get("granularity", base.granularity)
    size = given.get("group_size", str(base.group_size or 32))
    symmetric = given["symmetric"].lower() == "true" if "symmetric" in given else base.symmetric
    bits = given.get("bits", str(base.bits))
    reach = {"group": f"-g{size}", "tensor": "-tensor"}.get(granularity, "")
    return short_name(encoding_named(f"int{bits}{reach}{'' if symmetric else '-asym'}"))
