"""Imports an ONNX file as a torch module with static shapes, ready for ``torch.export``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import ModelProto

from edgeship.errors import EdgeshipError, SourceError
from edgeship.frontends.onnx.dtypes import numpy_name, torch_dtype
from edgeship.frontends.onnx.graph import check_tensor_type, graph_inputs, load_model, opset_versions
from edgeship.frontends.onnx.interpreter import Interpreter
from edgeship.frontends.onnx.values import Recorder

CHECK = "check the file with onnx.checker, or export it again"


@dataclass(frozen=True)
class TensorInfo:
    """Name, numpy dtype name and concrete shape of one graph input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ImportedOnnx:
    """An ONNX graph as a torch module.

    Attributes:
        module: takes the graph inputs positionally in graph order, returns a tuple of the outputs in graph order.
            Weights are parameters (frozen) that go by their ONNX names.
        inputs: what the module takes.
        outputs: what it returns.
        opset: version of the standard operator set the file was written for.
    """

    module: torch.nn.Module
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int


def import_onnx(path: Path, *, sizes: Mapping[str, tuple[int, ...]] | None = None) -> ImportedOnnx:
    """Read an ONNX file into torch.

    Everything that follows from constants and shapes alone is computed here; what is left becomes a
    ``torch.fx.GraphModule`` of ordinary torch calls. Local functions and branches on constants are inlined,
    loops with a known number of rounds are unrolled. Operators follow https://onnx.ai/onnx/operators.

    Args:
        path: the ``.onnx`` file; external data is looked for beside it.
        sizes: concrete shapes, by input name, for inputs with symbolic dimensions.

    Raises:
        SourceError: not an ONNX file, damaged, contradictory, or a dimension without a size.
        UnsafeSourceError: external data outside the model's folder.
        WeightsError: a weight is missing, too short, NaN or infinite.
        UnsupportedOpError: an operator, a type or a data-dependent shape that is not imported.
    """
    model = load_model(Path(path))
    recorder = Recorder()
    with torch.no_grad(), _quiet_torch():
        try:
            values, results = _run(model, Path(path), sizes or {}, recorder)
        except EdgeshipError:
            raise
        except Exception as error:
            # Damage can sit in any field, names that are no text included; the cause stays chained for the log.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SourceError(f"{Path(path).name} contradicts itself: {reason}", fix=CHECK) from error
        module = recorder.finish(results)
    inputs = tuple(TensorInfo(name, numpy_name(value.dtype), tuple(value.shape)) for name, value in values.items())
    outputs = tuple(
        TensorInfo(info.name, numpy_name(value.dtype), tuple(value.shape))
        for info, value in zip(model.graph.output, results, strict=True)
    )
    return ImportedOnnx(module, inputs, outputs, opset_versions(model).get("", 1))


def _run(
    model: ModelProto, path: Path, sizes: Mapping[str, tuple[int, ...]], recorder: Recorder
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Graph inputs by name, and what the graph makes of them."""
    feeds = graph_inputs(model.graph, sizes)
    for info in model.graph.output:
        if info.type.WhichOneof("value") is not None:
            check_tensor_type(info)
    values = {
        feed.name: recorder.input(feed.name, feed.shape, torch_dtype(feed.elem_type, f'input "{feed.name}"'))
        for feed in feeds
    }
    with recorder:
        return values, Interpreter(model, path, recorder).run_main(model.graph, values)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Torch logs a traceback for each shape that does not fit; ours is the error that users see."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
