"""A Hugging Face folder with a language model into a torch program: the graph first, from a model without weights.

The weights stay in the user's safetensors and are read one by one when they are needed, so that a 3B model is loaded
in the memory of its libraries. Where a checkpoint keeps them in another form than the model uses (fused experts, old
names, pickles), transformers loads them instead, and they are kept with the program.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.model import Signature, TensorSpec
from edgeship.errors import SourceError, UsageError, WeightsError
from edgeship.frontends.huggingface import check_shards
from edgeship.program.fixing import MIN_EXPORT_SNR_DB
from edgeship.program.inventory import take_inventory
from edgeship.program.normalize import export_normalised
from edgeship.program.program import REMARK, ProgramRecord, TorchProgram
from edgeship.program.stored import Overlay, Place, WeightStore, tensor_file

if TYPE_CHECKING:
    import torch

# Above this the eager model is not loaded beside the program to compare them.
MAX_COMPARED_BYTES = 1 << 30
DEFAULT_TOKENS = 128


@dataclass(frozen=True)
class LoadedDecoder:
    """A program, and the files that its weights lie in when they stay there."""

    program: TorchProgram
    files: tuple[Path, ...]


def load_decoder(
    folder: Path, tokens: int | None = None, note: str = "", *, keep: bool = False, lora: Path | None = None
) -> LoadedDecoder:
    """The program ``input_ids [1, tokens] -> logits [1, tokens, vocabulary]`` of a folder's language model.

    Args:
        keep: keep copies of the weights with the program, because the folder will not stay.
        lora: folder of a PEFT adapter that is merged into them.

    Raises:
        SourceError: no such architecture, or no tokenizer. WeightsError: weights missing or of another shape.
        UsageError: more tokens than the model has positions.
    """
    import torch

    from edgeship.llm.attention import Engine
    from edgeship.llm.models import REAL_ELEMENTS, build_hollow, describe, positions_of, read_config, settings_of
    from edgeship.llm.step import Whole
    from edgeship.llm.understanding import understand

    folder = folder.absolute()
    config = read_config(folder)
    if not (folder / "tokenizer.json").is_file():
        raise SourceError(f"{folder} has no tokenizer.json", fix="save it with tokenizer.save_pretrained(folder)")
    positions = positions_of(config)
    tokens = min(DEFAULT_TOKENS, positions) if tokens is None else tokens
    if not 1 <= tokens <= positions:
        raise UsageError(
            f"load/decoder.tokens={tokens}, and the model has {positions} positions",
            fix="give a number between",
        )
    check_shards(folder)
    found = understand(config)
    model = build_hollow(config)
    weights, files = (_load(folder, config), ()) if keep else _locate(model, folder, config)
    spec = TensorSpec("input_ids", "i64", (1, tokens), low=0, high=config.vocab_size - 1)
    example = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    _make_real(model, weights, {n for n, p in model.named_parameters() if p.numel() <= REAL_ELEMENTS})
    whole = Whole(model, Engine(found.calls))
    exported = export_normalised(whole, (example,), ("input_ids",), prefix="model")
    if folded := _missing(model, exported):
        # Tables of positions are looked up while exporting: they must hold their values by then.
        _make_real(model, weights, folded)
        exported = export_normalised(whole, (example,), ("input_ids",), prefix="model")
    floats, tied = _weights_of(exported, model, weights, folded)
    if lora is not None:
        floats = _adapted(lora, model, weights, floats, exported)
    record = ProgramRecord(
        Signature((spec,), (TensorSpec("logits", "f32", (1, tokens, config.vocab_size)),)),
        take_inventory(exported),
        aliases=tied,
        history=(*((note,) if note else ()), *(f"{REMARK}{line}" for line in found.notes)),
        decoder=describe(config, found, folder),
    )
    if "auto_map" in settings_of(folder):
        remark = f"{REMARK}the folder's own model code was not run: this is transformers' {config.model_type}"
        record = replace(record, history=(*record.history, remark))
    program = TorchProgram(exported, floats, {}, record, folder)
    size = 4 * record.inventory.parameters
    if lora is None and size <= MAX_COMPARED_BYTES:
        _compare(program, folder, example)
    elif lora is None:
        remark = f"{REMARK}{size / 1e9:.1f} GB: the export was not compared with the eager model"
        program.record = replace(record, history=(*record.history, remark))
    return LoadedDecoder(program, files)


def _locate(model: torch.nn.Module, folder: Path, config: Any) -> tuple[Mapping[str, torch.Tensor], tuple[Path, ...]]:
    """Where each parameter lies in the folder's safetensors; the weights themselves when they do not lie as they are
    used.

    Names to tensors of any shape.
    """
    files = {key: file for file in sorted(folder.glob("*.safetensors")) for key in tensor_file(file)}
    turned: Mapping[str, str] = model.edgeship_transposed  # type: ignore[assignment]
    base = f"{model.base_model_prefix}."  # type: ignore[str-bytes-safe]
    prefix, own = inner_prefix([name for name, _ in model.named_parameters()], base, files)
    places: dict[str, Place] = {}
    for name, parameter in model.named_parameters():
        inside = prefix + name.removeprefix(own)
        key = next((key for key in (inside, name, name.removeprefix(base)) if key in files), None)
        shape = tuple(parameter.shape[::-1] if name in turned else parameter.shape)
        if key is None or tensor_file(files[key]).shape(key) != shape:
            return _load(folder, config), ()
        places[name] = Place(files[key], key, name in turned, kept=False)
    _check_ties(model, places, files)
    return WeightStore(places), tuple(sorted({place.file for place in places.values()}))


def inner_prefix(names: Sequence[str], base: str, keys: Collection[str]) -> tuple[str, str]:
    """Where a language model lies in a checkpoint that may be of a larger one, with a part that sees or hears.

    Args:
        names: of its parameters. base: what most of them begin with. keys: of the checkpoint.

    Returns:
        What stands in the checkpoint before its names, and what stands in the model instead. Both are empty where the
        checkpoint is its own.
    """
    best, most = ("", ""), sum(name in keys or name.removeprefix(base) in keys for name in names)
    for own in ("", base):
        tail = names[0].removeprefix(own)
        for prefix in sorted(key.removesuffix(tail) for key in keys if key.endswith(f".{tail}")):
            found = sum(prefix + name.removeprefix(own) in keys for name in names)
            if found > most:
                best, most = (prefix, own), found
    return best


def _check_ties(model: torch.nn.Module, places: Mapping[str, Place], files: Mapping[str, Path]) -> None:
    """A tied weight that is stored twice must be the same twice."""
    import numpy as np

    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in places or name not in files:
            continue
        first = next(other for other, held in model.named_parameters() if held is parameter)
        one, two = tensor_file(places[first].file), tensor_file(files[name])
        rows = max(1, (1 << 22) // max(1, int(np.prod(parameter.shape[1:]))))
        for start in range(0, parameter.shape[0], rows):
            if not np.array_equal(
                one.read(places[first].key, start, start + rows), two.read(name, start, start + rows)
            ):
                raise WeightsError(
                    f"config.json ties {name} to {first}, and the folder holds two different ones",
                    fix="set tie_word_embeddings to false, or save the model again",
                )


def _load(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """All weights through transformers, by their names in plain modules. Names to tensors of any shape."""
    from edgeship.llm.modules import make_plain

    model = _eager(folder, config)
    make_plain(model)
    return {name: value.detach() for name, value in model.named_parameters()}


def _eager(folder: Path, config: Any) -> Any:
    import torch
    import transformers

    from edgeship.llm.models import build_as_written

    hollow = build_as_written(config)
    keys = {key for file in sorted(folder.glob("*.safetensors")) for key in tensor_file(file)}
    names = [name for name, _ in hollow.named_parameters()]
    prefix, own = inner_prefix(names, f"{hollow.base_model_prefix}.", keys)
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, local_files_only=True, dtype=torch.float32, output_loading_info=True,
            trust_remote_code=False, key_mapping={f"^{re.escape(prefix)}": own} if prefix else None,
        )  # fmt: skip
    except Exception as error:  # safetensors, JSON, shape and config errors of many types
        raise WeightsError(
            f"{folder} cannot be loaded: {' '.join(str(error).split())[:240]}", fix="download the folder again"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise WeightsError(f"{folder} lacks the weight {missing[0]}", fix="download the folder again")
    return model.eval()


def _make_real(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], names: set[str]) -> None:
    """Give parameters of a hollow model their values. ``weights``: names to tensors of any shape."""
    import torch

    for name in names:
        owner, _, leaf = name.rpartition(".")
        value = torch.nn.Parameter(weights[name].float(), requires_grad=False)
        old = getattr(model.get_submodule(owner), leaf)
        for module in model.modules():
            for held, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if parameter is old:
                    setattr(module, held, value)


def _missing(model: torch.nn.Module, exported: Any) -> set[str]:
    """Parameters that the program has under none of their names."""
    found = {id(held) for name, held in _all_parameters(model).items() if name in exported.state_dict}
    return {name for name, held in model.named_parameters() if id(held) not in found}


def _all_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by every name they have: tied ones have several."""
    return dict(model.named_parameters(remove_duplicate=False))


def _weights_of(
    exported: Any, model: torch.nn.Module, weights: Mapping[str, torch.Tensor], folded: set[str]
) -> tuple[Mapping[str, torch.Tensor], dict[str, str]]:
    """The program's weights by the program's names, and which of those names are tied to an earlier one.

    Those of ``folded`` are kept too: a step at any position needs the whole table.

    Names to tensors of any shape.
    """
    main = {id(held): name for name, held in model.named_parameters()}
    held = {name: main[id(value)] for name, value in _all_parameters(model).items() if id(value) in main}
    first: dict[str, str] = {}
    tied: dict[str, str] = {}
    places: dict[str, Place] = {}
    values: dict[str, torch.Tensor] = {}
    for name in sorted(folded):
        if isinstance(weights, WeightStore):
            places[name] = weights.places[name]
        else:
            values[name] = weights[name]
    for name, value in exported.state_dict.items():
        source = held.get(name)
        if source is None:
            values[name] = value.detach()
        elif source in first:
            tied[name] = first[source]
        else:
            first[source] = name
            if isinstance(weights, WeightStore):
                places[name] = weights.places[source]
            else:
                values[name] = weights[source]
    return (Overlay(WeightStore(places), values) if places else values), tied


def _adapted(
    folder: Path,
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    floats: Mapping[str, torch.Tensor],
    exported: Any,
) -> Mapping[str, torch.Tensor]:
    """The program's weights with an adapter merged into them."""
    from edgeship.frontends.lora import Merged, read_adapter

    parameters = _all_parameters(model)
    adapter = read_adapter(folder, {name: tuple(held.shape) for name, held in parameters.items()})
    # A weight may have another of its names in the program.
    own = {id(parameters[name]): name for name in floats if name in parameters}
    names = {own[id(parameters[name])]: name for name in adapter.pairs if id(parameters[name]) in own}
    return Overlay(floats, Merged(floats, adapter, names))


def _compare(program: TorchProgram, folder: Path, example: torch.Tensor) -> None:
    """The program answers as transformers' own model does, by transformers' own attention.

    ``example``: token ids [1, T].
    """
    import torch
    import transformers

    from edgeship.llm.models import settings_of
    from edgeship.program.streamed import run_streamed

    config = transformers.AutoConfig.for_model(**settings_of(folder))
    model = _eager(folder, getattr(config, "text_config", config))
    with torch.no_grad():
        wanted = model(input_ids=example, use_cache=False).logits.double()
    # Gone before the program's own weights are read, and those one by one: together they are the peak of the build.
    del model
    found = torch.from_numpy(run_streamed(program, [{"input_ids": example.numpy()}])[0]["logits"]).double()
    if not torch.isfinite(wanted).all():
        raise WeightsError(f"{folder}: the model answers NaN or infinity", fix="check its weights, or train it again")
    noise, signal = float((wanted - found).pow(2).mean()), float(wanted.pow(2).mean())
    if not noise <= signal * 10 ** (-MIN_EXPORT_SNR_DB / 10):
        raise SourceError(f"{folder}: the exported model answers differently", fix="report this as a bug")
