"""A language model to a ``.litertlm``: graphs first, with weights open, then the weights, each stored once.

Prefill comes in two lengths. LiteRT-LM takes the smallest that holds what is left of a prompt and pads it, and fails
when the padding does not fit the context any more: the short one ends a prompt there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.weights import FloatTensor
from edgeship.errors import LoweringError, UsageError
from edgeship.lowering.litert.container import (
    PREFILL_DECODE,
    Section,
    metadata_section,
    tokenizer_section,
    write_container,
)
from edgeship.lowering.litert.convert import convert, refuse_unrunnable
from edgeship.lowering.litert.decoder_graph import DECODE, OpenedStep, StepGraphs
from edgeship.lowering.litert.flatbuffer import AsideFile, drop_unused, parse, signature_of, write_to
from edgeship.lowering.litert.interface import name_interface
from edgeship.lowering.litert.names import shorten_names
from edgeship.lowering.litert.opened import stored_weights
from edgeship.lowering.litert.store import (
    ActivationMath,
    Constants,
    FloatRows,
    Storable,
    WeightStorer,
    refuse_encodings,
    storable,
)
from edgeship.lowering.litert.survey import survey
from edgeship.program.stored import WeightStore

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

    from edgeship.core.forms import ActivationMode
    from edgeship.core.model import Placement
    from edgeship.program.program import TorchProgram

CHUNK = 64
# The short prefill is this much shorter.
SHORTER = 8


def chunks_of(context: int, asked: int | None) -> tuple[int, ...]:
    """Lengths of the prefill signatures, longest first.

    Raises:
        UsageError: a chunk longer than the context.
    """
    chunk = min(CHUNK, context) if asked is None else asked
    if not 1 <= chunk <= context:
        raise UsageError(f"a chunk of {chunk} tokens does not fit a context of {context}", fix="give a shorter one")
    return tuple(dict.fromkeys((chunk, max(1, chunk // SHORTER))))


def write_decoder(
    program: TorchProgram,
    path: Path,
    *,
    context: int,
    chunks: tuple[int, ...],
    activations: ActivationMode,
    progress: Callable[[int, int, str], None],
) -> tuple[tuple[Placement, ...], dict[str, str]]:
    """Write the file; say where the weights lie, and what the graphs are made of.

    Args:
        context: positions of the cache. chunks: lengths of the prefill signatures.

    Raises:
        UnsupportedOpError, LoweringError, EncodingError: see `edgeship.lowering.litert`.
    """
    assert program.origin is not None
    assert program.record.decoder is not None
    refuse_encodings(program, activations)
    steps = _trace(program, context, chunks, progress)
    progress(1, 3, "convert")
    model = parse(convert({step.key: step.opened for step in steps}))
    refuse_unrunnable(model)
    interfaces = [(step.key, step.signature, step.opened.weights) for step in steps]
    del steps
    gc.collect()
    progress(2, 3, "store weights")
    with _aside(path) as aside:
        placements = _store(model, interfaces, program, aside, activations)
        aside.close()
        drop_unused(model)
        shorten_names(model, {placement.stored for placement in placements})
        decoder, origin = program.record.decoder, program.origin
        sections = [
            metadata_section(decoder, origin, context),
            tokenizer_section(origin / "tokenizer.json"),
            Section("TFLiteModel", lambda file: write_to(model, file), {"model_type": PREFILL_DECODE}),
        ]
        write_container(path, sections)
    return placements, survey(model)


def _trace(
    program: TorchProgram, context: int, chunks: tuple[int, ...], progress: Callable[[int, int, str], None]
) -> list[OpenedStep]:
    progress(0, 3, "trace")
    weights = stored_weights(program)
    graphs = StepGraphs(program, context)
    steps = [graphs.trace(1, weights, decode=True), *(graphs.trace(chunk, weights) for chunk in chunks)]
    missing = [name for name in weights if name not in steps[0].opened.weights]
    if missing:
        raise LoweringError(f"weight {missing[0]} is not used by the graph", fix="report this as a bug")
    return steps


def _store(
    model: schema.ModelT, interfaces: list[tuple[str, Any, tuple[str, ...]]], program: TorchProgram, aside: AsideFile,
    activations: ActivationMode,
) -> tuple[Placement, ...]:  # fmt: skip
    constants = Constants(model, aside)
    math: ActivationMath = "dynamic" if activations == "dynamic" else "float"
    storers: list[tuple[str, WeightStorer, dict[str, int]]] = []
    for key, signature, names in interfaces:
        tensors = name_interface(model, signature, len(names), key)
        graph = model.subgraphs[signature_of(model, key).subgraphIndex]
        storers.append((key, WeightStorer(model, graph, math, constants), dict(zip(names, tensors, strict=True))))
    placements: list[Placement] = []
    # Weight by weight: each is read from disk once for all signatures.
    for name in storers[0][2]:
        weight = _as_stored(program, name)
        for key, storer, numbers in storers:
            placed = storer.store([numbers[name]], [(name, weight)]) if name in numbers else []
            placements += placed if key == DECODE else []
    return tuple(placements)


def _as_stored(program: TorchProgram, name: str) -> Storable:
    if name in program.encoded:
        return storable(name, program.encoded[name])
    store = program.weights
    if not isinstance(store, WeightStore):
        return FloatTensor(program.weight(name).detach().float().numpy())
    shape = next(use.shape for use in program.record.inventory.weights if use.name == name)
    return FloatRows(shape, lambda start, stop: store.rows(name, start, stop).float().numpy())


@contextmanager
def _aside(path: Path) -> Iterator[AsideFile]:
    """A file beside the artifact for its constants, gone when the artifact is written."""
    file = AsideFile(path.with_suffix(".constants"))
    try:
        yield file
    finally:
        file.close()
        file.path.unlink()
