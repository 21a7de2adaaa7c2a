"""What edgeship takes from onnxscript that it does not document. Written for onnxscript 0.7.2.

It ends when `onnxscript.optimizer` compares constants exactly, or takes the rules to rewrite by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from onnxscript._internal.values import TracedOnnxFunction
from onnxscript.optimizer import _constant_folding
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES
from onnxscript.rewriter._pattern_ir import Constant

from edgeship.compat.exchange import exchanged

__all__ = ["constant_folding", "default_rules", "exactly", "pattern_nodes", "tolerates", "unread_functions"]


def constant_folding() -> Any:
    """The pass that folds constants and shapes, with the optimizer's own limits."""
    return _constant_folding.FoldConstantsPass(
        shape_inference=True,
        input_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
        output_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
    )


def default_rules() -> tuple[Any, ...]:
    """The optimizer's rewrite rules, in its order."""
    return tuple(_DEFAULT_REWRITE_RULES)


def exactly(number: float) -> Any:
    """A constant of a pattern that only this number matches."""
    return Constant(number, rel_tol=0.0, abs_tol=0.0)


def pattern_nodes(rule: Any) -> list[Any]:
    """The nodes of a rule's pattern; each has an ``op_type`` and ``inputs``."""
    return list(rule._target_pattern)


def tolerates(value: Any) -> bool:
    """Whether an input of a pattern's node is a constant that numbers near it match, too."""
    return isinstance(value, Constant) and (value._rel_tol > 0 or value._abs_tol > 0)


@contextmanager
def unread_functions() -> Iterator[None]:
    """Inside, a function that is traced says its domain without its source being parsed.

    torch's exporter lists 500 of them, and asks for nothing but the domain: nine tenths of the time that listing takes.
    """

    def with_domain(function: TracedOnnxFunction) -> Any:
        return SimpleNamespace(domain=function.opset.domain)

    with exchanged(TracedOnnxFunction, "function_ir", property(with_domain)):
        yield
