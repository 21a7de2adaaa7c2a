"""An ``nn.Module`` that lies in memory, as a program in normal form. The module itself stays as it is."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.model import TensorSpec
from edgeship.errors import SourceError, UsageError
from edgeship.program.suppression import CANDIDATES

if TYPE_CHECKING:
    import torch

    from edgeship.program.program import TorchProgram

_INPUTS = 'give inputs=example, inputs={"image": example}, or inputs="image:f32[1,3,224,224]"'


def program_of_module(
    module: torch.nn.Module,
    inputs: Any,
    outputs: Sequence[str],
    notes: Mapping[str, Mapping[str, Any]],
    *,
    note: str,
    cut: Sequence[str] = (),
    candidates: int = CANDIDATES,
) -> TorchProgram:
    """Export a module on the user's own examples, or on drawn ones of the sizes that were given.

    Args:
        inputs: an example, several, a dict of them by name, or specifications as text. outputs: names, in order.
        notes: what is known of each input, by name. cut, candidates: see `make_program`.

    Raises:
        SourceError: it cannot be copied or exported, or its weights lie nowhere. UsageError: inputs of another form.
    """
    from edgeship.data.specs import with_notes
    from edgeship.program.export import make_program

    specs, examples = examples_of(module, inputs)
    call = _by_name(module, [spec.name for spec in specs])
    with for_export(module) as copied:
        return make_program(
            copied,
            with_notes(specs, notes),
            examples,
            call=call,
            output_names=outputs,
            note=note,
            cut=cut,
            candidates=candidates,
        )


def examples_of(module: torch.nn.Module, inputs: Any) -> tuple[list[TensorSpec], list[torch.Tensor]]:
    """Specifications and one example tensor for each input; what has no name is called as ``forward`` calls it."""
    from edgeship.data.specs import check_size, example_tensors, parse_input, parse_inputs

    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, Sequence) and inputs and all(isinstance(item, str) for item in inputs):
        parsed = parse_inputs(inputs)
        return parsed, list(example_tensors(parsed))
    if not isinstance(inputs, Mapping):
        values = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        inputs = dict(zip(_names_for(module, len(values)), values, strict=True))
    if not inputs:
        raise UsageError("inputs is empty", fix=_INPUTS)
    specs: list[TensorSpec] = []
    tensors: list[torch.Tensor] = []
    for name, value in inputs.items():
        if isinstance(value, str):
            spec = parse_input(f'"{name}":{value}')
            (tensor,) = example_tensors([spec])
        else:
            spec, tensor = _example(str(name), value)
            check_size(spec)
        specs.append(spec)
        tensors.append(tensor)
    return specs, tensors


def _example(name: str, value: Any) -> tuple[TensorSpec, torch.Tensor]:
    """An example as a tensor of the dtype that artifacts take: floats of any width become float32."""
    import torch

    from edgeship.data.specs import example_dtype

    try:
        tensor = value.detach().cpu() if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"the input {name} is of type {type(value).__name__}, not an example: {reason}", fix=_INPUTS
        ) from None
    dtype = example_dtype(name, tensor)
    if dtype == "f32":
        tensor = tensor.float()
    return TensorSpec(name, dtype, tuple(tensor.shape)), tensor.clone()


def _parameters(module: torch.nn.Module) -> dict[str, inspect.Parameter]:
    """What ``forward`` takes, by name; nothing where that cannot be told."""
    try:
        found = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return {}
    return {name: item for name, item in found.items() if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)}


def _names_for(module: torch.nn.Module, count: int) -> list[str]:
    """Names for examples without one: those of the parameters, then ``input``, ``input_1`` ..."""
    names = [name for name, item in _parameters(module).items() if item.kind != item.KEYWORD_ONLY][:count]
    for place in range(len(names), count):
        names.append(f"input_{place}" if place else "input")
    return names


def _by_name(module: torch.nn.Module, names: Sequence[str]) -> Any:
    """How to call the module: by keyword where every name is one of its parameters, else in order (None).

    Raises:
        UsageError: a name is a parameter's, but stands in another place than that.
    """
    parameters = _parameters(module)
    known = list(parameters)
    if set(names) <= set(known):
        by_place = [name for name, item in parameters.items() if item.kind is not item.KEYWORD_ONLY]
        if list(names) == by_place[: len(names)]:
            return None
        return lambda module, *tensors: module(**dict(zip(names, tensors, strict=True)))
    for place, name in enumerate(names):
        if name in known and known.index(name) != place:
            raise UsageError(
                f"the input {name} is number {known.index(name) + 1} of forward, and is given as number {place + 1}",
                fix=f"give them in the order {', '.join(known)}, or all by these names",
            )
    return None


@contextmanager
def for_export(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A module to evaluate on the CPU in float32: a copy that shares the tensors which are so already.

    Raises:
        SourceError: tensors without numbers (meta, lazy), TorchScript, or a module that can neither be copied nor used.
    """
    import torch

    title = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise SourceError(
            f"{title} is TorchScript, which torch.export does not take",
            fix="give the module it is from, or save it with torch.jit.save and give the file",
        )
    memo: dict[int, Any] = {}
    moved = False
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise SourceError(f"{title}: {name} has no shape yet", fix="run the module once, then build it")
        if tensor.is_meta:
            raise SourceError(
                f"{title}: {name} is on the meta device and holds no numbers", fix="load its weights first"
            )
        fits = tensor.device.type == "cpu" and (not tensor.is_floating_point() or tensor.dtype == torch.float32)
        memo[id(tensor)] = tensor if fits else _moved(tensor)
        moved = moved or not fits
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:  # whatever a module's own attributes raise
        if moved:
            reason = " ".join(str(error).split())[:200]
            raise SourceError(
                f"{title} cannot be copied to the CPU in float32: {reason}", fix='give module.to("cpu").float()'
            ) from error
        with _evaluating(module):
            yield module
        return
    yield copied


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    found = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return torch.nn.Parameter(found, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else found


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """A module in evaluation mode for a while; each of its parts is then what it was."""
    before = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in before:
            part.training = training


def write_pretrained(model: Any, tokenizer: Any, folder: Path) -> Path:
    """A model object of transformers as the folder that it is saved as, its tokenizer beside it.

    Raises:
        SourceError: transformers does not write it.
    """
    place = folder / "model"
    try:
        model.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
    except Exception as error:  # of transformers, safetensors and the disk
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{type(model).__name__} cannot be saved: {reason}", fix="save it, and give the folder"
        ) from error
    return place
