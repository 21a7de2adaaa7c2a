"""Operators of torch that have two names, each by the name that converters know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import Graph

# From one name to the other; overloads are called alike, but for those that are named whole.
ALIASES = {
    "absolute": "abs", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arcsinh": "asinh", "arctan": "atan",
    "arctan2": "atan2", "arctanh": "atanh", "clip": "clamp", "concat": "cat", "concatenate": "cat", "divide": "div",
    "fix": "trunc", "ger": "outer", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
    "linalg_matmul": "matmul", "moveaxis": "movedim", "multiply": "mul", "negative": "neg", "not_equal": "ne",
    "special_digamma": "digamma", "special_erf": "erf", "special_erfc": "erfc", "special_erfinv": "erfinv",
    "special_exp2": "exp2", "special_expit": "sigmoid", "special_expm1": "expm1", "special_gammaln": "lgamma",
    "special_log1p": "log1p", "special_logit": "logit", "special_logsumexp": "logsumexp", "special_psi": "digamma",
    "special_sinc": "sinc", "special_xlogy": "xlogy", "special_xlogy.other_scalar":
    "xlogy.Scalar_Other", "special_xlogy.self_scalar": "xlogy.Scalar_Self", "special_xlogy.default": "xlogy.Tensor",
    "special_softmax.default": "softmax.int", "special_log_softmax.default": "log_softmax.int", "subtract": "sub",
    "swapaxes.default": "transpose.int", "swapdims.default": "transpose.int", "true_divide": "div",
}  # fmt: skip


def by_one_name(graph: Graph) -> int:
    """Call each such operator by the other name. Returns how many changed."""
    changed = 0
    for node in graph.nodes:
        other = known_by(node.target) if node.op == "call_function" else None
        if other is not None:
            node.target = other
            changed += 1
    return changed


def known_by(operator: Any) -> Any:
    """The same operator under the other name, in place where it is; None for one that has none."""
    import torch

    namespace, _, name = str(operator).partition(".")
    packet, _, overload = name.rpartition(".")
    if namespace != "aten" or not packet:
        return None
    in_place = "_" if packet.endswith("_") else ""
    plain = packet.removesuffix("_")
    known = ALIASES.get(f"{plain}.{overload}") or ALIASES.get(plain)
    if known is None:
        return None
    other, _, named = known.partition(".")
    found = getattr(torch.ops.aten, other + in_place, None)
    own = getattr(found, named, None) if named else None
    return own or getattr(found, overload, None)
