"""What edgeship needs of onnxscript that it does not document: an upgrade that breaks it is red here and says what."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxscript")

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, rewrite

from edgeship.compat import onnxscript as compat


def model(number: float) -> ir.Model:
    """``Identity(x * number)``."""
    x = ir.Input("x", ir.Shape([2]), ir.TensorType(ir.DataType.FLOAT))
    by = ir.Node("", "Constant", [], attributes=[ir.AttrFloat32("value_float", number)])
    product = ir.Node("", "Mul", [x, by.outputs[0]])
    end = ir.Node("", "Identity", [product.outputs[0]])
    end.outputs[0].name = "y"
    graph = ir.Graph([x], [end.outputs[0]], nodes=[by, product, end], opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def kinds(made: ir.Model) -> list[str]:
    return [node.op_type for node in made.graph]


def test_constants_are_folded() -> None:
    made = model(2.0)
    node = ir.Node("", "Neg", [made.graph[0].outputs[0]])
    made.graph.insert_before(made.graph[1], node)
    made.graph[2].replace_input_with(1, node.outputs[0])
    compat.constant_folding()(made)
    assert "Neg" not in kinds(made)


def test_the_optimizers_rules_are_those_that_drop_what_is_nearly_one() -> None:
    rules = compat.default_rules()
    assert len(rules) > 20
    near = [
        rule for rule in rules if any(compat.tolerates(v) for node in compat.pattern_nodes(rule) for v in node.inputs)
    ]
    assert near, "onnxscript compares exactly now: exact_rules may go"
    assert "Mul" not in kinds(rewrite(model(1.000001), near))


@pytest.mark.parametrize(("number", "kept"), [(1.0, False), (1.000001, True)])
def test_an_exact_constant_matches_itself_alone(number, kept) -> None:
    one = compat.exactly(1)
    rule = RewriteRule(lambda op, x: op.Mul(x, one), lambda op, x, **_: op.Identity(x))
    assert not any(compat.tolerates(v) for node in compat.pattern_nodes(rule) for v in node.inputs)
    assert ("Mul" in kinds(rewrite(model(number), [rule]))) is kept


def test_a_pattern_says_its_operators() -> None:
    rule = RewriteRule(lambda op, x: op.Relu(op.Neg(x)), lambda op, x, **_: op.Abs(x))
    assert sorted(str(node.op_type).strip("'") for node in compat.pattern_nodes(rule)) == ["Neg", "Relu"]


def test_a_traced_function_says_the_domain_that_its_source_says() -> None:
    """A later onnxscript may ask a function for more than its domain: then the listing fails here."""
    from onnxscript._framework_apis.torch_2_5 import get_torchlib_ops

    with compat.unread_functions():
        listed = get_torchlib_ops()
    assert len(listed) > 400
    assert {type(meta.function).__name__ for meta in listed} >= {"TracedOnnxFunction"}
    for meta in listed[::50]:
        assert meta.domain == meta.function.function_ir.domain
