"""A language model for Core ML: prefill and decode as two functions of one package, with states for keys and values.

    prefill: input_ids i32[1, chunk], position i32[1] -> next_position i32[1]
    decode:  input_ids i32[1, 1],     position i32[1] -> logits [1, 1, vocabulary]

Both keep ``k_cache_i`` and ``v_cache_i``, ``[1, kv_heads, context, head_dim]`` in float16, and share every weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil import register_torch_op

from edgeship.compat.coremltools import backend_pipeline, exact_conversion, inputs_of, run_passes
from edgeship.core.model import Placement
from edgeship.core.weights import FloatTensor
from edgeship.errors import EdgeshipError, LoweringError
from edgeship.llm.models import REAL_ELEMENTS, build_hollow, read_config
from edgeship.llm.names import program_names
from edgeship.lowering.coreml.convert import explained
from edgeship.lowering.coreml.places import HOLD, SETTLE, Piece, Places, Shape, shape_of
from edgeship.lowering.coreml.rewrites import in_coreml_operators
from edgeship.lowering.coreml.stateful import StatefulStep, prepare
from edgeship.lowering.coreml.stream import write
from edgeship.program.hollow import fit_scalars

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from edgeship.core.weights import EncodedTensor
    from edgeship.program.program import TorchProgram

TARGET = "iOS18"
# They look at the content of constants, which is not there.
HASHING = {"common::const_deduplication"}


@register_torch_op(torch_alias=["edgeship::write_rows", "edgeship.write_rows"], override=True)  # type: ignore[untyped-decorator]
def write_rows(context: Any, node: Any) -> None:
    """New keys or values in a state: one slice, open on all axes but that of positions."""
    cache, rows, position, axis = inputs_of(context, node, 4)
    place = int(axis.val)
    whole = np.arange(4) != place

    def at(number: Any) -> Any:
        zeros = np.zeros(4, np.int32)
        parts = [zeros[:place], number, zeros[place + 1 :]]
        return mb.concat(values=[part for part in parts if part is number or len(part)], axis=0)

    end = mb.add(x=position, y=np.int32(rows.shape[place]))
    updated = mb.slice_update(
        x=cache, update=rows, begin=at(position), end=at(end), begin_mask=whole, end_mask=whole, name=node.name
    )
    context.add(updated)


def lower_generic(
    program: TorchProgram, path: Path, context: int, chunk: int, half: bool, facts: Mapping[str, str]
) -> tuple[Placement, ...]:
    """Write the package of any decoder, its layers as transformers defines them; where it keeps each weight.

    Args:
        context: positions in the caches. chunk: tokens of a prefill. half: compute in float16.

    Raises:
        UnsupportedOpError: an operator has no lowering. LoweringError: a weight was lost.
        EncodingError: an encoding has no form.
    """
    assert program.record.decoder is not None
    weights = Weights(program, half)
    functions = {}
    for name, tokens in (("prefill", chunk), ("decode", 1)):
        model, names = weights.model()
        prepare(model, context, half)
        step = StatefulStep(model, program.record.decoder, context, logits=tokens == 1).eval()
        apart = {f"model.{key}": Piece(weight) for key, weight in names.items() if weights.is_apart(weight)}
        output = "logits" if tokens == 1 else "next_position"
        functions[name] = convert(step, {"input_ids": (1, tokens)}, output, apart, weights)
    return weights.write(functions, path, facts)


class Weights:
    """A program's weights as a package will hold them.

    Args:
        half: floats become float16.
    """

    def __init__(self, program: TorchProgram, half: bool) -> None:
        self.program, self.half = program, half
        self._shapes: dict[str, Shape] = {}
        self._pieces: dict[str, Piece] = {}

    def model(self) -> tuple[torch.nn.Module, dict[str, str]]:
        """The hollow model with its small weights, and the program's name for each name of a parameter."""
        assert self.program.origin is not None
        model = build_hollow(read_config(self.program.origin))
        names = program_names(model, self.program)
        for name, weight in names.items():
            if not self.is_apart(weight):
                owner, _, leaf = name.rpartition(".")
                value = torch.nn.Parameter(self.program.weights[weight].float(), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, value)
        return model, names

    def write(self, functions: Mapping[str, Any], path: Path, facts: Mapping[str, str]) -> tuple[Placement, ...]:
        """Write converted functions, and say where each weight that was decided lies: several pieces in order.

        Raises `LoweringError` when there is none for one.
        """
        write(functions, self._pieces, self.read, path, ct.target.iOS18.value, facts)
        placed: dict[str, list[Placement]] = {weight: [] for weight in self.program.encoded}
        for piece in sorted(self._pieces.values(), key=lambda piece: piece.start):
            if piece.weight in placed:
                shape = self.shape(piece)
                rank = len(self._shapes[piece.weight].shape)
                same = piece.stop is None and piece.rank in (None, rank)
                order = None if same else tuple(range(rank))
                placed[piece.weight].append(Placement(piece.weight, piece.stored, order, None if same else shape.shape))
        for weight, places in placed.items():
            if not places:
                raise LoweringError(f"no function of the language model uses {weight}", fix="report this as a bug")
        return tuple(place for places in placed.values() for place in places)

    def is_apart(self, weight: str) -> bool:
        """Whether a weight is only a place until the package is written: what was decided, and all that is large."""
        return weight in self.program.encoded or self.program.weights[weight].numel() > REAL_ELEMENTS

    def shape(self, piece: Piece) -> Shape:
        """The shape of a weight that is apart, or of a piece of one."""
        if piece.weight not in self._shapes:
            self._shapes[piece.weight] = shape_of(piece.weight, self.read(piece.weight))
        self._pieces[piece.stored] = piece
        return self._shapes[piece.weight].of(piece)

    def read(self, weight: str) -> EncodedTensor:
        """One weight, for the file."""
        encoded = self.program.encoded.get(weight)
        if encoded is not None:
            return encoded
        values = self.program.weights[weight].numpy()
        return FloatTensor(values.astype(np.float16 if self.half else np.float32, copy=False))


def convert(
    step: torch.nn.Module,
    given: Mapping[str, tuple[int, ...]],
    output: str,
    apart: Mapping[str, Piece],
    weights: Weights,
) -> Any:
    """One function: an mlprogram of coremltools, whose weights are places.

    Args:
        given: its first input, by name; the second is ``position``. output: name of what it gives.
        apart: name of a parameter of ``step`` -> what the package stores for it.
    """
    ((name, shape),) = given.items()
    kind = np.float16 if weights.half else np.float32
    whole = name == "input_ids"
    example = torch.zeros(shape, dtype=torch.int32 if whole else torch.float32)
    try:
        with torch.no_grad():
            exported = torch.export.export(step, (example, torch.zeros(1, dtype=torch.int32)), strict=False)
    except Exception as error:  # of many types
        raise LoweringError(f"torch.export failed: {' '.join(str(error).split())[:300]}", fix="report it") from error
    exported = in_coreml_operators(exported)
    if weights.half:
        fit_scalars(exported.graph)
    found = {node: apart[target] for node, target in _parameters(exported) if target in apart}
    places = Places(found, {piece: weights.shape(piece) for piece in found.values()}, weights.half)
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.insert_pass(0, HOLD)
    pipeline.set_options(HOLD, {"places": places})
    pipeline.remove_passes(HASHING)
    try:
        with exact_conversion():
            converted = ct.convert(
                exported,
                convert_to="milinternal",
                inputs=[
                    ct.TensorType(name=name, shape=shape, dtype=np.int32 if whole else kind),
                    ct.TensorType(name="position", shape=(1,), dtype=np.int32),
                ],
                outputs=[ct.TensorType(name=output, dtype=np.int32 if output == "next_position" else kind)],
                minimum_deployment_target=getattr(ct.target, TARGET),
                compute_precision=ct.precision.FLOAT16 if weights.half else ct.precision.FLOAT32,
                pass_pipeline=pipeline,
            )
        _finish(converted, places)
    except EdgeshipError:
        raise
    except Exception as error:
        raise explained(error, exported) from error
    return converted


def _parameters(exported: ExportedProgram) -> Iterator[tuple[str, str]]:
    """(name of the constant, name of the parameter) of everything that the program holds."""
    for spec in exported.graph_signature.input_specs:
        if spec.target is not None:
            yield spec.arg.name, spec.target


def _finish(program: Any, places: Places) -> None:
    """What coremltools does before it writes, without looking at the content of constants."""
    pipeline = backend_pipeline()
    pipeline.remove_passes(HASHING)
    run_passes(program, pipeline)
    last = ct.PassPipeline(["common::dead_code_elimination", SETTLE], "edgeship")
    last.set_options(SETTLE, {"places": places})
    run_passes(program, last)
