"""What lies beside the graph in a folder for onnxruntime-genai: ``genai_config.json`` and the tokenizer's files."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.errors import LoweringError
from edgeship.llm.chat import ChatTemplate
from edgeship.lowering.chat_template import genai_template
from edgeship.lowering.onnx.decoder import grouped_places, input_names

if TYPE_CHECKING:
    from edgeship.core.decoder import Decoder

GRAPH = "model.onnx"
CONFIGURATION = "genai_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
# What transformers draws with where a model says nothing.
DRAWING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
# It reads the graph's inputs and outputs from the configuration, whatever the architecture inside is: any decoder of
# text runs as this one.
KIND = "llama"


def write_configuration(folder: Path, decoder: Decoder, origin: Path, context: int) -> None:
    """Write the configuration, and copy the tokenizer and chat template.

    Args:
        origin: folder with the files of `Decoder.files`. context: positions of the cache.
    """
    heads, kv_heads, head_dim = _sizes(decoder)
    eos = list(decoder.eos) or [decoder.pad or 0]
    settings: dict[str, Any] = {
        "model": {
            "type": KIND,
            "bos_token_id": decoder.bos if decoder.bos is not None else eos[0],
            "eos_token_id": eos[0] if len(eos) == 1 else eos,
            "pad_token_id": decoder.pad if decoder.pad is not None else eos[0],
            "context_length": context,
            "vocab_size": decoder.vocabulary,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH,
                "head_size": head_dim,
                "hidden_size": decoder.hidden,
                "num_attention_heads": heads,
                "num_hidden_layers": max(len(decoder.layers), len(decoder.states)),
                "num_key_value_heads": kv_heads,
                "inputs": {
                    **{name: name for name in input_names(decoder)[:3]},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False, "early_stopping": True, "max_length": context, "min_length": 0, "num_beams": 1,
            "num_return_sequences": 1, "past_present_share_buffer": shares_buffers(decoder), "repetition_penalty": 1.0,
            **drawing(origin), **token_by_token(decoder),
            "length_penalty": 1.0, "diversity_penalty": 0.0, "no_repeat_ngram_size": 0,
        },
    }  # fmt: skip
    (folder / CONFIGURATION).write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
    for name in decoder.files:
        if name not in ("config.json", "generation_config.json"):
            shutil.copyfile(origin / name, folder / name)
    template = ChatTemplate.read(origin)
    if template is not None:
        # The engine takes this file before what tokenizer_config.json says. A template that cannot be written as it
        # reads them stays as it is, and check/dialogue says whether the engine makes the same text of it.
        with suppress(LoweringError):
            (folder / CHAT_TEMPLATE).write_text(genai_template(template), encoding="utf-8")


def drawing(origin: Path) -> dict[str, float]:
    """How tokens are drawn once an app asks for it with ``do_sample``: as the model's settings say, else as
    transformers does. A narrower default, such as a ``top_k`` of 1, would make what an app asks for do nothing."""
    path = origin / "generation_config.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = dict(DRAWING)
    for name in DRAWING:
        value = told.get(name)
        if isinstance(value, int | float):
            found[name] = value
    return found


def token_by_token(decoder: Decoder) -> dict[str, int]:
    """How the engine takes a prompt where the graph takes one token at a time."""
    return {"chunk_size": 1} if decoder.states else {}


def _sizes(decoder: Decoder) -> tuple[int, int, int]:
    """Heads of queries, of keys, and their width; of a model that does not attend, numbers that nothing reads."""
    first = next(iter(decoder.layers), None)
    return (1, 1, 1) if first is None else (first.heads, first.kv_heads, first.head_dim)


def shares_buffers(decoder: Decoder) -> bool:
    """Whether the engine may keep the past and the present in one place: the operator keeps every cache, all have one
    shape, for the engine allocates them by the first, and the model does not count its positions in them."""
    if decoder.states or decoder.counted:
        return False
    shapes = {(layer.kv_heads, layer.head_dim) for layer in decoder.layers}
    return len(shapes) == 1 and len(grouped_places(decoder)) == len(decoder.layers)
