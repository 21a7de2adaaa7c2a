"""The modules that are exported: a whole text without a cache (the reference), and a step with explicit caches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from edgeship.core.decoder import Decoder, FixedState
from edgeship.errors import UnsupportedOpError
from edgeship.llm.attention import PLAIN, Engine, Form, computed_by
from edgeship.llm.cache import FixedCache, Key, KeysAndValues, Write, write_by_select


class Whole(torch.nn.Module):
    """``tokens [1, T] -> logits [1, T, vocabulary]``: the model as it is defined, without a cache."""

    def __init__(self, model: torch.nn.Module, engine: Engine | None = None) -> None:
        super().__init__()
        self.model, self.engine = model, engine or Engine()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after each token."""
        with computed_by(self.engine), as_it_was(self.model):
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


class Step(torch.nn.Module):
    """One step with caches as inputs and outputs.

    ``(tokens [1, T], position [], k_0 .. k_n, v_0 .. v_n) -> (logits [1, T, vocabulary], k_0 .. v_n)`` with caches
    ``[1, kv_heads, L, head_dim]``. Rows beyond the last real token may hold anything: they are masked by position, and
    written over before a token may see them.

    Args:
        logits: False leaves the head out (and all that only the head reads), as a prefill step wants.
    """

    def __init__(
        self, model: Any, decoder: Decoder, *, logits: bool = True, write: Write = write_by_select, form: Form = PLAIN
    ) -> None:
        super().__init__()
        self.model, self.decoder = model, decoder
        self.logits, self.write, self.form = logits, write, form

    def forward(self, tokens: torch.Tensor, position: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run ``T`` tokens from ``position`` on."""
        count = len(self.decoder.layers)
        cache = fixed_cache(self.decoder, caches[:count], caches[count:], position.reshape(()), self.write)
        with computed_by(Engine(self.decoder.calls, self.form)):
            answer = run(self.model, tokens, cache, cache.position, logits=self.logits)
        head = () if answer is None else (answer,)
        return (*head, *cache.keys, *cache.values)


def fixed_cache(
    decoder: Decoder,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    position: torch.Tensor,
    write: Write,
    states: Sequence[torch.Tensor] = (),
) -> FixedCache:
    """A decoder's caches of fixed length, as its model names and counts them.

    Args:
        states: those of `Decoder.states`, of their shapes.
    """
    cache = FixedCache(keys, values, position, write, decoder.numbers, counted=decoder.counted)
    cache.masked, cache.told = decoder.masked, decoder.told
    cache.states, cache.held = states_by_key(decoder, states), held_names(decoder.states)
    return cache


def states_by_key(decoder: Decoder, states: Sequence[torch.Tensor]) -> dict[Key, torch.Tensor]:
    """States as a cache has them, in copies: models change them in place.

    Shapes are those of `Decoder.states`.
    """
    return {state.key: held.clone() for state, held in zip(decoder.states, states, strict=True)}


def held_names(states: Sequence[FixedState]) -> dict[Key, str]:
    """The attributes in which layers keep states themselves."""
    return {state.key: state.name for state in states if state.name}


def _own_values(module: torch.nn.Module) -> dict[str, Any]:
    """Attributes of a module itself and its buffers, by name."""
    return {**dict(module.named_buffers(recurse=False, remove_duplicate=False)), **vars(module)}


@contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """After the block, tensors in attributes of modules are what they were before it: some layers keep states there."""
    kept = [(module, _own_values(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, before in kept:
            now = _own_values(module)
            changed = [name for name, value in now.items() if isinstance(value, torch.Tensor)]
            for name in changed:
                if name not in before:
                    delattr(module, name)
                elif now[name] is not before[name]:
                    setattr(module, name, before[name])


@contextmanager
def holding(model: torch.nn.Module, cache: KeysAndValues, *, restored: bool = True) -> Iterator[None]:
    """Layers that keep states in themselves have those of the cache inside the block; the cache takes them back.

    Args:
        restored: whether the layers have none after it.
    """
    with as_it_was(model) if restored else nullcontext():
        for key, name in cache.held.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, cache.states[key])
        yield
        for key, name in cache.held.items():
            owner, _, leaf = name.rpartition(".")
            cache.states[key] = getattr(model.get_submodule(owner), leaf)


def refuse_states(decoder: Decoder, engine: str) -> None:
    """Raise `UnsupportedOpError` for a model whose layers keep more than keys and values, where ``engine`` holds only
    those."""
    if decoder.states:
        first = decoder.states[0]
        what = "the last inputs of a convolution" if first.form == "conv" else "a recurrent state"
        layer = f"layer {first.name.rpartition('.')[0] or first.layer} of {decoder.family}"
        raise UnsupportedOpError(
            f"{engine} holds keys and values alone, and {layer} keeps {what}",
            fix="build it for --runtime genai or litert-lm",
        )


def run(
    model: Any, tokens: torch.Tensor, cache: KeysAndValues, position: Any, *, logits: bool = True, restored: bool = True
) -> torch.Tensor | None:
    """Run a transformers decoder over a cache; the logits, or None without its head.

    Args:
        tokens: ``[1, T]``. position: of the first of them, a number or a scalar tensor. restored: see `holding`.
    """
    places = (torch.arange(tokens.shape[1]) + position)[None]
    inputs: dict[str, Any] = {
        "input_ids": tokens,
        **(takes_positions(model, places) if cache.told else {}),
        cache_name(model): cache,
        "use_cache": True,
    }
    if cache.masked:
        inputs["attention_mask"] = torch.ones((1, cache.get_mask_sizes(tokens.shape[1], 0)[0]), dtype=torch.int64)
    with holding(model, cache, restored=restored):
        if logits:
            found: torch.Tensor = model(**inputs).logits
            return found
        base = getattr(model, model.base_model_prefix)
        base(**inputs)
    return None


def cache_name(model: Any) -> str:
    """By which a model takes its cache."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def takes_positions(model: Any, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model is told of positions ``[1, T]``: nothing when it does not ask; it counts them in its cache then."""
    return {"position_ids": positions} if _takes(model, "position_ids") else {}


def only_last(model: Any) -> dict[str, int]:
    """What leaves out the logits of all tokens but the last, where a model can."""
    return {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}


def _takes(model: Any, name: str) -> bool:
    taken = inspect.signature(model.forward).parameters
    return name in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
