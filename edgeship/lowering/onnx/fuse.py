"""Fewer and larger operators for a decoder's graph in ONNX Runtime: a token's small operators cost more in dispatch
than in arithmetic.

    x * cos + rotate_half(x) * sin  -> RotaryEmbedding
    a + b, then an RMS norm         -> SkipSimplifiedLayerNormalization
    reshape and transpose that undo each other around GroupQueryAttention -> nothing

The numbers stay the model's own: cosines and sines are those that its graph computes. What does not match is left as it
is. (com.microsoft operators: ONNX Runtime's docs/ContribOperators.md.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.lowering.onnx.edit import constant

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
HEADS_OUT = (0, 2, 1, 3)


def fuse(model: ir.Model) -> None:
    """Replace what matches, in place. Every value must have its shape."""
    import onnx_ir.passes.common as common

    rotations = _Rotations(model)
    for node in list(model.graph):
        if node.op_type == "Add":
            rotations.fuse(node)
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention":
            _unwind(node)
        if node.op_type == "SimplifiedLayerNormalization":
            _skip(model, node)
    common.RemoveUnusedNodesPass()(model)
    model.graph.sort()


class _Rotations:
    """Rotations of positions, and the halves of cosines and sines that they share."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.tables: dict[ir.Value, ir.Value] = {}
        self.start: ir.Value | None = None

    def fuse(self, node: ir.Node) -> None:
        """``node`` adds the two products of a rotation, or is left alone."""
        import onnx_ir as ir

        found = _rotation(node)
        if found is None or node.outputs[0].is_graph_output():
            return
        x, cos, sin = found
        if self.start is None:
            import numpy as np

            self.start = constant(self.model, "rotation_start", np.zeros(1, np.int64))
        tables = [self._half(table, node) for table in (cos, sin)]
        flat, ended = _flat(x), _flat_uses(node.outputs[0])
        given, replaced = (x, [node.outputs[0]]) if flat is None or not ended else (flat, ended)
        made = ir.node("RotaryEmbedding", [given, self.start, *tables], {"interleaved": 0}, domain=DOMAIN,
                       name=f"{node.name}_rotated")  # fmt: skip
        self.model.graph.insert_before(node, made)
        (output,) = made.outputs
        output.name, output.dtype, output.shape = f"{node.outputs[0].name}_rotated", node.outputs[0].dtype, given.shape
        for old in replaced:
            old.replace_all_uses_with(output)

    def _half(self, table: ir.Value, before: ir.Node) -> ir.Value:
        """``[1, T, D] -> [T, D / 2]``."""
        import numpy as np
        import onnx_ir as ir

        if table not in self.tables:
            assert table.shape is not None
            tokens, width = table.shape[1], int(table.shape[2])  # type: ignore[arg-type]
            name = str(table.name)
            first = constant(self.model, f"{name}_first", np.array([0], np.int64))
            half = constant(self.model, f"{name}_half", np.array([width // 2], np.int64))
            axis = constant(self.model, f"{name}_axis", np.array([1], np.int64))
            rows = ir.node("Squeeze", [table, first], name=f"{name}_rows")
            cut = ir.node("Slice", [rows.outputs[0], first, half, axis], name=f"{name}_cut")
            for made, size in ((rows, width), (cut, width // 2)):
                self.model.graph.insert_before(before, made)
                made.outputs[0].name, made.outputs[0].dtype = f"{made.name}_out", table.dtype
                made.outputs[0].shape = ir.Shape([tokens, size])
            self.tables[table] = cut.outputs[0]
        return self.tables[table]


def _rotation(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """``x [1, H, T, D]``, cosines and sines ``[1, T, D]`` of a rotation by halves; None for any other addition."""
    products = [_made_by(value, "Mul") for value in node.inputs]
    if len(products) != 2 or None in products:
        return None
    for straight, turned in (products, products[::-1]):
        assert straight is not None
        assert turned is not None
        for x, cos in (straight.inputs, straight.inputs[::-1]):
            for swapped, sin in (turned.inputs, turned.inputs[::-1]):
                if x is None or not _turns(swapped, x):
                    continue
                tables = [_table(value) for value in (cos, sin)]
                if all(tables) and x.shape is not None and x.shape[-1] == tables[0].shape[-1]:  # type: ignore[union-attr]
                    return x, tables[0], tables[1]  # type: ignore[return-value]
    return None


def _turns(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether ``value`` is ``concat(-x[..., D/2:], x[..., :D/2])``."""
    joined = _made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or x.shape is None or len(x.shape) != 4:
        return False
    width = x.shape[3]
    minus = _made_by(joined.inputs[0], "Neg")
    if not isinstance(width, int) or width % 2 or minus is None or joined.attributes["axis"].as_int() not in (-1, 3):
        return False
    second, first = _made_by(minus.inputs[0], "Slice"), _made_by(joined.inputs[1], "Slice")
    return _cuts(second, x, width // 2, width) and _cuts(first, x, 0, width // 2)


def _cuts(node: ir.Node | None, x: ir.Value, start: int, stop: int) -> bool:
    if node is None or node.inputs[0] is not x or len(node.inputs) < 4:
        return False
    numbers = [_integer(value) for value in node.inputs[1:]]
    if None in numbers or (len(numbers) > 3 and numbers[3] != 1):
        return False
    low, high, axis = numbers[:3]
    assert high is not None
    # "To the end" is written as the largest number there is.
    return low == start and (high == stop or (high > stop == x.shape[3])) and axis in (3, -1)  # type: ignore[index]


def _table(value: ir.Value | None) -> ir.Value | None:
    """Cosines or sines ``[1, T, D]`` whose second half is their first, under the axis of heads that was put in."""
    opened = _made_by(value, "Unsqueeze")
    if opened is None or _integer(opened.inputs[1]) != 1:
        return None
    table = opened.inputs[0]
    if table is None or table.shape is None or len(table.shape) != 3 or not isinstance(table.shape[2], int):
        return None
    at: ir.Node | None = table.producer()
    while at is not None and at.op_type in ("Mul", "Cast"):
        # Times a number, as scaled rotations are.
        if at.op_type == "Mul" and not _is_number(at.inputs[1]):
            return None
        at = at.inputs[0].producer() if at.inputs[0] is not None else None
    if at is None or at.op_type not in ("Cos", "Sin"):
        return None
    angles = _made_by(at.inputs[0], "Concat")
    return table if angles is not None and len(set(angles.inputs)) == 1 and len(angles.inputs) == 2 else None


def _flat(x: ir.Value) -> ir.Value | None:
    """``[1, T, H * D]`` that ``x [1, H, T, D]`` was made from by a reshape and a transpose; None when not so."""
    turned = _made_by(x, "Transpose")
    opened = None if turned is None or _order(turned) != HEADS_OUT else _made_by(turned.inputs[0], "Reshape")
    flat = None if opened is None else opened.inputs[0]
    return flat if flat is not None and flat.shape is not None and len(flat.shape) == 3 else None


def _flat_uses(value: ir.Value) -> list[ir.Value]:
    """``[1, T, H * D]`` that every user makes of ``value [1, H, T, D]``; none when one makes something else."""
    found = []
    for user in value.consumers():
        if user.op_type != "Transpose" or _order(user) != HEADS_OUT:
            return []
        closed = user.outputs[0].consumers()
        if not closed:
            return []
        for node in closed:
            flat = node.outputs[0]
            if node.op_type != "Reshape" or flat.shape is None or len(flat.shape) != 3 or flat.is_graph_output():
                return []
            found.append(flat)
    return found


def _unwind(node: ir.Node) -> None:
    """Let attention read its values, and its users its answer, without the reshapes and transposes between."""
    for place in range(3):
        given = node.inputs[place]
        closed = _made_by(given, "Reshape")
        back = None if closed is None else _made_by(closed.inputs[0], "Transpose")
        if back is None or _order(back) != HEADS_OUT or back.inputs[0] is None:
            continue
        flat = _flat(back.inputs[0])
        if flat is not None and given is not None and flat.shape == given.shape:
            node.replace_input_with(place, flat)
    answer = node.outputs[0]
    for opened in answer.consumers():
        for closed in opened.outputs[0].consumers() if opened.op_type == "Reshape" else ():
            same = closed.op_type == "Reshape" and closed.outputs[0].shape == answer.shape
            if same and not closed.outputs[0].is_graph_output():
                closed.outputs[0].replace_all_uses_with(answer)


def _skip(model: ir.Model, norm: ir.Node) -> None:
    """A norm and the addition before it as one operator that gives both."""
    import onnx_ir as ir

    added = _made_by(norm.inputs[0], "Add")
    if added is None or added.domain or norm.inputs[0] is None:
        return
    total = norm.inputs[0]
    if any(value is None or value.shape is None or value.shape != total.shape for value in added.inputs):
        return
    if total.shape is None or len(total.shape) != 3 or total.is_graph_output() or norm.outputs[0].is_graph_output():
        return
    outputs = [ir.Value(name=name) for name in (f"{norm.outputs[0].name}_skip", "", "", f"{total.name}_skip")]
    made = ir.node(
        "SkipSimplifiedLayerNormalization", [*added.inputs, norm.inputs[1]],
        {"epsilon": norm.attributes["epsilon"].as_float()}, domain=DOMAIN, name=f"{norm.name}_skip", outputs=outputs,
    )  # fmt: skip
    model.graph.insert_before(norm, made)
    for old, new in ((norm.outputs[0], outputs[0]), (total, outputs[3])):
        new.dtype, new.shape = old.dtype, old.shape
        old.replace_all_uses_with(new)


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def _is_number(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.size == 1


def _order(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints())


def _integer(value: ir.Value | None) -> int | None:
    """The only number of a constant."""
    import onnx_ir as ir

    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return int(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None
