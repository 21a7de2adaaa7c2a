"""Run a program whose weights do not fit into memory: operator by operator over all inputs, each weight read once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from edgeship.core.weights import AffineTensor, FloatTensor, MXFP4Tensor
from edgeship.program.inventory import weight_nodes

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch.fx import Node

    from edgeship.core.weights import EncodedTensor
    from edgeship.program.program import TorchProgram

# Weights of more numbers than this are widened to float32 some rows at a time.
LARGE_ELEMENTS = 1 << 24
# Programs with more bytes of float32 weights than this are run so.
STREAMED_BYTES = 2 << 30


def is_large(program: TorchProgram) -> bool:
    """Whether the weights in float32 are too large to have them all in memory."""
    return 4 * program.record.inventory.parameters > STREAMED_BYTES


def run_streamed(
    program: TorchProgram, batches: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> list[dict[str, npt.NDArray[Any]]]:
    """What the reference answers, with weights dequantized as decided. Static activation grids are not applied.

    Shapes are the signature's.

    Args:
        batches: inputs by name.

    Returns:
        Outputs by name, one dictionary a batch.
    """
    import torch

    exported = program.exported
    weights = {node: name for name, node in weight_nodes(exported).items()}
    lifted = exported.graph_signature.inputs_to_lifted_tensor_constants
    names = iter(spec.name for spec in program.signature.inputs)
    values: dict[Node, list[Any]] = {}
    for node in exported.graph.nodes:
        if node.op != "placeholder" or node in weights:
            continue
        if node.name in lifted:
            values[node] = [exported.constants[lifted[node.name]]] * len(batches)
        else:
            name = next(names)
            values[node] = [torch.from_numpy(batch[name].copy()) for batch in batches]
    last = {arg: node for node in exported.graph.nodes for arg in node.all_input_nodes}
    with torch.no_grad():
        for node in exported.graph.nodes:
            if node.op == "output":
                outputs = [cast("Node", arg) for arg in node.args[0]]
                answers: list[dict[str, npt.NDArray[Any]]] = [{} for _ in batches]
                for spec, out in zip(program.signature.outputs, outputs, strict=True):
                    for answer, value in zip(answers, values[out], strict=True):
                        answer[spec.name] = value.numpy()
                return answers
            if node.op == "call_function":
                values[node] = _call(program, node, weights, values, len(batches))
                for arg in node.all_input_nodes:
                    if last[arg] is node and arg not in weights:
                        del values[arg]
    raise AssertionError("a program ends in its outputs")


def _call(
    program: TorchProgram, node: Node, weights: Mapping[Node, str], values: Mapping[Node, list[Any]], count: int
) -> list[Any]:
    import torch
    from torch.fx.node import map_arg

    aten = torch.ops.aten
    large = [arg for arg in node.all_input_nodes if arg in weights and arg.meta["val"].numel() > LARGE_ELEMENTS]
    if large and node.target == aten.embedding.default and node.args[0] is large[0]:
        return [_lookup(program, weights[large[0]], values[cast("Node", node.args[1])][i]) for i in range(count)]
    if large and node.target == aten.linear.default and node.args[1] is large[0]:
        inputs = values[cast("Node", node.args[0])]
        parts: list[list[torch.Tensor]] = [[] for _ in range(count)]
        for rows in _row_parts(program, weights[large[0]]):
            for part, value in zip(parts, inputs, strict=True):
                part.append(torch.nn.functional.linear(value, rows))
        found = [torch.cat(part, -1) for part in parts]
        if len(node.args) > 2 and node.args[2] is not None:
            bias = program.weight(weights[cast("Node", node.args[2])]).float()
            found = [value + bias for value in found]
        return found
    held = {arg: _widened(program.weight(weights[arg])) for arg in node.all_input_nodes if arg in weights}

    def run(index: int) -> Any:
        def look(arg: Node) -> Any:
            return held[arg] if arg in held else values[arg][index]

        args, kwargs = map_arg((node.args, node.kwargs), look)
        return cast("Any", node.target)(*args, **kwargs)

    return [run(index) for index in range(count)]


def _widened(value: torch.Tensor) -> torch.Tensor:
    """Any shape."""
    return value.float() if value.is_floating_point() else value


def _row_parts(program: TorchProgram, name: str) -> Iterator[torch.Tensor]:
    """A weight in float32, some rows at a time."""
    import torch

    from edgeship.program.stored import WeightStore

    main = program.record.aliases.get(name, name)
    shape = program.record.inventory.weight(main).shape
    step = max(1, LARGE_ELEMENTS * shape[0] // max(1, _count(shape)))
    if main in program.encoded:
        tensor = program.encoded[main]
        for start in range(0, shape[0], step):
            yield torch.from_numpy(_rows(tensor, slice(start, start + step)))
        return
    weights = program.weights
    for start in range(0, shape[0], step):
        if isinstance(weights, WeightStore):
            yield weights.rows(main, start, start + step)
        else:
            yield weights[main][start : start + step].float()


def _lookup(program: TorchProgram, name: str, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a table, in float32."""
    import torch

    main = program.record.aliases.get(name, name)
    flat = ids.reshape(-1)
    if main in program.encoded:
        rows = torch.from_numpy(_rows(program.encoded[main], flat.numpy()))
    else:
        from edgeship.program.stored import WeightStore

        weights = program.weights
        if isinstance(weights, WeightStore):
            rows = torch.cat([weights.rows(main, int(i), int(i) + 1) for i in flat]).float()
        else:
            rows = weights[main][flat].float()
    return rows.reshape(*ids.shape, -1)


def _rows(tensor: EncodedTensor, index: Any) -> npt.NDArray[Any]:
    """Rows of an encoded weight, dequantized. Scales of palettes and sparse weights are not a row's own."""
    match tensor:
        case FloatTensor():
            return FloatTensor(tensor.values[index]).dequantize()
        case MXFP4Tensor():
            return MXFP4Tensor(tensor.elements[index], tensor.exponents[index]).dequantize()
        case AffineTensor():
            # A scale for the whole table is every row's.
            own = index if tensor.scale.shape[0] > 1 else slice(None)
            zero = None if tensor.zero_point is None else tensor.zero_point[own]
            return AffineTensor(tensor.values[index], tensor.scale[own], zero, tensor.encoding).dequantize()
        case _:
            result: npt.NDArray[Any] = tensor.dequantize()[index]
            return result


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
