"""Input specifications as people write them: ``name:f32[1,3,224,224]``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from edgeship.core.model import Dtype, TensorSpec
from edgeship.errors import UsageError

if TYPE_CHECKING:
    import torch

_PATTERN = re.compile(r"^(?P<name>[A-Za-z_][\w.]*):(?P<dtype>\w+)\[(?P<sizes>[^\]]*)\]$")


def parse_input(text: str) -> TensorSpec:
    """One ``--input``. Raises `UsageError` with the form and the list of dtypes."""
    match = _PATTERN.match(text.replace(" ", ""))
    example = "write name:f32[1,3,224,224]"
    if match is None:
        raise UsageError(f"--input {text!r} is not name:dtype[sizes]", fix=example)
    if match["dtype"] not in get_args(Dtype):
        raise UsageError(f"--input {text!r}: no dtype {match['dtype']}", fix=f"use {', '.join(get_args(Dtype))}")
    sizes = [size for size in match["sizes"].split(",") if size]
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UsageError(f"--input {text!r}: sizes must be whole numbers above 0", fix=example)
    return TensorSpec(match["name"], match["dtype"], tuple(int(size) for size in sizes))  # type: ignore[arg-type]


def parse_inputs(texts: Sequence[str]) -> list[TensorSpec]:
    """Every ``--input``, in order. Raises `UsageError` for a form nobody reads, or a name given twice."""
    specs = [parse_input(text) for text in texts]
    names = [spec.name for spec in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two inputs are called {twice}", fix="give each --input a name of its own")
    return specs


def with_notes(specs: Sequence[TensorSpec], notes: Mapping[str, Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    """Specs with layout, range and normalisation added by name. Raises `UsageError` for a note on no input."""
    names = [spec.name for spec in specs]
    for name in notes:
        if name not in names:
            raise UsageError(f"notes for an input {name}, which the model has not", fix=f"it has {', '.join(names)}")
    return tuple(
        replace(spec, **{key: _tuple(value) for key, value in notes[spec.name].items()}) if spec.name in notes else spec
        for spec in specs
    )


def example_tensors(specs: Sequence[TensorSpec], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """One generated tensor a spec, to trace with."""
    import torch

    from edgeship.core.model import Signature
    from edgeship.data.batches import generate_batches

    batch = generate_batches(Signature(tuple(specs), ()), 1, seed)[0]
    return tuple(torch.from_numpy(batch[spec.name].copy()) for spec in specs)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
