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
    from onnxscript.optimizer._constant_folding import FoldConstantsPass
    from onnxscript.rewriter import RewritePass

    unused = (common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass())
    again = [FoldConstantsPass(shape_inference=True, **_limits()), RewritePass(exact_rules()), *unused]
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


def _limits() -> dict[str, int]:
    from onnxscript.optimizer import _constant_folding as folding

    return {
        "input_size_limit": folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
        "output_size_limit": folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
    }


def exact_rules() -> list[Any]:
    """Onnxscript's default rules that compare no number with a tolerance, and no-op rules for 0 and 1 themselves."""
    from onnxscript.rewriter import _DEFAULT_REWRITE_RULES, RewriteRule
    from onnxscript.rewriter._pattern_ir import Constant

    one, nothing = Constant(1, rel_tol=0.0, abs_tol=0.0), Constant(0, rel_tol=0.0, abs_tol=0.0)

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
    return [*exact, *(rule for rule in _DEFAULT_REWRITE_RULES if not compares_nearly(rule))]


# Patterns of these have constants that count or name axes: an integer is near no other.
WHOLE = ("Reshape", "Squeeze", "Unsqueeze", "Shape", "Range", "ScatterND", "Transpose", "Gather")


def compares_nearly(rule: Any) -> bool:
    """Whether a rule's pattern has a number of the model's arithmetic that is matched with a tolerance."""
    from onnxscript.rewriter._pattern_ir import Constant

    nodes = [node for node in rule._target_pattern if str(node.op_type).strip("'") not in WHOLE]
    given = (value for node in nodes for value in node.inputs)
    return any(isinstance(value, Constant) and (value._rel_tol > 0 or value._abs_tol > 0) for value in given)
