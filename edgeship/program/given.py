"""What a source had quantized already: its integers become encodings, its pairs the program's activation grids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from edgeship.core.encodings import ENCODED_OPS, short_name
from edgeship.core.inventory import WeightUse
from edgeship.core.units import counted
from edgeship.core.weights import AffineTensor
from edgeship.program.activations import take_pairs
from edgeship.program.inventory import take_inventory
from edgeship.program.program import REMARK, TorchProgram


def take_over(program: TorchProgram, encoded: Mapping[str, AffineTensor], *, dynamic: bool = False) -> TorchProgram:
    """``program`` with the weights that its source stores as integers encoded so, and without pairs in its graph.

    Args:
        program: fresh from its source: floats, and ``quantized_decomposed`` pairs where the source had them.
        encoded: the integers by weight. Those that no longer make the weight (a batch norm went into it), or lie on
            scales along another axis than the output channels, are left out.
        dynamic: the source rounds activations to 8 bits by the data at hand.
    """
    activations = take_pairs(program.exported)
    if not activations and not encoded:
        return program
    inventory = take_inventory(program.exported)
    kept = {
        use.name: encoded[use.name]
        for use in inventory.weights
        if use.name in encoded and use.name not in program.record.aliases and _fits(program, use, encoded[use.name])
    }
    uses = tuple(
        dataclasses.replace(use, given=short_name(kept[use.name].encoding)) if use.name in kept else use
        for use in inventory.weights
    )
    computed = "dynamic" if dynamic else ""
    if activations:
        computed = f"int{max(grid.bits for grid in activations.values())}"
    record = dataclasses.replace(
        program.record,
        inventory=dataclasses.replace(inventory, weights=uses, activations=computed),
        encodings={name: tensor.encoding for name, tensor in kept.items()},
        activations=activations,
        history=(*program.record.history, *_told(len(kept), len(activations))),
    )
    return dataclasses.replace(program, encoded=kept, record=record)


def _fits(program: TorchProgram, use: WeightUse, tensor: AffineTensor) -> bool:
    if use.op not in ENCODED_OPS or tensor.shape != use.shape:
        return False
    encoding = tensor.encoding
    spread = [axis for axis, size in enumerate(tensor.scale.shape) if size > 1]
    along = encoding.granularity == "tensor" or spread[:1] == [use.channel_axis] or encoding.granularity == "group"
    return along and bool(np.array_equal(tensor.dequantize(), program.weights[use.name].numpy()))


def _told(weights: int, activations: int) -> tuple[str, ...]:
    """The remark that names what the source decided; none where it decided nothing."""
    parts: list[str] = []
    if weights:
        parts.append(counted(weights, "weight"))
    if activations:
        parts.append(counted(activations, "activation"))
    if not parts:
        return ()
    stays = "stays" if weights + activations == 1 else "stay"
    return (f"{REMARK}the source is quantized: {' and '.join(parts)} {stays} on its grids",)
