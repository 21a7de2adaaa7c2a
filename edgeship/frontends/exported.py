"""A ``torch.export.ExportedProgram``, from a file or from memory, as a program in normal form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeship.errors import SourceError
from edgeship.program.suppression import CANDIDATES

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from edgeship.program.program import TorchProgram


def program_of_exported(
    exported: ExportedProgram,
    title: str,
    outputs: Sequence[str],
    notes: Mapping[str, Mapping[str, Any]],
    *,
    note: str,
    cut: Sequence[str] = (),
    candidates: int = CANDIDATES,
) -> TorchProgram:
    """The program with its own shapes and example inputs.

    Args:
        title: what messages call it. outputs: names for the outputs, in order. notes: what is known of each input.
        cut, candidates: see `make_program`.

    Raises:
        SourceError: it has dynamic sizes, no example inputs, or weights that are not on the CPU.
    """
    from edgeship.compat.torch import leaves_of, structure_of, with_structure
    from edgeship.core.model import TensorSpec
    from edgeship.data.specs import with_notes
    from edgeship.program.export import dtype_of, make_program

    for value in exported.range_constraints:
        raise SourceError(f"{title} was exported with the dynamic size {value}", fix="export it with fixed shapes")
    if exported.example_inputs is None:
        raise SourceError(f"{title} holds no example inputs", fix="save it with torch.export.save as exported")
    away = next((value.device for value in exported.state_dict.values() if value.device.type != "cpu"), None)
    if away is not None:
        raise SourceError(
            f"{title} was exported on {away}",
            fix='move it with torch.export.passes.move_to_device_pass(program, "cpu")',
        )
    args, kwargs = exported.example_inputs
    tensors = leaves_of((args, kwargs))
    names = exported.graph_signature.user_inputs
    specs = with_notes(
        [TensorSpec(str(n), dtype_of(t), tuple(t.shape)) for n, t in zip(names, tensors, strict=True)], notes
    )
    structure = structure_of((args, kwargs))

    def call(module: torch.nn.Module, *leaves: torch.Tensor) -> Any:
        positional, named = with_structure(leaves, structure)
        return module(*positional, **named)

    inner = exported.module(check_guards=False)
    # Exported modules refuse train() and eval(), and are in the latter already.
    setattr(inner, "eval", lambda: inner)  # noqa: B010
    setattr(inner, "train", lambda mode=True: inner)  # noqa: B010
    return make_program(
        inner, specs, tensors, call=call, output_names=outputs, note=note, cut=cut, candidates=candidates
    )
