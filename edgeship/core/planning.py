"""Questions that passes ask while they are planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from edgeship.core.encodings import ENCODED_OPS, encoding_named, fitted, short_name
from edgeship.core.encodings.words import Words
from edgeship.core.forms import Forms
from edgeship.core.inventory import Inventory, WeightOp, WeightUse
from edgeship.core.model import Artifact
from edgeship.core.profile import Request
from edgeship.core.records import suggest
from edgeship.core.weights import Affine, Encoding, Sparse
from edgeship.errors import EncodingError, UsageError

# What language models are calibrated on where nobody says otherwise (docs/results/calibration-budget.md).
CALIBRATION_TOKENS = 32768
Method = Literal["nearest", "clipped", "gptq", "awq"]
# For each operator the short names of the encodings that it may have.
Candidates = tuple[tuple[WeightOp, tuple[str, ...]], ...]


def refusal(request: Request, op: WeightOp, encoding: Encoding) -> str:
    """Empty when the runtime holds a weight so, on the oldest system that the target names too; else why not."""
    from edgeship.core.registry import runtimes

    runtime = runtimes()[request.runtime]
    held = runtime.holds(op, encoding, request.choice.activations)
    return held or runtime.refused_by_system(encoding, request.target, request.options)


def other_runtime(request: Request, kind: type[Artifact]) -> str:
    """Empty when the runtime of a request opens artifacts of a kind, or has its own made from them; else for which
    runtimes they are."""
    from edgeship.core.registry import runtimes

    if runtimes()[request.runtime].opens(kind):
        return ""
    names = [name for name, runtime in runtimes().items() if runtime.opens(kind)]
    return f"only for runtime{'s' if len(names) > 1 else ''} {' and '.join(names)}"


# What --keep says of a weight where it names no encoding.
KEPT_AS = "float16"


def kept_weights(keep: Sequence[str], inventory: Inventory) -> tuple[tuple[str, str], ...]:
    """``--keep PATTERN[=ENCODING]`` as (weight, short name of its encoding), a later pattern before an earlier one.

    Raises:
        UsageError: what is no encoding, or a pattern that no stored weight meets, with a near name.
    """
    uses = {use.name: use for use in inventory.weights}
    stored = [name for name, use in uses.items() if use.op in ENCODED_OPS]
    found: dict[str, str] = {}
    for text in keep:
        pattern, equals, encoding = text.partition("=")
        encoding = encoding if equals else KEPT_AS
        try:
            encoding_named(encoding)
        except UsageError as error:
            raise UsageError(f"--keep {text!r}: {error.what}", fix=error.fix) from None
        met = [name for name in stored if fnmatchcase(name, pattern)]
        if not met:
            others = [name for name in uses if fnmatchcase(name, pattern)]
            if others:
                raise UsageError(
                    f"--keep {pattern}: {others[0]} is not a weight of a layer; it stays in float anyway",
                    fix=suggest(pattern, stored),
                )
            raise UsageError(f"--keep {pattern}: no weight has that name", fix=suggest(pattern, stored))
        found.update(dict.fromkeys(met, encoding))
    return tuple(sorted(found.items()))


def wider_candidates(request: Request) -> Candidates:
    """For each operator what a weight may get instead of fewer bits where these cost too much: what the runtime holds
    of 8 bits and float16."""

    def held(op: WeightOp) -> tuple[str, ...]:
        return tuple(name for name in ("int8", "float16") if not refusal(request, op, encoding_named(name)))

    return tuple((op, held(op)) for op in ENCODED_OPS)


def next_wider(candidates: Candidates, use: WeightUse, encoding: Encoding) -> Encoding | None:
    """The first candidate with more bits than ``encoding``; None where there is none."""
    for name in dict(candidates).get(use.op, ()):
        larger = fitted(encoding_named(name), use)
        if larger.bits > encoding.bits:
            return larger
    return None


def forms_of(kind: type[Artifact]) -> Forms:
    """Which encodings the runtime of an artifact stores, and how."""
    from edgeship.core.registry import runtimes

    return runtimes()[kind.runtime].forms


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
        reason = refusal(request, use.op, encoding)
        if reason:
            raise EncodingError(
                f"{runtime.title} cannot hold {encoding} for {use.op} ({use.name}): {reason}",
                fix="choose another profile or encoding, or leave the runtime out with --runtime",
            )


def planned_words(request: Request) -> Words:
    """What compress/quantize is asked for: the profile's word, and ``--set`` in place of it; int8 for ``auto``, which
    decides layer by layer."""
    auto = request.choice.weights == "auto"
    base = Words() if auto else Words.of(encoding_named(request.choice.weights))
    return base.changed(request.options.get("compress/quantize", {}))


def planned_encoding(request: Request) -> str:
    """Short name of what compress/quantize will make of this request, before it is fitted to each weight."""
    return planned_words(request).meant().short_name


def sparse_ops(request: Request) -> tuple[WeightOp, ...]:
    """Operators whose pruned weights the runtime stores without their zeros; none when nothing is pruned."""
    if "compress/prune" not in request.options:
        return ()
    return tuple(op for op in ENCODED_OPS if not refusal(request, op, Sparse(Affine(8))))


def held_as_given(request: Request) -> tuple[str, ...]:
    """Weights that the source stores as integers, and that the runtime holds in just that encoding."""
    uses = request.inventory.weights if request.inventory else ()
    given = [use for use in uses if use.given and use.name not in dict(request.keep)]
    return tuple(use.name for use in given if not refusal(request, use.op, encoding_named(use.given)))


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


def wide_method(request: Request) -> Method:
    """How compress/quantize rounds 8 bits: GPTQ where data are given, else to nearest.

    Small convolutions lose by 8 bits too: EfficientNet-Lite0 names the original's class in 75 % of images rounded to
    nearest, and in 96 % by GPTQ. Language models do not, and their layers take an hour.
    """
    trained = "compress/finetune" in request.options
    return "nearest" if request.calibration is None or request.decoder is not None or trained else "gptq"


def calibration_tokens(request: Request) -> int | None:
    """How many tokens of the user's text a language model is calibrated on; None where ``samples`` decides: for other
    networks, and when it is set."""
    given = request.options.get("compress/quantize", {})
    if request.calibration is None or request.source.form != "decoder" or "samples" in given:
        return None
    # With a budget of time alone all of the text is there to be taken.
    return None if "minutes" in given and "tokens" not in given else CALIBRATION_TOKENS


def _without_data(request: Request) -> Method:
    """Clipping helps linear layers and costs convolutions: ResNet-56 on CIFAR-10 in 4 bits loses 5.2 points by it, and
    none by covering each channel's range."""
    if request.inventory is None:
        return "clipped"
    convolved = whole = 0
    for use in request.inventory.weights:
        whole += use.elements
        if use.op in ("conv", "depthwise_conv", "conv_transpose"):
            convolved += use.elements
    return "nearest" if 2 * convolved > whole else "clipped"


def held_candidates(request: Request) -> Candidates:
    """What profile ``auto`` may choose, for each operator what the runtime holds of it."""

    def held(op: WeightOp) -> tuple[str, ...]:
        return tuple(name for name in request.choice.candidates if not refusal(request, op, encoding_named(name)))

    return tuple((op, held(op)) for op in ENCODED_OPS)


def ways_to_store(candidates: Candidates, use: WeightUse) -> list[Encoding]:
    """The candidates as one weight can take them, each once. Raises `EncodingError` when there is none."""
    found = [fitted(encoding_named(name), use) for name in dict(candidates).get(use.op, ())]
    if not found:
        raise EncodingError(f"none of the candidates is held for {use.op} ({use.name})", fix="choose another profile")
    return list({short_name(encoding): encoding for encoding in found}.values())
