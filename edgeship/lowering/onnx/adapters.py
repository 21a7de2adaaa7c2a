"""LoRA adapters beside a graph for onnxruntime-genai (Hu et al. 2021, arXiv:2106.09685), so that one base serves many.

Each linear layer that an adapter touches gets two matrices as inputs, ``A [in, r]`` and ``B [r, out]``, and adds
``x A B`` to what it answers. By default they have rank zero, and the layer answers as it did. An adapter is a file with
matrices for some of these inputs; the engine gives them to the graph while the adapter is active.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgeship.errors import LoweringError, OutputError

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx_ir as ir

# While a graph is exported: layer -> its two matrices.
_active: list[Mapping[str, tuple[torch.Tensor, torch.Tensor]]] = []


class AdaptedLinear(torch.nn.Linear):
    """A linear layer with a place for an adapter.

    Args:
        plain: a layer that a model has already; its weights are shared. layer: its name.
    """

    def __init__(self, plain: torch.nn.Linear, layer: str) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        self.weight, self.bias, self.layer = plain.weight, plain.bias, layer
        self.train(plain.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer answers, and what the adapter adds. [..., in] -> [..., out]."""
        down, up = _active[-1][self.layer]
        return super().forward(x) + torch.matmul(torch.matmul(x, down), up)


class Matrices:
    """The matrices that layers see inside the block.

    Args:
        layers: names. given: for each of them A and B, one after the other.
    """

    def __init__(self, layers: Sequence[str], given: Sequence[torch.Tensor]) -> None:
        """``given``: [in, rank] and [rank, out] of each layer in turn."""
        self._found = {layer: (given[2 * i], given[2 * i + 1]) for i, layer in enumerate(layers)}

    def __enter__(self) -> None:
        _active.append(self._found)

    def __exit__(self, *_: object) -> None:
        _active.pop()


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The layers that an adapter may touch, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def open_layers(model: torch.nn.Module, layers: Sequence[str]) -> None:
    """Give each of these layers a place for an adapter."""
    known = linear_layers(model)
    for layer in layers:
        model.set_submodule(layer, AdaptedLinear(known[layer], layer))


def matrix_names(layers: Sequence[str]) -> list[str]:
    """Inputs of the graph, in order: A and B of each layer."""
    return [f"{layer}.lora_{part}" for layer in layers for part in ("A", "B")]


def example_matrices(model: torch.nn.Module, layers: Sequence[str]) -> tuple[list[torch.Tensor], list[dict[int, Any]]]:
    """Matrices of a rank that no size of the model equals, and that their rank is free.

    [in, rank] and [rank, out] of each layer in turn.
    """
    known = linear_layers(model)
    examples: list[torch.Tensor] = []
    shapes: list[dict[int, Any]] = []
    for i, layer in enumerate(layers):
        rank = torch.export.Dim(f"rank_{i}")
        examples += [torch.zeros(known[layer].in_features, 7), torch.zeros(7, known[layer].out_features)]
        shapes += [{1: rank}, {0: rank}]
    return examples, shapes


def default_matrices(graph: ir.Model, layers: Sequence[str]) -> None:
    """Give every matrix its default, of rank zero.

    Raises `LoweringError` when the exporter lost one.
    """
    import numpy as np
    import onnx_ir as ir

    inputs = {value.name: value for value in graph.graph.inputs}
    for name in matrix_names(layers):
        value = inputs.get(name)
        if value is None or value.shape is None or not value.uses():
            raise LoweringError(f"the adapter's {name} is not used in the graph", fix="report this as a bug")
        empty = np.zeros([size if isinstance(size, int) else 0 for size in value.shape], np.float32)
        value.const_value = ir.tensor(empty, name=name)
        graph.graph.initializers[name] = value


def write_adapter(path: Path, matrices: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> None:
    """Write an adapter's file.

    Args:
        matrices: layer -> A ``[in, r]`` and B ``[r, out]``, float32, with the scale in one of them.

    Raises `OutputError` when the disk refuses it, `LoweringError` when the file holds other numbers.
    """
    import numpy as np
    import onnxruntime

    values = {
        f"{layer}.lora_{part}": onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(matrix, np.float32))
        for layer, pair in matrices.items()
        for part, matrix in zip("AB", pair, strict=True)
    }
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    try:
        adapter.export_adapter(str(path.absolute()))
    except Exception as error:  # a plain RuntimeError of the binding
        raise OutputError(f"cannot write {path.name}: {error}", fix="check space and permissions") from error
    read = onnxruntime.AdapterFormat.read_adapter(str(path.absolute())).get_parameters()
    for name, value in values.items():
        if name not in read or not np.array_equal(read[name].numpy(), value.numpy()):
            raise LoweringError(f"{name} is not in {path.name} as it was written", fix="report this as a bug")
