"""Questions that passes ask while they are planned."""

from __future__ import annotations

from collections.abc import Callable

from edgeship.core.inventory import WeightUse
from edgeship.core.profile import Request
from edgeship.core.weights import Encoding
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
