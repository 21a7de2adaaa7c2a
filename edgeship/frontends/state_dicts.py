"""Sets of weights in a checkpoint: a state dict under some key, or the tensors of a module that was pickled whole.

What a trainer writes has the weights somewhere inside, beside optimizer states, averages and settings. Nothing here
goes by the trainer's name: each group of named tensors is a set, of which `edgeship.frontends.fitting` finds the one
that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.errors import SourceError
from edgeship.program.pickled_values import PlainObject, TensorRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgeship.program.checkpoint import Checkpoint

# Sets deeper inside a checkpoint than this are an optimizer's.
_DEPTH = 4


@dataclass(frozen=True)
class WeightSet:
    """Named tensors that a file keeps together.

    Args:
        key: where they lie in it, ``state_dict``; empty for the whole file. shapes: by name, in the file's order.
        read: reads one, in its own shape. same: what a tensor is the same as; equal only for one and the same numbers.
        module: the class of a module that was pickled whole; empty for a state dict.
    """

    key: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    same: Callable[[str], Any]
    module: str = ""


def safetensors_set(path: Path) -> WeightSet:
    """What a safetensors file holds. Raises `SourceError` for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{path} is not a readable safetensors file: {error}", fix="download it again") from None
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return WeightSet("", shapes, state.__getitem__, lambda name: name)


def weight_sets(checkpoint: Checkpoint) -> list[WeightSet]:
    """Every set in a checkpoint, the outer ones first. Nothing is read yet."""
    found: list[WeightSet] = []
    pending: list[tuple[str, Any, int]] = [("", checkpoint.content, 0)]
    while pending:
        key, value, depth = pending.pop(0)
        kind = value.kind if is_module(value) else ""
        entries = module_tensors(value) if kind else _entries(value)
        tensors = {str(name): item for name, item in entries.items() if _is_tensor(item)}
        if tensors:
            found.append(_set_of(checkpoint, key, tensors, kind))
        if kind or depth >= _DEPTH:
            continue
        for name, item in entries.items():
            pending.append((f"{key}.{name}" if key else str(name), item, depth + 1))
    return found


def is_module(value: Any) -> bool:
    """Whether this is what an ``nn.Module`` holds, read as a plain record."""
    return isinstance(value, PlainObject) and {"_parameters", "_buffers", "_modules"} <= set(value.attributes)


def module_tensors(module: PlainObject) -> dict[str, Any]:
    """The tensors of a module and of the modules in it, by the names that its ``state_dict`` has."""
    found: dict[str, Any] = {}
    pending: list[tuple[str, PlainObject]] = [("", module)]
    seen: set[int] = set()
    while pending:
        prefix, part = pending.pop(0)
        # A pickle may hold a module that holds itself.
        if id(part) in seen:
            continue
        seen.add(id(part))
        left_out = part.attributes.get("_non_persistent_buffers_set") or ()
        for group in ("_parameters", "_buffers"):
            for name, value in _entries(part.attributes[group]).items():
                if value is not None and not (group == "_buffers" and name in left_out):
                    found[f"{prefix}{name}"] = value
        for name, inner in _entries(part.attributes["_modules"]).items():
            if is_module(inner):
                pending.append((f"{prefix}{name}.", inner))
    return found


def whole_module(path: Path) -> str:
    """The class of a module that a file holds whole, by the name in the file; empty where it is anything else."""
    from edgeship.program.checkpoint import open_checkpoint

    try:
        sets = weight_sets(open_checkpoint(path))
    except SourceError:
        return ""
    return next((item.module for item in sets if item.module), "")


def _entries(value: Any) -> Mapping[Any, Any]:
    """What a container holds by name; nothing of what is none."""
    if isinstance(value, PlainObject):
        return {**value.attributes, **value.entries}
    return value if isinstance(value, Mapping) else {}


def _is_tensor(value: Any) -> bool:
    import numpy as np

    # Some zoos pickle arrays of numpy.
    return isinstance(value, (TensorRecord, np.ndarray))


def _set_of(checkpoint: Checkpoint, key: str, tensors: Mapping[str, Any], module: str) -> WeightSet:
    def read(name: str) -> torch.Tensor:
        """One tensor, in its own shape."""
        value = tensors[name]
        return checkpoint.tensor(value) if isinstance(value, TensorRecord) else _of_numpy(value)

    def same(name: str) -> Any:
        value = tensors[name]
        if isinstance(value, TensorRecord):
            return (value.storage.key, value.offset, value.shape, value.strides, value.dtype)
        return id(value)

    return WeightSet(key, {name: tuple(value.shape) for name, value in tensors.items()}, read, same, module)


def _of_numpy(value: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array as a tensor of its own shape. Raises `SourceError` for types that torch lacks."""
    import torch

    try:
        return torch.from_numpy(value)
    except TypeError:
        raise SourceError(f"a weight holds {value.dtype}", fix="save it as float32") from None
