"""Questions that passes ask while they are planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast, get_args

from edgeship.core.encodings import ENCODED_OPS, encoding_named, fitted, short_name
from edgeship.core.inventory import WeightOp, WeightUse
from edgeship.core.profile import Request
from edgeship.core.weights import Affine, Encoding, Sparse
from edgeship.errors import EncodingError

Method = Literal["nearest", "clipped", "gptq", "awq"]
# For each operator the short names of the encodings that it may have.
Candidates = tuple[tuple[WeightOp, tuple[str, ...]], ...]


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


def sparse_ops(request: Request) -> tuple[WeightOp, ...]:
    """Operators whose pruned weights the runtime stores without their zeros; none when nothing is pruned."""
    from edgeship.core.registry import runtimes

    if "compress/prune" not in request.options:
        return ()
    runtime, probe = runtimes()[request.runtime], Sparse(Affine(8))
    return tuple(op for op in ENCODED_OPS if not runtime.holds(op, probe, request.choice.activations))


def rounding_method(request: Request) -> Method:
    """How compress/quantize will round fewer than 8 bits, its ``--set`` options counted."""
    given = request.options.get("compress/quantize", {}).get("method")
    for method in get_args(Method):
        if given == method:
            return cast("Method", method)
    # Trained weights sit where rounding to nearest wants them; another rounding would undo the training.
    if "compress/finetune" in request.options:
        return "clipped"
    return "gptq" if request.calibration else _without_data(request)


def _without_data(request: Request) -> Method:
    """Clipping helps linear layers and costs convolutions: ResNet-56 on CIFAR-10 in 4 bits loses 5.2 points by it, and
    none by covering each channel's range."""
    weights = request.inventory.weights if request.inventory else ()
    convolved = sum(use.elements for use in weights if use.op in ("conv", "depthwise_conv", "conv_transpose"))
    return "nearest" if 2 * convolved > sum(use.elements for use in weights) else "clipped"


def held_candidates(request: Request) -> Candidates:
    """What profile ``auto`` may choose, for each operator what the runtime holds of it."""
    from edgeship.core.registry import runtimes

    runtime, choice = runtimes()[request.runtime], request.choice

    def held(op: WeightOp) -> tuple[str, ...]:
        return tuple(
            name for name in choice.candidates if not runtime.holds(op, encoding_named(name), choice.activations)
        )

    return tuple((op, held(op)) for op in ENCODED_OPS)


def ways_to_store(candidates: Candidates, use: WeightUse) -> list[Encoding]:
    """The candidates as one weight can take them, each once. Raises `EncodingError` when there is none."""
    found = [fitted(encoding_named(name), use) for name in dict(candidates).get(use.op, ())]
    if not found:
        raise EncodingError(f"none of the candidates is held for {use.op} ({use.name})", fix="choose another profile")
    return list({short_name(encoding): encoding for encoding in found}.values())
