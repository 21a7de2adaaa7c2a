"""Core AI's converter, with every decided weight put in under its own name, exactly as it was decided.

coreai-torch 0.4.3 meets weights as placeholders of the graph. Those in ``encoded`` become constants named
``weight``, ``weight.scale`` and ``weight.zero_point`` and a ``coreai.blockwise_shift_scale``, so that no range is
guessed and no integer is recomputed; the converter itself never sees the weight's values.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from edgeship.compat.coreai import (
    Attribute,
    Converter,
    F16Type,
    F32Type,
    InsertionPoint,
    IntegerType,
    Location,
    Operation,
    StringAttr,
    module_of,
)
from edgeship.compat.coreai import dialect as coreai
from edgeship.errors import EdgeshipError, EncodingError, LoweringError, UnsupportedOpError
from edgeship.lowering.coreai.constants import build
from edgeship.lowering.coreai.graph import ACTIVATION
from edgeship.program.inventory import weight_nodes
from edgeship.program.provenance import where

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from coreai.authoring import AIProgram
    from torch.export import ExportedProgram
    from torch.fx import Node

    from edgeship.compat.coreai import Type, Value
    from edgeship.core.model import Signature
    from edgeship.core.weights import EncodedTensor

ENTRY = "main"

# The source in a location that says nothing, and in one that names an activation; runtimes/coreai/grids.py finds it.
UNNAMED = 'loc("-":0:0)'
NAMED = 'loc("activation {}":0:0)'

# The converter stamps the time of day; a fixed date keeps the file the same from build to build.
CREATION_DATE = "20260101T000000Z"


def convert(
    exported: ExportedProgram, encoded: Mapping[str, EncodedTensor], aliases: Mapping[str, str], signature: Signature
) -> tuple[AIProgram, dict[str, str]]:
    """A Core AI program, and the name that each encoded weight has in it.

    Raises:
        UnsupportedOpError: the converter failed on an operator. LoweringError: it failed as a whole.
    """
    converter = _EncodedConverter(encoded, aliases, weight_nodes(exported))
    converter.register_torch_lowering("quantized_decomposed::quantize_per_tensor.default")(_quantize)
    converter.register_torch_lowering("quantized_decomposed::dequantize_per_tensor.default")(_dequantize)
    try:
        converter.add_exported_program(
            exported,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            entrypoint_name=ENTRY,
        )
        program = converter.to_coreai()
    except EdgeshipError:
        raise
    except Exception as error:
        raise LoweringError(
            f"Core AI's converter failed: {first_line(error)}", fix="try another runtime, or report the model"
        ) from error
    _name_grids(program)
    return program, converter.stored


def _name_grids(program: AIProgram) -> None:
    """Let the location of each quantize operation name its activation, to be found in the saved file.

    Saving drops attributes, and constants of equal grids become one; locations are kept.
    """
    module = module_of(program)
    quantizers = list(_quantizers(module.operation))
    with module.context:
        for old in quantizers:
            activation = StringAttr(old.attributes[ACTIVATION]).value
            named = str(old.location).replace(UNNAMED, NAMED.format(activation), 1)
            kinds, operands = [result.type for result in old.results], list(old.operands)
            with InsertionPoint(old):
                location = Location.from_attr(Attribute.parse(named))
                new = Operation.create(old.name, kinds, operands, loc=location)
            old.results[0].replace_all_uses_with(new.results[0])
            old.erase()


def _quantizers(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                if inner.operation.name == "coreai.quantize":
                    yield inner.operation
                yield from _quantizers(inner.operation)


def save(program: AIProgram, path: Path) -> None:
    """Write the asset, with a fixed date."""
    program.save_asset(path)
    metadata = path / "metadata.json"
    facts = json.loads(metadata.read_text())
    facts["creationDate"] = CREATION_DATE
    metadata.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


class ExactConverter(Converter):
    """Core AI's converter, whose errors name the layer."""

    def call(self, node: Node) -> None:
        """Lower one operator. Raises `UnsupportedOpError` where the converter fails on it."""
        try:
            super().call(node)
        except EdgeshipError:
            raise
        except Exception as error:
            raise UnsupportedOpError(
                f"Core AI's converter cannot lower {node.target} at {where(node)}: {first_line(error)}",
                fix="rewrite that layer, or leave Core AI out with --runtime",
            ) from error


class _EncodedConverter(ExactConverter):
    """Core AI's converter, which takes encoded weights from us instead of from the graph's state."""

    def __init__(
        self, encoded: Mapping[str, EncodedTensor], aliases: Mapping[str, str], placeholders: Mapping[str, Node]
    ) -> None:
        super().__init__()
        self.stored: dict[str, str] = {}
        self._names = {node.name: aliases.get(name, name) for name, node in placeholders.items()}
        self._encoded = encoded
        self._made: dict[str, Value] = {}

    def placeholder(self, node: Node) -> None:
        """An encoded weight in our form; anything else as the converter does it."""
        name = self._names.get(node.name, "")
        if name not in self._encoded:
            super().placeholder(node)
            return
        if name not in self._made:
            half = node.meta["val"].dtype == torch.float16
            self._made[name], self.stored[name] = build(name, self._encoded[name], half=half)
        self.bind(node, self._made[name])


def _quantize(values: Mapping[str, Value], node: Node, location: Any) -> Value:
    given = values[node.all_input_nodes[0].name]
    result = coreai.quantize(given, *_grid(node, given.type.element_type), loc=location)
    result.owner.attributes[ACTIVATION] = StringAttr.get(node.meta[ACTIVATION])
    return result


def _dequantize(values: Mapping[str, Value], node: Node, location: Any) -> Value:
    element = F16Type.get() if node.meta["val"].dtype == torch.float16 else F32Type.get()
    return coreai.dequantize(values[node.all_input_nodes[0].name], *_grid(node, element), loc=location)


def _grid(node: Node, element: Type) -> tuple[Value, Value, Value, Value]:
    scale, zero_point, dtype = (cast("Any", node.args[place]) for place in (1, 2, 5))
    if dtype != torch.int8:
        raise EncodingError(
            f"Core AI quantizes activations to int8 only, not {dtype} (at {where(node)})", fix="use float activations"
        )
    kind = np.float16 if element == F16Type.get() else np.float32
    if float(kind(scale)) != np.float32(scale):
        raise EncodingError(f"the activation scale {scale} at {where(node)} is not a float16 number", fix="use float32")
    integer = IntegerType.get_signed(8)
    return (
        coreai.constant(np.array(scale, kind)),
        coreai.constant(np.array(zero_point, np.int8), dtype=integer),
        coreai.constant(np.array(0, kind)),
        coreai.constant(np.array(0, np.int32)),
    )


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
