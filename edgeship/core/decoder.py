"""What is known of a language model's decoder: layers, caches, tokens. Plain data, read without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from edgeship.errors import ArtifactError, UsageError

# What a layer keeps beside keys and values.
StateForm = Literal["conv", "recurrent"]
# How an engine keeps keys and values.
CacheType = Literal["float32", "float16", "int8"]
CACHE_BITS: Mapping[CacheType, int] = {"float32": 32, "float16": 16, "int8": 8}


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's cache.

    Args:
        heads: query heads. kv_heads: heads of keys and values, which are cached.
        head_dim: width of one head; of keys or of values, whichever are wider.
        window: how many positions a token sees, itself included; None for all.
        number: by which the model's own code names this cache; None when that is its place among all caches.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    number: int | None = None


# The number of the layer of states that layers keep in themselves.
HELD = -1


@dataclass(frozen=True)
class FixedState:
    """What a layer keeps from token to token in a tensor of fixed size, which is zero before a text.

    Args:
        form: ``conv`` for the last inputs of a convolution, ``recurrent`` for a sum over all tokens before.
        layer: by which the model's own code names the layer; `HELD` where the layer keeps it in an attribute and asks
            no cache. place: which of several of its form there.
        shape: of the tensor, ``[1, ...]``. name: of the attribute, with the path of its module; else empty.
    """

    form: StateForm
    layer: int
    place: int
    shape: tuple[int, ...]
    name: str = ""

    @property
    def key(self) -> tuple[StateForm, int, int]:
        """By which a model's code asks for it."""
        return self.form, self.layer, self.place

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class AttentionCall:
    """One attention of a decoder, as it was seen while a probe ran through the model.

    Scores are ``queries keys^T scaling``, perhaps capped, plus what hides tokens; their softmax mixes the values.

    Args:
        cache: place among the caches of the one that it reads, as it lies and alone; None when it reads what was made
            of a cache, or one that others read too.
        scaling: of scores. softcap: ``tanh(score / softcap) * softcap``; None for none.
        window: how many positions a token sees, itself included; None for all before it.
        causal: False when what is hidden is neither all that comes later nor that and what lies outside of a window.
        sinks: whether each head has a score that takes a share of the softmax and mixes nothing.
        biased: whether scores get a bias by position.
        own: why the model's own operators compute it; empty when it is understood.
        direct: whether a layer asks torch's own function for it, and not transformers' interface.
    """

    cache: int | None
    scaling: float = 1.0
    softcap: float | None = None
    window: int | None = None
    causal: bool = True
    sinks: bool = False
    biased: bool = False
    own: str = ""
    direct: bool = False


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model.

    Args:
        family: transformers' model type. layers: caches in order, each of its own sizes, which may differ.
        hidden: width of the residual stream. vocabulary: rows of the table of tokens.
        context: positions that the model was made for; the longest context an artifact may have.
        bos: token that starts a text, when the tokenizer adds one. eos: tokens that end it. pad: filler.
        files: configuration, tokenizer and chat template, kept in the program's folder ``origin``.
        calls: attentions in the order in which a step computes them. Layers whose own code attends have none.
        counted: whether the model asks its cache for the position of the first new token.
        masked: whether the model must be told that all of its cache counts, to know its length.
        told: whether steps say positions to the model; those that number them otherwise count them in their cache.
        fixed: why it does not run over caches of fixed length; empty when it does.
        growing: the same for caches that grow by what is new.
        states: what layers keep beside keys and values. A model that has any takes one token at a time.
    """

    family: str
    layers: tuple[AttentionLayer, ...]
    hidden: int
    vocabulary: int
    context: int
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    files: tuple[str, ...] = ()
    calls: tuple[AttentionCall, ...] = ()
    counted: bool = False
    masked: bool = False
    told: bool = True
    fixed: str = ""
    growing: str = ""
    states: tuple[FixedState, ...] = ()

    @property
    def numbers(self) -> dict[int, int]:
        """By which a model names its caches -> their places."""
        return {i if layer.number is None else layer.number: i for i, layer in enumerate(self.layers)}

    @property
    def is_whole(self) -> bool:
        """Whether layers keep nothing but caches, each read by exactly one attention that is understood."""
        read = [call.cache for call in self.calls if not call.own and call.causal and not call.biased]
        return read == list(range(len(self.layers))) and len(self.calls) == len(read) and not self.states

    def cache_bytes(self, context: int, kept: CacheType = "float16") -> int:
        """Bytes of keys and values for ``context`` positions. Every layer keeps them all: runtimes' caches are not
        shortened to a window. States of fixed size are float32."""
        bits = CACHE_BITS[kept]
        rows = sum(2 * layer.kv_heads * layer.head_dim * context * bits // 8 for layer in self.layers)
        return rows + sum(4 * state.numbers for state in self.states)


# More than this is asked for on purpose: a cache grows with every position.
DEFAULT_CONTEXT = 2048
# With one position there is nothing to go on with.
LEAST_CONTEXT = 2


def context_of(decoder: Decoder, asked: int | None) -> int:
    """The context of an artifact: what was asked for, or the model's own up to 2048 positions.

    Raises `UsageError` when the model has fewer positions than were asked for.
    """
    if asked is None:
        return min(DEFAULT_CONTEXT, decoder.context)
    if not LEAST_CONTEXT <= asked <= decoder.context:
        raise UsageError(
            f"--context {asked} is not among the {decoder.context} positions that the model was made for",
            fix=f"give {LEAST_CONTEXT} to {decoder.context}",
        )
    return asked


@dataclass(frozen=True)
class LanguageFacts:
    """What an artifact of a language model says of itself.

    Args:
        context: positions of its cache. cache: how keys and values are kept. eos: tokens that end an answer.
        chunk: tokens that prefill takes at once; None where it takes any number.
        adapters: names of the LoRA adapters beside the model.
    """

    context: int
    cache: CacheType
    eos: tuple[int, ...] = ()
    chunk: int | None = None
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, decoder: Decoder, context: int, cache: CacheType, chunk: int | None = None) -> Self:
        """What holds for every artifact of a decoder."""
        return cls(context, cache, decoder.eos, chunk)

    def prefilled(self) -> int:
        """`chunk`. Raises `ArtifactError` where the artifact does not say it."""
        if self.chunk is None:
            raise ArtifactError("its record does not say how many tokens prefill takes", fix="build it again")
        return self.chunk

    def texts(self) -> dict[str, str]:
        """As strings, for files that keep no others."""
        found = {"context": str(self.context), "cache": self.cache, "eos": _listed(self.eos)}
        found |= {} if self.chunk is None else {"chunk": str(self.chunk)}
        return found | ({"adapters": _listed(self.adapters)} if self.adapters else {})

    @classmethod
    def of_texts(cls, texts: Mapping[str, str]) -> Self:
        """The inverse of `texts`, as bundles had them before version 2. Raises `ArtifactError` when they say less."""
        try:
            kept = next(kind for kind in CACHE_BITS if kind == texts["cache"])
            eos = tuple(int(token) for token in texts["eos"].split(",") if token)
            chunk = int(texts["chunk"]) if "chunk" in texts else None
            adapters = tuple(name for name in texts.get("adapters", "").split(",") if name)
            return cls(int(texts["context"]), kept, eos, chunk, adapters)
        except (KeyError, ValueError, StopIteration) as error:
            raise ArtifactError(f"its record of a language model lacks {error}", fix="build it again") from None


def _listed(items: tuple[int, ...] | tuple[str, ...]) -> str:
    return ",".join(map(str, items))
