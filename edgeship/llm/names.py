"""What a program calls the weights of a module that was built again from the same configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.errors import LoweringError

if TYPE_CHECKING:
    import torch

    from edgeship.program.program import TorchProgram


def program_names(model: torch.nn.Module, program: TorchProgram) -> dict[str, str]:
    """Every name of every parameter of ``model`` -> the name under which the program keeps that weight.

    Raises `LoweringError` when the program lacks one.
    """
    known = {*program.weights, *program.encoded}
    names: dict[int, list[str]] = {}
    for name, held in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(held), []).append(name)
    found: dict[str, str] = {}
    for same in names.values():
        main = next((name for name in same if program.record.aliases.get(name, name) in known), None)
        if main is None:
            raise LoweringError(f"the program has no weight {same[0]}", fix="build again")
        found |= dict.fromkeys(same, program.record.aliases.get(main, main))
    return found
