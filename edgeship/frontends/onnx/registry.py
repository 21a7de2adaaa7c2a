"""Which function imports which ONNX operator, from which opset on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeship.frontends.onnx.values import Value

if TYPE_CHECKING:
    from edgeship.frontends.onnx.call import OpCall

#: One value, or the tuple of outputs in ONNX order (None: an output that is not computed).
Result = Value | tuple[Value, ...]
Operator = Callable[["OpCall"], Result]

_OPERATORS: dict[tuple[str, str], dict[int, Operator]] = {}


def op(*names: str, since: int = 1, domain: str = "") -> Callable[[Operator], Operator]:
    """Register a function for operators ``names`` from opset ``since`` on, until a later one takes over."""

    def register(function: Operator) -> Operator:
        for name in names:
            versions = _OPERATORS.setdefault((domain, name), {})
            if since in versions:
                raise AssertionError(f"{domain or 'ai.onnx'}::{name} since {since} is registered twice")
            versions[since] = function
        return function

    return register


def find(domain: str, op_type: str, opset: int) -> Operator | None:
    """The function for this operator at this opset, or None."""
    versions = _OPERATORS.get((domain, op_type), {})
    since = max((version for version in versions if version <= opset), default=None)
    return None if since is None else versions[since]


def known(domain: str = "") -> list[str]:
    """Names of all operators of a domain that have a function, sorted."""
    return sorted(name for key, name in _OPERATORS if key == domain)
