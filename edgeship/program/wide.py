"""Which operators of a float16 program have to be computed in float32 to be right.

Float16 has nothing between 0 and 6e-8 and nothing above 65504: a square of 300 is infinite, a floor of 1e-10 is 0. So
what squares, or has a constant that small, on its way into a root, a quotient or a logarithm is computed in float32,
with what follows until the result is of the size of what went in. Layers with weights stay in float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.program.decided import deciding_nodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.fx import Graph, Node

# The smallest number that float16 holds with all its bits.
SMALLEST = 2.0**-14
LOGARITHMS = {"log", "log2", "log10", "log1p"}
NARROWING = {*LOGARITHMS, "rsqrt", "reciprocal", "sqrt", "div", "pow"}
WHOLE = {"linalg_vector_norm", "norm", "var", "std", "var_mean", "std_mean", "cosine_similarity"}
MOVING = {
    "view", "reshape", "unsafe_view", "permute", "transpose", "unsqueeze", "squeeze", "expand", "slice", "select",
    "cat", "clone", "to_copy", "getitem", "pad", "constant_pad_nd",
}  # fmt: skip
CARRYING = {
    *MOVING, *NARROWING, *WHOLE, "add", "sub", "rsub", "mul", "square", "abs", "neg", "mean", "sum", "amax", "clamp",
    "clamp_min", "maximum", "minimum", "mm", "bmm", "matmul", "where", "avg_pool2d", "avg_pool3d",
}  # fmt: skip
# How far a number is followed, in operators.
REACH = 8
# Operators that a fact names.
NAMED = 12


def wide_nodes(graph: Graph) -> dict[Node, None]:
    """The nodes to compute in float32, in the order of the graph."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not _is_float(node):
            continue
        kind = kind_of(node)
        if kind in WHOLE:
            found.add(node)
        elif kind in NARROWING and not _is_plain(node, kind):
            before = set(_before(node, kind))
            if kind in LOGARITHMS or any(_is_dangerous(item) for item in (node, *before)):
                found |= {node, *before}
    waiting = [(node, 0) for node in found]
    found |= deciding_nodes(graph)
    while waiting:
        node, steps = waiting.pop()
        if steps == REACH or kind_of(node) in LOGARITHMS or _is_applied(node, found):
            continue
        for user in node.users:
            carries = user.op == "call_function" and _is_float(user) and kind_of(user) in CARRYING
            if carries and user not in found:
                found.add(user)
                waiting.append((user, steps + 1))
    return {node: None for node in graph.nodes if node in found}


def named_wide(graph: Graph) -> dict[str, str]:
    """Those operators by name, as a fact of an artifact: none where there are none."""
    names = [node.name for node in wide_nodes(graph)]
    listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return {"computed_in_float32": listed} if names else {}


def kind_of(node: Node) -> str:
    """The operator's name without its overload."""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0].strip("_")


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return bool(getattr(value, "is_floating_point", bool)())


def _is_plain(node: Node, kind: str) -> bool:
    """A quotient by a number, and a power with a small whole exponent, narrow nothing."""
    second: Any = node.args[1] if len(node.args) > 1 else None
    if kind == "div":
        return isinstance(second, (int, float)) or getattr(second, "op", "") in ("placeholder", "get_attr")
    return kind == "pow" and isinstance(second, (int, float)) and second in (1, 2, 3)


def _before(node: Node, kind: str) -> Iterator[Node]:
    """What makes the number that is narrowed, back to squares and to what carries none."""
    start = node.args[1] if kind == "div" else node.args[0]
    waiting: list[tuple[Any, int]] = [(start, 1)]
    seen: set[Node] = set()
    while waiting:
        item, steps = waiting.pop()
        if getattr(item, "op", "") != "call_function" or item in seen or steps > REACH:
            continue
        if kind_of(item) not in CARRYING or not _is_float(item):
            continue
        seen.add(item)
        yield item
        if not _squares(item) and kind_of(item) not in WHOLE:
            waiting += [(given, steps + 1) for given in item.all_input_nodes]


def _squares(node: Node) -> bool:
    kind = kind_of(node)
    if kind == "mul":
        return len(node.args) == 2 and node.args[0] is node.args[1]
    return kind == "square" or (kind == "pow" and len(node.args) > 1 and node.args[1] in (2, 3, 4))


def _is_dangerous(node: Node) -> bool:
    numbers = [*node.args[1:], *node.kwargs.values()]
    small = any(isinstance(item, float) and 0 < abs(item) < SMALLEST for item in numbers)
    return small or _squares(node) or kind_of(node) in WHOLE


def _is_applied(node: Node, found: set[Node]) -> bool:
    """Whether a product or quotient brings back the size of what went in: one side comes from elsewhere."""
    given = [item for item in node.all_input_nodes if item.op == "call_function" or _is_float(item)]
    return kind_of(node) in ("mul", "div", "mm", "bmm", "matmul") and any(item not in found for item in given)
