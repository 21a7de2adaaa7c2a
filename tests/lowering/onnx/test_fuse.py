"""Fused operators say what the operators they stand for said; what does not match is left alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgeship.lowering.onnx.fuse import fuse

HEADS, TOKENS, WIDTH = 2, 5, 8


def graph(*, halves=True, axis=1, order=(0, 2, 1, 3)):
    """``x [1, T, H * D]``, ``angles [1, T, D / 2]``, ``skip`` -> rotated heads, flat; and a norm of a sum."""
    constants = []

    def constant(name, numbers, dtype=np.int64):
        value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, dtype), name=name))
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        constants.append(value)
        return value

    def value(name, shape, dtype=ir.DataType.FLOAT):
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    nodes = []

    def node(op, inputs, name, shape, **attributes):
        made = ir.node(op, inputs, attributes, outputs=[value(name, shape)])
        nodes.append(made)
        return made.outputs[0]

    flat, four = (1, TOKENS, HEADS * WIDTH), (1, HEADS, TOKENS, WIDTH)
    x, skip = value("x", flat), value("skip", flat)
    angles, others = value("angles", (1, TOKENS, WIDTH // 2)), value("others", (1, TOKENS, WIDTH // 2))
    both = node("Concat", [angles, angles if halves else others], "both", (1, TOKENS, WIDTH), axis=-1)
    at = constant("at", [axis])
    tables = []
    for op in ("Cos", "Sin"):
        table = node(op, [both], op.lower(), (1, TOKENS, WIDTH))
        tables.append(node("Unsqueeze", [table, at], f"{op.lower()}_open", (1, 1, TOKENS, WIDTH)))
    opened = node("Reshape", [x, constant("opening", [1, TOKENS, HEADS, WIDTH])], "opened", (1, TOKENS, HEADS, WIDTH))
    heads = node("Transpose", [opened], "heads", four, perm=order)
    begin, middle, end, last, one = (
        constant(name, [number]) for name, number in (("b", 0), ("m", WIDTH // 2), ("e", 2**63 - 1), ("l", 3), ("o", 1))
    )
    half = (1, HEADS, TOKENS, WIDTH // 2)
    first = node("Slice", [heads, begin, middle, last, one], "first", half)
    second = node("Slice", [heads, middle, end, last, one], "second", half)
    turned = node("Concat", [node("Neg", [second], "minus", half), first], "turned", four, axis=-1)
    products = [
        node("Mul", [part, table], f"product_{i}", four)
        for i, (part, table) in enumerate(zip((heads, turned), tables, strict=True))
    ]
    rotated = node("Add", products, "rotated", four)
    back = node("Transpose", [rotated], "back", (1, TOKENS, HEADS, WIDTH), perm=order)
    answer = node("Reshape", [back, constant("closing", [1, TOKENS, -1])], "answer", flat)
    total = node("Add", [answer, skip], "total", flat)
    weight = constant("weight", np.linspace(0.5, 1.5, HEADS * WIDTH), np.float32)
    normed = node("SimplifiedLayerNormalization", [total, weight], "normed", flat, axis=-1, epsilon=1e-5, stash_type=1)
    out = node("Add", [normed, total], "out", flat)
    inputs = [x, skip, angles, others]
    made = ir.Graph(inputs, [out], nodes=nodes, initializers=constants, opset_imports={"": 21, "com.microsoft": 1})
    return ir.Model(made, ir_version=10)


def run(model):
    draw = np.random.default_rng(0)
    names = [value.name for value in model.graph.inputs]
    feeds = {value.name: draw.standard_normal(value.shape.numpy()).astype(np.float32) for value in model.graph.inputs}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {name: feeds[name] for name in names})


def operators(model):
    return Counter(node.op_type for node in model.graph)


def test_the_numbers_stay():
    plain, fused = graph(), graph()
    fuse(fused)
    found = operators(fused)
    assert found["RotaryEmbedding"] == found["SkipSimplifiedLayerNormalization"] == 1
    assert found["Neg"] == found["Transpose"] == found["Reshape"] == found["SimplifiedLayerNormalization"] == 0
    for want, have in zip(run(plain), run(fused), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-6)


@pytest.mark.parametrize("changes", [{"halves": False}])
def test_another_rotation_is_left_alone(changes):
    plain, fused = graph(**changes), graph(**changes)
    fuse(fused)
    assert operators(fused)["RotaryEmbedding"] == 0
    for want, have in zip(run(plain), run(fused), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-6)


@pytest.mark.parametrize(("name", "each"), [("llama", 2), ("gemma2", 2), ("gpt2", 0)])
def test_a_family_has_what_its_authors_wrote(name, each, decoder_model):
    from edgeship.lowering.onnx.decoder import export_decoder
    from edgeship.program.program import TorchProgram

    program = TorchProgram.open(decoder_model(name))
    found = operators(export_decoder(program)[0])
    layers = len(program.record.decoder.layers)
    assert found["GroupQueryAttention"] == layers
    assert found["RotaryEmbedding"] == each * layers
    assert found["Neg"] == 0
