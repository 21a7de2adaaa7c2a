"""A language model for Core AI: prefill and decode as two entry points of one asset, keys and values in states.

    prefill: input_ids i32[1, chunk], position i32[1] -> next_position i32[1]
    decode:  input_ids i32[1, 1],     position i32[1] -> logits f32[1, 1, vocabulary]

Both keep ``k_cache_i`` and ``v_cache_i``, ``[1, kv_heads, context, head_dim]`` in the arithmetic of the program, and
share every weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from edgeship.compat.coreai import dialect as coreai
from edgeship.core.model import Placement
from edgeship.core.weights import FloatTensor
from edgeship.errors import EdgeshipError, LoweringError
from edgeship.llm.models import REAL_ELEMENTS, build_hollow, read_config
from edgeship.llm.names import program_names
from edgeship.lowering.coreai.convert import ExactConverter, first_line, save
from edgeship.lowering.coreai.graph import computed_in_half
from edgeship.lowering.coreai.places import Places
from edgeship.lowering.coreai.rewrites import in_coreai_operators
from edgeship.lowering.coreml.stateful import StatefulStep, prepare
from edgeship.program.inventory import weight_nodes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch.export import ExportedProgram
    from torch.fx import Node

    from edgeship.compat.coreai import Value
    from edgeship.core.weights import EncodedTensor
    from edgeship.lowering.coreai.places import Find
    from edgeship.program.program import TorchProgram


def lower_decoder(
    program: TorchProgram, path: Path, context: int, chunk: int, half: bool, find: Find
) -> tuple[Placement, ...]:
    """Write the asset of any decoder, its layers as transformers defines them; where it keeps each weight.

    Args:
        context: positions in the caches. chunk: tokens of a prefill. half: compute in float16.
        find: where the named constants of a saved program lie.

    Raises:
        UnsupportedOpError: an operator has no lowering. LoweringError: a weight was lost.
        EncodingError: an encoding has no form.
    """
    weights = _Weights(program, half)
    converter = _DecoderConverter(weights)
    for name, tokens in (("prefill", chunk), ("decode", 1)):
        exported, apart = _exported(weights, context, tokens)
        states = [target.rpartition(".")[2] for target in exported.graph_signature.buffers_to_mutate.values()]
        converter.add(exported, name, apart, "logits" if tokens == 1 else "next_position", states)
    try:
        converted = converter.to_coreai()
    except EdgeshipError:
        raise
    except Exception as error:
        raise LoweringError(f"Core AI's converter failed: {first_line(error)}", fix="report the model") from error
    save(converted, path)
    places = converter.places
    places.fill(path, weights.read, find)
    lost = [weight for weight in program.encoded if weight not in places.names]
    if lost:
        raise LoweringError(f"no entry point of the language model uses {lost[0]}", fix="report this as a bug")
    return tuple(Placement(weight, places.names[weight][""]) for weight in program.encoded)


class _Weights:
    """A program's weights as the asset will hold them: large or decided ones apart, all others in the graph."""

    def __init__(self, program: TorchProgram, half: bool) -> None:
        self.program, self.half = program, half

    def is_apart(self, weight: str) -> bool:
        return weight in self.program.encoded or self.program.weights[weight].numel() > REAL_ELEMENTS

    def read(self, weight: str) -> EncodedTensor:
        encoded = self.program.encoded.get(weight)
        if encoded is not None:
            return encoded
        return FloatTensor(self.program.weights[weight].numpy().astype(np.float16 if self.half else np.float32))

    def fill(self, model: torch.nn.Module, names: Mapping[str, str]) -> dict[str, str]:
        """Give a hollow model its small weights; name of each parameter that stays hollow -> weight."""
        apart = {name: weight for name, weight in names.items() if self.is_apart(weight)}
        for name, weight in names.items():
            if name not in apart:
                owner, _, leaf = name.rpartition(".")
                value = torch.nn.Parameter(self.program.weights[weight].float(), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, value)
        return apart


def _exported(weights: _Weights, context: int, tokens: int) -> tuple[ExportedProgram, dict[str, str]]:
    """One step in Core AI's operators; name of a parameter -> weight that is apart."""
    program = weights.program
    assert program.origin is not None
    assert program.record.decoder is not None
    model = build_hollow(read_config(program.origin))
    names = program_names(model, program)
    prepare(model, context, weights.half)
    apart = {f"model.{name}": weight for name, weight in weights.fill(model, names).items()}
    step = StatefulStep(model, program.record.decoder, context, logits=tokens == 1).eval()
    ids, position = torch.zeros(1, tokens, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    try:
        with torch.no_grad():
            exported = torch.export.export(step, (ids, position), strict=False)
    except Exception as error:  # of many types
        raise LoweringError(f"torch.export failed: {' '.join(str(error).split())[:300]}", fix="report it") from error
    if weights.half:
        exported = computed_in_half(exported, (ids, position))
    return in_coreai_operators(exported), apart


class _DecoderConverter(ExactConverter):
    """Core AI's converter with several entry points that share the constants of weights."""

    def __init__(self, weights: _Weights) -> None:
        super().__init__()
        self.places = Places(weights.half)
        self._weights = weights
        self._constants: dict[str, dict[str, str]] = {}
        self._values: dict[str, Value] = {}
        self._here: dict[str, Value] = {}
        self._entry = ""
        self.register_torch_lowering("edgeship::write_rows.default")(_write_rows)

    def add(
        self, exported: ExportedProgram, entry: str, apart: Mapping[str, str], output: str, states: list[str]
    ) -> None:
        """Stage one entry point.

        Args:
            apart: name of a parameter -> weight. states: names of its mutable buffers, in order.
        """
        nodes = weight_nodes(exported)
        self._constants[entry] = {node.name: apart[name] for name, node in nodes.items() if name in apart}
        self.add_exported_program(
            exported,
            input_names=["input_ids", "position"],
            output_names=[output],
            state_names=states,
            entrypoint_name=entry,
        )

    def begin(self, name: str, **options: Any) -> Any:
        """Begin an entry point, in which no weight was made yet."""
        self._entry, self._here = name, {}
        return super().begin(name, **options)

    def placeholder(self, node: Node) -> None:
        """A weight that is apart as its constants; anything else as the converter does it."""
        weight = self._constants[self._entry].get(node.name)
        if weight is None:
            super().placeholder(node)
        elif node.users:
            self.bind(node, self._value(weight))

    def _value(self, weight: str) -> Value:
        if weight not in self._here:
            if weight in self._values:
                self._here[weight] = _copied(self._values[weight])
            else:
                self._here[weight] = self._values[weight] = self.places.hold(weight, self._weights.read(weight))
        return self._here[weight]


def _copied(value: Value) -> Value:
    """The value made again where operations are added now; its constants are the same ones."""
    operands = [_copied(operand) for operand in value.owner.operands]
    copy = value.owner.clone()
    for place, operand in enumerate(operands):
        copy.operands[place] = operand
    return copy.results[0]


def _write_rows(values: Mapping[str, Value], node: Node, location: Any) -> Value:
    """New keys or values in a state: one slice, from a position that is known at run time."""
    cache, rows, position = (values[item.name] for item in node.all_input_nodes)
    axis = int(cast("int", node.args[3])) if len(node.args) > 3 else 2
    first: list[Any] = [coreai.constant([0], dtype=np.int32) for _ in cache.type.shape]
    last: list[Any] = [coreai.constant([size], dtype=np.int32) for size in cache.type.shape]
    first[axis] = position
    last[axis] = coreai.broadcasting_add(position, coreai.constant([rows.type.shape[axis]], dtype=np.int32))
    steps = coreai.constant([1] * len(first), dtype=np.int32)
    return coreai.slice_update(cache, coreai.concat(0, first), coreai.concat(0, last), steps, rows)
