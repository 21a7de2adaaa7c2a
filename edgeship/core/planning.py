"""Questions that more than one pass asks while it is planned."""

from __future__ import annotations

from edgeship.core.profile import Request
from edgeship.core.weights import Encoding
from edgeship.errors import EncodingError


def refuse_unholdable(request: Request, encoding: Encoding) -> None:
    """Raise `EncodingError` when the runtime cannot hold ``encoding`` for an operator that the model has.

    Asked while planning, before anything is converted; names the first weight it would fail on.
    """
    from edgeship.core.registry import runtimes

    if request.inventory is None:
        return
    runtime = runtimes()[request.runtime]
    seen = set()
    for use in request.inventory.weights:
        if use.op == "other" or use.op in seen:
            continue
        seen.add(use.op)
        reason = runtime.holds(use.op, encoding, request.choice.activations)
        if reason:
            raise EncodingError(
                f"{runtime.title} cannot hold {encoding} for {use.op} ({use.name}): {reason}",
                fix="choose another profile, or leave the runtime out with --runtime",
            )
