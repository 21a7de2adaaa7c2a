"""Make a `TorchProgram` from an eager module and check that it still answers as the module did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeship.core.model import NUMPY_DTYPES, Dtype, Signature, TensorSpec
from edgeship.core.names import clean_names, quoted
from edgeship.core.renames import named_outputs
from edgeship.errors import EdgeshipError, LimitError, SourceError, WeightsError, meaning_of
from edgeship.program.chosen import counted_outputs
from edgeship.program.ends import check_ends, end_at
from edgeship.program.expected import Expected
from edgeship.program.fixing import export_whole
from edgeship.program.inventory import take_inventory
from edgeship.program.program import REMARK, ProgramRecord, TorchProgram
from edgeship.program.ranges import with_ranges
from edgeship.program.sizes import guarded_sizes
from edgeship.program.suppression import CANDIDATES, check_candidates

if TYPE_CHECKING:
    import torch

# Tracing takes milliseconds a layer, and passes walk the graph many times: with more it would take hours.
MAX_LAYERS = 50_000


def make_program(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    examples: Sequence[torch.Tensor],
    *,
    call: Callable[..., Any] | None = None,
    output_names: Sequence[str] = (),
    own_names: Sequence[str] = (),
    note: str = "",
    cut: Sequence[str] = (),
    candidates: int = CANDIDATES,
) -> TorchProgram:
    """Export ``module`` in normal form and take stock of it.

    Args:
        inputs: names, dtypes and shapes, in the order of ``examples``. Names that some runtime does not take are
            cleaned; the signature's `TensorSpec.source` and the history keep what they were.
        call: how to call the module: ``call(module, *tensors)`` returning a tensor or a tuple of tensors; by default
            ``module(*tensors)``.
        output_names: names for the outputs, in order, or ``OLD=NEW`` for some of them.
        own_names: what the source calls its outputs; keys of a dict, or ``output``, ``output_1`` ... when not given.
        cut: where the model ends instead of at its outputs: modules, or nodes of its graph (`ends`).
        candidates: how many boxes go into one suppression (`suppression`).

    Raises:
        WeightsError: a weight is not finite. SourceError: not exportable, the model draws random numbers, or the export
            answers differently. OpenSizeError: values decide a size or a branch, and it cannot be made fixed.
        UsageError: ``cut`` names nothing of the model, or leaves nothing that depends on an input.
    """
    import torch

    module = module.float().eval()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        # HF keeps masks full of -inf as buffers on purpose; parameters never are.
        bad = torch.isnan(tensor).any() if tensor.is_floating_point() else torch.tensor(False)
        if isinstance(tensor, torch.nn.Parameter):
            bad = bad | torch.isinf(tensor).any()
        if bool(bad):
            raise WeightsError(f"weight {name} holds NaN or infinity", fix="train or export the model again")
    layers = sum(1 for _ in module.modules())
    if layers > MAX_LAYERS:
        raise LimitError(f"the model has {layers} layers, {MAX_LAYERS} at most", fix="give a smaller model")
    check_candidates(candidates)
    if cut:
        with guarded_sizes():
            module, call = _ended(module, call, inputs, examples, cut)
    wrapper = _Wrapper(module, call)
    with torch.no_grad(), guarded_sizes():
        try:
            # A model may write into what it is given.
            result = wrapper.answer(*(example.clone() for example in examples))
        except Exception as error:
            raise does_not_run(inputs, error) from error
    if not _tensors(result):
        raise SourceError("the model returns no tensor", fix="let forward return a tensor, or a tuple or dict of them")
    for value in _tensors(result):
        dtype_of(value)
    expected: dict[str, Expected] = {}
    names = tuple(spec.name for spec in inputs)
    whole = export_whole(wrapper, result, examples, names, candidates, expected)
    exported, wanted = whole.exported, whole.wanted
    if cut:
        check_ends(_uses_inputs(exported), cut)
    with torch.no_grad():
        found = exported.module()(*examples)
    # A name that the user changed is told with the one it had.
    renamed = any("=" in text for text in output_names)
    own = whole.names(own_names or _keys(result) if renamed else output_names or own_names or _keys(result))
    made = named_outputs(output_names, own) if renamed else own
    for index, name in enumerate(made[: len(wanted)]):
        if not whole.same(name, index, found):
            raise _changed(name, index, wrapper, examples)
    dtypes = [dtype_of(value) for value in (*wanted, *found[len(wanted) :])]
    outputs = tuple(
        TensorSpec(name, dtype, tuple(value.shape), source=None if old == name else old)
        for name, old, dtype, value in zip(made, own, dtypes, found, strict=True)
    )
    signature = _with_clean_names(Signature(tuple(inputs), outputs), set(exported.state_dict))
    record = ProgramRecord(
        replace(signature, inputs=with_ranges(signature.inputs, exported)),
        take_inventory(exported),
        aliases=_aliases(exported),
        expected=expected,
        counted=counted_outputs(signature, whole.told, len(wanted)),
        history=(*((note,) if note else ()), *_renamed(signature), *whole.remarks(signature)),
    )
    weights = {name: value.detach() for name, value in exported.state_dict.items() if name not in record.aliases}
    return TorchProgram(exported, weights, {}, record)


def _with_clean_names(signature: Signature, weights: set[str]) -> Signature:
    """The signature in names that every runtime takes: no two alike, none changed into that of a weight."""
    inputs = clean_names([spec.name for spec in signature.inputs], "input", avoided=weights)
    outputs = clean_names([spec.name for spec in signature.outputs], "output", taken=inputs, avoided=weights)
    return Signature(
        tuple(_named(spec, name) for spec, name in zip(signature.inputs, inputs, strict=True)),
        tuple(_named(spec, name) for spec, name in zip(signature.outputs, outputs, strict=True)),
    )


def _named(spec: TensorSpec, name: str) -> TensorSpec:
    return spec if name == spec.name else replace(spec, name=name, source=spec.source or spec.name)


def _renamed(signature: Signature) -> tuple[str, ...]:
    """What the report says of names that are others in the artifacts."""
    pairs = [f"{quoted(spec.source)} is {spec.name}" for spec in (*signature.inputs, *signature.outputs) if spec.source]
    return (f"{REMARK}names in the artifacts: {', '.join(pairs)}",) if pairs else ()


def does_not_run(inputs: Sequence[TensorSpec], error: Exception) -> EdgeshipError:
    """What a user reads when the model fails on inputs of these shapes."""
    if isinstance(error, EdgeshipError):
        return error
    limit = meaning_of(error)
    if limit is not None:
        return limit
    on = f" on {', '.join(map(str, inputs))}" if inputs else ""
    return SourceError(
        f"the model does not run{on}: {' '.join(str(error).split())[:300]}",
        fix="give its inputs with --input name:dtype[sizes]",
    )


def dtype_of(value: torch.Tensor) -> Dtype:
    """The short dtype name of a tensor. Raises `SourceError` for dtypes no runtime takes. Any shape."""
    name = str(value.dtype).removeprefix("torch.")
    for short, numpy_name in NUMPY_DTYPES.items():
        if numpy_name == name:
            return short  # type: ignore[return-value]
    raise SourceError(
        f"a tensor of dtype {name} cannot be a model's input or output", fix="cast it to float32 or int32"
    )


class _Wrapper:
    """Made a module class at first use, so that importing this file does not import torch."""

    def __new__(cls, module: torch.nn.Module, call: Callable[..., Any] | None) -> Any:
        import torch

        class Flat(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = module

            def answer(self, *tensors: torch.Tensor) -> Any:
                """Inputs by position, of any shape; outputs as the module returns them."""
                return self.model(*tensors) if call is None else call(self.model, *tensors)

            def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                """Inputs by position, outputs as a flat tuple, each in its own shape."""
                return _tensors(self.answer(*tensors))

        return Flat().eval()


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of an answer, however it nests them."""
    import torch

    from edgeship.compat.torch import leaves_of

    return tuple(leaf for leaf in leaves_of(result) if isinstance(leaf, torch.Tensor))


def _keys(result: Any) -> list[str]:
    """The module's own names of its outputs: keys of a dict, fields of a named tuple, keys of each dict in a list; none
    where it nests further."""
    if isinstance(result, (list, tuple)) and result and all(isinstance(item, Mapping) for item in result):
        several = len(result) > 1
        named: Mapping[Any, Any] = {}
        for place, item in enumerate(result):
            named = {**named, **{f"{key}_{place}" if several else key: value for key, value in item.items()}}
    else:
        named = result if isinstance(result, Mapping) else getattr(result, "_asdict", dict)()
    held = {key: _tensors(value) for key, value in named.items()}
    if any(not isinstance(key, str) or (found and found[0] is not named[key]) for key, found in held.items()):
        return []
    return [key for key, found in held.items() if found]


def _uses_inputs(exported: torch.export.ExportedProgram) -> bool:
    """Whether a result of a program depends on an input."""
    inputs = set(exported.graph_signature.user_inputs)
    return any(node.op == "placeholder" and node.name in inputs and node.users for node in exported.graph.nodes)


def _ended(
    module: torch.nn.Module,
    call: Callable[..., Any] | None,
    inputs: Sequence[TensorSpec],
    examples: Sequence[torch.Tensor],
    cut: Sequence[str],
) -> tuple[torch.nn.Module, Callable[..., Any] | None]:
    try:
        return end_at(module, call, examples, cut)
    except EdgeshipError:
        raise
    except Exception as error:
        raise does_not_run(inputs, error) from error


def _aliases(exported: torch.export.ExportedProgram) -> dict[str, str]:
    """Names that share storage with an earlier name."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    aliases: dict[str, str] = {}
    for name, value in exported.state_dict.items():
        if value.numel() == 0:
            continue
        key = (value.data_ptr(), tuple(value.shape))
        if key in first:
            aliases[name] = first[key]
        first.setdefault(key, name)
    return aliases


def _changed(name: str, index: int, wrapper: Any, examples: Sequence[torch.Tensor]) -> SourceError:
    """Why an output of the export is not the module's: the module itself may not answer the same twice.

    ``examples`` have the shapes of the inputs.
    """
    import torch

    from edgeship.compat.torch import seeded

    def answer(seed: int) -> torch.Tensor:
        with torch.no_grad(), seeded(seed):
            found: torch.Tensor = wrapper(*(example.clone() for example in examples))[index]
        return found

    first, again, other = answer(1), answer(1), answer(2)
    if not torch.equal(first, again):
        return SourceError(
            f"the model keeps something from call to call: output {name} differs between two runs on the same input "
            "with the same random numbers",
            fix="let forward begin anew each time: no list it appends to, no counter, no random numbers but torch's",
        )
    if torch.equal(again, other):
        return SourceError(f"output {name} changed when the model was exported", fix="report this as a bug")
    return SourceError(
        f"the model uses random numbers: output {name} differs between two runs on the same input",
        fix="switch dropout and noise off in eval mode, or make the noise an input",
    )
