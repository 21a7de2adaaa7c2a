"""What may be said together: one table of rules, which the command line and Python are both held to.

A rule is asked after the source was recognised and before anything is loaded. What hangs on one runtime, and not on the
kind of source, is asked of the runtime itself (`check_runtime`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeship.api.orders import BuildOrder
from edgeship.core.profile import Request
from edgeship.core.registry import runtimes
from edgeship.errors import UsageError

LANGUAGE_FORMS = ("decoder", "llama2c")


@dataclass(frozen=True)
class Situation:
    """An order beside what is known of its source.

    Args:
        form: of the source (`edgeship.engine.sources`).
        calibrated, evaluated: there are data to calibrate on, and to measure on, given or a sample's.
    """

    order: BuildOrder
    form: str
    calibrated: bool
    evaluated: bool

    @property
    def language(self) -> bool:
        """Whether engines for language models take the source."""
        return self.form in LANGUAGE_FORMS

    @property
    def sized(self) -> bool:
        """Whether the source says the sizes of its inputs, and they cannot be changed."""
        return self.form in ("export", "llama2c")


@dataclass(frozen=True)
class Rule:
    """One option and when it may be given.

    Args:
        option: as on the command line. given: whether an order says it. allowed: whether it then means something.
        because: what follows the option in the message. fix: the way out.
    """

    option: str
    given: Callable[[BuildOrder], bool]
    allowed: Callable[[Situation], bool]
    because: str
    fix: str = "leave it out"


RULES: tuple[Rule, ...] = (
    Rule(
        "--max-drop",
        lambda order: order.max_drop is not None,
        lambda found: found.evaluated,
        "needs data to measure on",
        "add --eval DATA",
    ),
    Rule(
        "--metric",
        lambda order: order.metric is not None,
        lambda found: found.evaluated,
        "needs data to measure on",
        "add --eval DATA",
    ),
    Rule(
        "--activations int8",
        lambda order: order.activations == "int8",
        lambda found: found.calibrated,
        "needs data to calibrate on",
        "add --calibration DATA",
    ),
    Rule(
        "--factory",
        lambda order: order.factory is not None,
        # Of files it is told by what they hold, before anything else (`engine.sources`).
        lambda found: found.form != "memory",
        "belongs to a weights file",
    ),
    Rule(
        "--weights-key",
        lambda order: order.weights_key is not None,
        lambda found: found.form == "pickle",
        "chooses among the sets of weights in a checkpoint",
    ),
    Rule(
        "--weights",
        lambda order: order.weights is not None,
        lambda found: not _options_say_weights(found.order),
        "says how weights are stored, and so do options of compress/quantize",
        "give one of them",
    ),
    Rule(
        "--part",
        lambda order: order.part is not None,
        lambda found: found.form == "huggingface",
        "is for encoder-decoders in Hugging Face folders",
    ),
    Rule(
        "--context",
        lambda order: order.context is not None,
        lambda found: found.language or found.order.part == "decoder",
        "is for language models",
        "leave it out; sizes are part of --input",
    ),
    Rule(
        "--kv-cache",
        lambda order: order.kv_cache is not None,
        lambda found: found.language,
        "is for language models",
        "leave it out; a network keeps nothing",
    ),
    Rule(
        "--input",
        lambda order: bool(order.inputs),
        lambda found: not found.sized,
        "is for models whose sizes are open",
        "leave it out; this source says its own",
    ),
    Rule(
        "--input-name",
        lambda order: bool(order.renames),
        lambda found: not found.language,
        "is for networks",
        "leave it out; an engine names a language model's inputs",
    ),
    Rule(
        "--output-name",
        lambda order: bool(order.outputs),
        lambda found: not found.language,
        "is for networks",
        "leave it out; an engine names a language model's outputs",
    ),
    Rule(
        "--cut",
        lambda order: bool(order.cut),
        lambda found: not found.language and found.order.part is None,
        "is for networks",
        "leave it out; an engine runs a language model whole",
    ),
    Rule(
        "--lora",
        lambda order: order.lora is not None,
        lambda found: found.form == "decoder",
        "is for language models in Hugging Face folders",
    ),
    Rule(
        "--adapter",
        lambda order: bool(order.adapters),
        lambda found: found.form == "decoder",
        "is for language models in Hugging Face folders",
    ),
)


def _options_say_weights(order: BuildOrder) -> bool:
    said = order.options.get("compress/quantize", {})
    return bool(
        {"form", "encoding", "bits", "granularity", "group_size", "group_channels", "symmetric"}.intersection(said)
    )


def check_rules(found: Situation) -> None:
    """Raise `UsageError` for the first rule of `RULES` that an order breaks."""
    for rule in RULES:
        if rule.given(found.order) and not rule.allowed(found):
            raise UsageError(f"{rule.option} {rule.because}", fix=rule.fix)


def check_runtime(request: Request) -> None:
    """Raise what one runtime has against a request: `MissingToolError` for a package that it needs, `UsageError` for a
    cache that it cannot keep or adapters that it cannot load."""
    runtime = runtimes()[request.runtime]
    runtime.versions()
    if request.kv_cache is not None:
        runtime.cache_of(request.kv_cache, request.choice)
    if request.adapters and not runtime.engine.adapters:
        raise UsageError(
            f"{runtime.title} loads no adapters beside a model",
            fix=f"--lora merges one, or leave {request.runtime} out with --runtime",
        )
