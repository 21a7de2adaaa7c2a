"""onnxscript's rewrite rules, without those that take a constant for 0 or 1 because it is near.

Its no-op rules drop ``x + 1e-10`` and ``x * 1.000001`` (onnxscript 0.7.2). They are replaced by ones that compare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


def optimize(model: ir.Model, rounds: int = 2) -> None:
    """Fold shapes and constants and fuse, as `onnxscript.optimizer.optimize_ir` does, with exact rules alone."""
    from onnx_ir import passes
    from onnx_ir.passes import common
    from onnxscript.rewriter import RewritePass

    from edgeship.compat.onnxscript import constant_folding

    unused = (common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass())
    again = [constant_folding(), RewritePass(exact_rules()), *unused]
    passes.Sequential(
        common.InlinePass(),
        passes.PassManager(again, steps=rounds, early_stop=True),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def exact_rules() -> list[Any]:
    """Onnxscript's default rules that compare no number with a tolerance, and no-op rules for 0 and 1 themselves."""
    from onnxscript.rewriter import RewriteRule

    from edgeship.compat.onnxscript import default_rules, exactly

    one, nothing = exactly(1), exactly(0)

    def same(op: Any, x: Any, **_: Any) -> Any:
        return op.Identity(x)

    patterns = (
        lambda op, x: op.Mul(x, one),
        lambda op, x: op.Mul(one, x),
        lambda op, x: op.Add(x, nothing),
        lambda op, x: op.Add(nothing, x),
        lambda op, x: op.Sub(x, nothing),
        lambda op, x: op.Div(x, one),
    )
    exact = [RewriteRule(pattern, same) for pattern in patterns]
    return [*exact, *(rule for rule in default_rules() if not compares_nearly(rule))]


# Patterns of these have constants that count or name axes: an integer is near no other.
WHOLE = ("Reshape", "Squeeze", "Unsqueeze", "Shape", "Range", "ScatterND", "Transpose", "Gather")


def compares_nearly(rule: Any) -> bool:
    """Whether a rule's pattern has a number of the model's arithmetic that is matched with a tolerance."""
    from edgeship.compat.onnxscript import pattern_nodes, tolerates

    nodes = [node for node in pattern_nodes(rule) if str(node.op_type).strip("'") not in WHOLE]
    return any(tolerates(value) for node in nodes for value in node.inputs)
