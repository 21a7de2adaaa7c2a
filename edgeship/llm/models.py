"""Read a decoder's folder and build its module without its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.decoder import DEFAULT_CONTEXT, LEAST_CONTEXT, AttentionCall, AttentionLayer, Decoder, FixedState
from edgeship.core.records import suggest
from edgeship.errors import SourceError, UnsafeSourceError
from edgeship.llm.chat import ChatTemplate

if TYPE_CHECKING:
    import torch

# Norms, biases and scalars are real in a hollow model: the exporter may fold them.
REAL_ELEMENTS = 1 << 16
# Where configurations say how many positions there are.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
SPECIAL = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
ORIGIN_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class Understanding:
    """See `edgeship.core.decoder.Decoder` for what each is.

    Args:
        notes: for the report: which layers stay in the model's own operators, and why.
    """

    layers: tuple[AttentionLayer, ...]
    calls: tuple[AttentionCall, ...]
    counted: bool = False
    masked: bool = False
    told: bool = True
    fixed: str = ""
    growing: str = ""
    states: tuple[FixedState, ...] = ()
    notes: tuple[str, ...] = ()


def read_config(folder: Path) -> Any:
    """The configuration of a folder's decoder, with edgeship's attention chosen.

    Raises:
        SourceError: unreadable, or an architecture that nobody here knows. UnsafeSourceError: the folder brings code.
    """
    import transformers

    from edgeship.compat import openelm
    from edgeship.compat.transformers import decoder_kinds, list_by_architecture
    from edgeship.compat.transformers_attention import choose_attention, choose_batched_experts
    from edgeship.llm import attention

    attention.register()
    openelm.register()
    try:
        data = settings_of(folder)
        kind = str(data["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{folder / 'config.json'} cannot be read: {error!r}", fix="download it again") from None
    if kind not in decoder_kinds():
        list_by_architecture(kind, [str(name) for name in data.get("architectures") or ()])
    known = decoder_kinds()
    if kind not in known:
        if "auto_map" in data:
            raise UnsafeSourceError(f"{folder} brings its own model code", fix="edgeship runs no code from a folder")
        raise SourceError(
            f"{folder}: transformers {transformers.__version__} knows no language model of type {kind!r}",
            fix=suggest(kind, sorted(known)),
        )
    data.pop("auto_map", None)
    try:
        config = transformers.AutoConfig.for_model(**data)
    except Exception as error:  # strict dataclasses raise errors of their own
        raise SourceError(f"{folder / 'config.json'}: {' '.join(str(error).split())[:200]}", fix="mend it") from None
    config = getattr(config, "text_config", config)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SourceError(
            f"{folder}: transformers makes no model of the {config.model_type} inside of {kind} by itself",
            fix="build the whole as a network, with --input",
        )
    choose_attention(config, attention.NAME)
    choose_batched_experts(config)
    return config


def settings_of(folder: Path) -> dict[str, Any]:
    """``config.json`` as transformers reads it, which writes infinities as ``{"__float__": "Infinity"}``.

    Raises:
        OSError, ValueError: it cannot be read. TypeError: it holds no object.
    """
    read = json.loads((folder / "config.json").read_text(encoding="utf-8"), object_hook=_special_number)
    if not isinstance(read, dict):
        raise TypeError(f"a {type(read).__name__} where settings should be")
    return read


def _special_number(read: dict[str, Any]) -> Any:
    """The number that an object stands for; other objects as they are."""
    told = read.get("__float__")
    return SPECIAL[told] if len(read) == 1 and told in SPECIAL else read


def build_hollow(config: Any) -> torch.nn.Module:
    """The model of a configuration; each large parameter is a single zero, seen from everywhere.

    Buffers, which are computed and not learned, are real.
    """
    from edgeship.llm.modules import make_plain

    model = build_as_written(config)
    model.edgeship_transposed = make_plain(model)  # type: ignore[assignment]
    return model


def build_as_written(config: Any) -> torch.nn.Module:
    """As `build_hollow`, with transformers' own modules."""
    import torch
    import transformers

    from edgeship.compat.torch import on_meta_device
    from edgeship.compat.transformers_attention import attend_by_torch, classes_by_name
    from edgeship.llm.attention import NAME

    with on_meta_device(), classes_by_name(config, NAME):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    hollow: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, held in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(held) not in hollow:
                zero = torch.zeros(()).expand(held.shape)
                hollow[id(held)] = torch.nn.Parameter(zero, requires_grad=False)
            setattr(module, name, hollow[id(held)])
    model.eval()
    model.tie_weights()
    model.config.use_cache = True
    attend_by_torch(model)
    return model  # type: ignore[no-any-return]


def describe(config: Any, found: Understanding, folder: Path) -> Decoder:
    """The record of a decoder.

    Args:
        found: what a probe of its model showed.
        folder: for the tokenizer's files and the generation settings.
    """
    settings = folder / "generation_config.json"
    told: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    eos = told.get("eos_token_id", getattr(config, "eos_token_id", None))
    if not isinstance(eos, list):
        eos = [] if eos is None else [eos]
    return Decoder(
        config.model_type,
        found.layers,
        int(config.hidden_size),
        int(config.vocab_size),
        positions_of(config),
        bos=_token(told.get("bos_token_id", getattr(config, "bos_token_id", None))),
        eos=_ends(eos, folder),
        pad=_token(told.get("pad_token_id", getattr(config, "pad_token_id", None))),
        files=tuple(name for name in ORIGIN_FILES if (folder / name).is_file()),
        calls=found.calls,
        counted=found.counted,
        masked=found.masked,
        told=found.told,
        fixed=found.fixed,
        growing=found.growing,
        states=found.states,
    )


def positions_of(config: Any) -> int:
    """How many positions a model was made for: what its configuration says under one of the names for it. Models that
    bias scores by distance may say nothing; they get the usual context."""
    told = {name: getattr(config, name, None) for name in POSITIONS}
    found = {name: count for name, count in told.items() if isinstance(count, int) and count > 0}
    name, count = next(iter(found.items()), ("", DEFAULT_CONTEXT))
    if count < LEAST_CONTEXT:
        raise SourceError(
            f"config.json says that {name} is {count}, which leaves no text to go on with", fix="correct it there"
        )
    return count


def _ends(told: Sequence[Any], folder: Path) -> tuple[int, ...]:
    """The tokens that end a text: those that the settings name, and the one that ends an answer in the model's chat
    template, which settings often leave out."""
    template = ChatTemplate.read(folder)
    turn = template.added.get(template.turn_end()) if template is not None else None
    return tuple(dict.fromkeys([int(token) for token in told] + ([] if turn is None else [turn])))


def _token(value: Any) -> int | None:
    found = value[0] if isinstance(value, list) else value
    return None if found is None else int(found)
