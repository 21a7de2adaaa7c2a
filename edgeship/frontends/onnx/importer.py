"""Imports an ONNX file as a torch module with static shapes, ready for ``torch.export``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto, TensorProto

from edgeship.compat.torch import quiet_shape_errors
from edgeship.core.names import quoted
from edgeship.core.weights import AffineTensor
from edgeship.errors import EdgeshipError, SourceError
from edgeship.frontends.onnx.dtypes import STORED_DTYPE, numpy_name, type_name
from edgeship.frontends.onnx.ends import end_at
from edgeship.frontends.onnx.graph import GraphInput, check_tensor_type, graph_inputs, load_model, opset_versions
from edgeship.frontends.onnx.interpreter import Interpreter
from edgeship.frontends.onnx.values import Recorder
from edgeship.program.rows.mode import count_names
from edgeship.program.sizes import guarded_sizes
from edgeship.program.suppression import CANDIDATES

CHECK = "check the file with onnx.checker, or export it again"


@dataclass(frozen=True)
class TensorInfo:
    """Name, numpy dtype name and concrete shape of one graph input or output; ``declared`` is the file's own type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    declared: str = ""


@dataclass(frozen=True)
class ImportedOnnx:
    """An ONNX graph as a torch module.

    Attributes:
        module: takes the graph inputs positionally in graph order, returns a tuple of the outputs in graph order.
            Weights are parameters (frozen) that go by their ONNX names.
        inputs: what the module takes.
        outputs: what it returns.
        opset: version of the standard operator set the file was written for.
        fixed: inputs that were given a value, which the module does not take.
        remarks: what a user should know of the import, a sentence each.
        encoded: weights that the file stores as integers, by their name in the module.
        is_dynamic: the file rounds activations to 8 bits by the data at hand.
    """

    module: torch.nn.Module
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int
    fixed: tuple[TensorInfo, ...] = ()
    remarks: tuple[str, ...] = ()
    encoded: Mapping[str, AffineTensor] = field(default_factory=dict)
    is_dynamic: bool = False


def import_onnx(
    path: Path,
    *,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
    values: Mapping[str, Any] | None = None,
    cut: Sequence[str] = (),
    candidates: int = CANDIDATES,
) -> ImportedOnnx:
    """Read an ONNX file into torch.

    Everything that follows from constants and shapes alone is computed here; what is left becomes a
    ``torch.fx.GraphModule`` of ordinary torch calls. Local functions and branches on constants are inlined,
    loops with a known number of rounds are unrolled. Operators follow https://onnx.ai/onnx/operators. Half and double
    precision are computed in float32, inputs and outputs included.

    Args:
        path: the ``.onnx`` file; external data is looked for beside it.
        sizes: concrete shapes, by input name or its clean spelling, for inputs with symbolic dimensions.
        values: numbers, or nested lists of them, for inputs that become constants.
        cut: values at which the graph ends instead of at its outputs.
        candidates: how many boxes, best first, go into one non-maximum suppression.

    Raises:
        UsageError: ``cut`` names no value, or leaves none that depends on an input.
        SourceError: not an ONNX file, damaged, contradictory, or a dimension without a size.
        UnsafeSourceError: external data outside the model's folder.
        WeightsError: a weight is missing, too short, NaN or infinite.
        UnsupportedOpError: an operator, a type or a data-dependent shape that is not imported.
        LimitError: more nodes, or a larger tensor, than any artifact can hold.
    """
    model = load_model(Path(path))
    if cut:
        end_at(model, cut)
    recorder = Recorder(candidates)
    with torch.no_grad(), quiet_shape_errors(), guarded_sizes(Path(path).name):
        try:
            feeds = graph_inputs(model.graph, sizes or {}, values or {})
            results, counted = _run(model, Path(path), feeds, recorder)
        except EdgeshipError:
            raise
        except Exception as error:
            # Damage can sit in any field, names that are no text included; the cause stays chained for the log.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SourceError(f"{Path(path).name} contradicts itself: {reason}", fix=CHECK) from error
        module = recorder.finish([*results, *counted.values()])
    inputs: list[TensorInfo] = []
    fixed: list[TensorInfo] = []
    for feed in feeds:
        stored = numpy_name(STORED_DTYPE[feed.elem_type])
        info = TensorInfo(feed.name, numpy_name(feed.dtype), feed.shape, stored)
        (fixed if feed.is_fixed else inputs).append(info)
    names = [*(info.name for info in model.graph.output), *counted]
    outputs = tuple(
        TensorInfo(name, numpy_name(value.dtype), tuple(value.shape))
        for name, value in zip(names, [*results, *counted.values()], strict=True)
    )
    opset = opset_versions(model).get("", 1)
    remarks = (*_remarks(model, feeds), *recorder.chosen.remarks())
    return ImportedOnnx(
        module,
        tuple(inputs),
        outputs,
        opset,
        tuple(fixed),
        remarks,
        recorder.constants.encoded,
        recorder.is_dynamic,
    )


def _run(
    model: ModelProto, path: Path, feeds: Sequence[GraphInput], recorder: Recorder
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What the graph makes of its inputs, and how many rows of it count, by name. Each output in its own shape."""
    for info in model.graph.output:
        if info.type.WhichOneof("value") is not None:
            check_tensor_type(info)
    values = {
        feed.name: recorder.input(feed.name, feed.shape, feed.dtype) if feed.value is None else feed.value
        for feed in feeds
    }
    chosen = recorder.chosen
    with recorder:
        with chosen:
            results = Interpreter(model, path, recorder).run_main(model.graph, values)
            results = [value.to(torch.float32) if value.dtype == torch.float64 else value for value in results]
        found, counts, which = chosen.settled(results)
    names = count_names([info.name for info in model.graph.output], which)
    return found, dict(zip(names, counts, strict=True))


def _remarks(model: ModelProto, feeds: Sequence[GraphInput]) -> Iterator[str]:
    """What became of fixed inputs, and of half or double precision at the graph's border."""
    for feed in feeds:
        if feed.value is not None:
            shown = " ".join(str(feed.value.tolist()).split())
            yield f"input {quoted(feed.name)} is fixed at {shown[:80]}"
    other = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    kinds = {feed.name: feed.elem_type for feed in feeds if feed.value is None}
    kinds |= {info.name: info.type.tensor_type.elem_type for info in model.graph.output}
    for kind in other:
        names = [quoted(name) for name, found in kinds.items() if found == kind]
        if names:
            yield f"{', '.join(names)}: {type_name(kind)} in the file, float32 in the artifacts"
