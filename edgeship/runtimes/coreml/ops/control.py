"""Branches and loops, and the label of a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgeship.errors import ArtifactError
from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from edgeship.runtimes.coreml.ops.registry import Outputs, Value


@op("cond")
def cond(call: Call) -> Outputs:
    """The first block if ``pred``, else the second."""
    return tuple(call.run_block(call.operation.blocks[0 if call.flag("pred") else 1], ()))


@op("while_loop")
def while_loop(call: Call) -> Outputs:
    """The second block over and over, while the first is true of the loop variables."""
    condition, body = call.operation.blocks
    variables: list[Value] = list(call.arguments["loop_vars"])
    while True:
        (going,) = call.run_block(condition, variables)
        if not isinstance(going, Tensor):
            raise ArtifactError(f"{call.operation.label}: its condition is not a tensor", fix="build it again")
        if not bool(going.item()):
            return tuple(variables)
        variables = call.run_block(body, variables)


@op("classify")
def classify(call: Call) -> Outputs:
    """The most probable label, and the probabilities in the order of the labels (a dictionary on a device)."""
    probabilities = call.floats("probabilities").reshape(-1)
    classes = call.value("classes")
    best = int(torch.argmax(probabilities))
    if isinstance(classes, list):
        return classes[best], probabilities
    if isinstance(classes, Tensor):
        return classes.reshape(-1)[best], probabilities
    raise ArtifactError(f"{call.operation.label}: its classes are not a list", fix="build the package again")
