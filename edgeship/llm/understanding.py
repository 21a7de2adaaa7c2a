"""What a decoder computes from token to token, as a probe through its model shows it.

The model runs on random weights and a small vocabulary: once as its authors wrote it, once with our attention, and
through caches that start empty and are read again. Whatever it asks for on the way is written down: which rows it
caches, which attention reads them, what that hides and how it scores. What answers otherwise than the model itself is
not taken: such an attention stays in the model's own operators, and a kind of cache that does not hold is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgeship.compat.transformers_attention import EAGER, choose_attention
from edgeship.core.decoder import HELD, AttentionCall, AttentionLayer, FixedState
from edgeship.errors import EdgeshipError, SourceError, UnsupportedOpError
from edgeship.llm.attention import NAME, Asked, Engine, additive_mask, computed_by, grouped
from edgeship.llm.cache import CHOOSING, FixedCache, GrowingCache, Key, KeysAndValues, write_by_select
from edgeship.llm.models import Understanding, build_as_written, build_hollow, positions_of
from edgeship.llm.modules import make_plain
from edgeship.llm.probing import close, held_numbers, random_tensor, window_of
from edgeship.llm.step import as_it_was, held_names, run

# A text that leaves the windows it is given; its first part goes through a chunk, the rest one by one.
TOKENS, CHUNK, CONTEXT, WINDOW, VOCABULARY = 11, 8, 16, 5, 64
# A matrix of no more numbers is dense, twice for all layers of its shape; larger ones take no memory.
MOST_DENSE = 1 << 27
# Positions at which masks are looked at, at most.
MOST_POSITIONS = 1 << 17
# Of the largest logit; float32 in another order of sums, through all layers.
TOLERANCE = 2e-3


def understand(config: Any) -> Understanding:
    """Probe the model of a configuration.

    Raises:
        UnsupportedOpError: it keeps something from token to token that no cache here holds, or answers otherwise
            through every kind of cache.
    """
    model, small = _probe_model(config)
    words = min(
        value for name, value in vars(small).items() if "vocab" in name and isinstance(value, int) and value > 3
    )
    tokens = torch.randint(2, min(words, VOCABULARY), (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        choose_attention(small, EAGER)
        wanted = _as_written(model, tokens, config)
        choose_attention(small, NAME)
        make_plain(model)
        with computed_by(_Watching()):
            plain = _answer(model, tokens)
        if not close(plain, wanted, TOLERANCE):
            raise UnsupportedOpError(
                f"{config.model_type} answers otherwise once its experts and attentions are written out",
                fix="report the model",
            )
        states = (*_states_of(model, tokens), *_held_states(model, tokens))
        fixed = _first_that_holds(model, tokens, wanted, FIXED, states)
        growing = _first_that_holds(model, tokens, wanted, GROWING, states)
    best = growing if fixed.failure else fixed
    if best.failure:
        raise UnsupportedOpError(f"{config.model_type}: {fixed.failure}", fix=fixed.fix)
    calls = _with_patterns(best.watching.found(), config)
    layers, notes = _layers(best.watching, calls, config)
    # What is not understood of the layers is why a kind of cache does not hold.
    why = "".join(f"{note}; " for note in notes)
    fails = [f"{why}{trial.failure}" if trial.failure else "" for trial in (fixed, growing)]
    if not fails[1] and max(best.watching.cache.rows, default=0) >= CHOOSING:
        # Both numbers are compared while a step is traced, and a free length has no answer.
        fails[1] = "its layers choose a number of tokens, and a text begins with fewer"
    if states:
        notes += ("its layers keep states of fixed size: it takes one token at a time, of a prompt too",)
    kind = best.kind
    return Understanding(layers, calls, kind.counted, kind.masked, kind.told, fails[0], fails[1], states, notes)


def _as_written(model: Any, tokens: torch.Tensor, config: Any) -> torch.Tensor:
    """What the model answers by itself. Raises `SourceError` when it does not run, `UnsupportedOpError` when tokens see
    what comes after them."""
    try:
        wanted, begun = _answer(model, tokens), _answer(model, tokens[:, :CHUNK])
    except Exception as error:  # a model's own code, which may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise SourceError(
            f"{config.model_type} does not run with this config.json ({reason})", fix="mend it"
        ) from error
    if not close(begun, wanted[:, :CHUNK], TOLERANCE):
        raise UnsupportedOpError(
            f"{config.model_type} with this configuration lets tokens see what comes after them, and writes no text",
            fix="build it as a network, with --input",
        )
    return wanted


def _with_patterns(calls: tuple[AttentionCall, ...], config: Any) -> tuple[AttentionCall, ...]:
    """Calls with what their masks hide, which the model says when it runs with its own windows."""
    model: Any = build_hollow(config)
    engine = _Patterns(min(positions_of(config), MOST_POSITIONS))
    cache = _Fixed(counted=False)
    try:
        with torch.no_grad(), computed_by(engine):
            run(model, torch.zeros((1, 1), dtype=torch.int64), cache, 0, logits=False)
    except Exception:  # a model's own code, which may raise anything
        engine.found.clear()
    if len(engine.found) != len(calls):
        return tuple(replace(call, causal=False) for call in calls)
    return tuple(
        replace(call, causal=causal, window=window) for call, (causal, window) in zip(calls, engine.found, strict=True)
    )


class _Patterns(Engine):
    """Computes nothing, and writes down what the masks of attentions hide.

    Args:
        positions: of the longest text.
    """

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.masks: list[tuple[torch.Tensor, tuple[bool, int | None]]] = []
        self.found: list[tuple[bool, int | None]] = []

    def mask(self, **asked: Any) -> torch.Tensor:
        """The usual mask, whose pattern is remembered."""
        mask = additive_mask(**asked)
        self.masks.append((mask, window_of(asked["mask_function"], self.positions)))
        return mask

    def attend(self, asked: Asked) -> torch.Tensor:
        """Zeros ``[1, T, heads, D]``."""
        known = (pattern for mask, pattern in self.masks if mask is asked.mask)
        self.found.append(next(known, (False, None)))
        heads, tokens = int(asked.query.shape[1]), int(asked.query.shape[2])
        return torch.zeros(1, tokens, heads, int(asked.value.shape[-1]))


def _layers(
    watching: Any, calls: tuple[AttentionCall, ...], config: Any
) -> tuple[tuple[AttentionLayer, ...], tuple[str, ...]]:
    """The caches in order, and what the report should say of attentions that stay as they are written."""
    layers, silent, made, choosing = [], [], [], []
    reads = watching.reads()
    for place, (number, rows) in enumerate(sorted(watching.cache.rows.items())):
        alone = next((call for call in calls if call.cache == place), None)
        asking = [
            seen for seen, read in zip(watching.seen, reads, strict=True) if read == place or seen.number == number
        ]
        if number >= CHOOSING:
            choosing.append(str(number - CHOOSING))
        elif not asking:
            silent.append(str(number))
        elif alone is None:
            made.append(str(number))
        layers.append(
            AttentionLayer(
                asking[0].heads if asking else int(getattr(config, "num_attention_heads", None) or rows.kv_heads),
                rows.kv_heads,
                max(rows.widths),
                alone.window if alone is not None else None,
                None if number == place else number,
            )
        )
    reasons: dict[str, list[str]] = {}
    for i, (seen, call) in enumerate(zip(watching.seen, calls, strict=True)):
        if call.own:
            reasons.setdefault(call.own, []).append(str(i if seen.number is None else seen.number))
    notes = [
        f"attention of layers {', '.join(numbers)} stays in the model's own operators: {why}"
        for why, numbers in reasons.items()
    ]
    if silent:
        notes.append(f"layers {', '.join(silent)} attend in code of their own, which stays as it is")
    if choosing:
        notes.append(f"layers {', '.join(choosing)} choose the tokens that they see, by keys in caches of their own")
    if made:
        notes.append(
            f"caches of layers {', '.join(made)} are not read as they lie by one attention: plain operators read them"
        )
    return tuple(layers), tuple(notes)


def _answer(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[1, T, vocabulary]`` of a whole text."""
    answer: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return answer


def _probe_model(config: Any) -> tuple[Any, Any]:
    """The model with random weights, few tokens, and windows that a short text leaves."""
    small = copy.deepcopy(config)
    small.vocab_size = VOCABULARY
    for name, value in vars(config).items():
        if name.endswith("_token_id") and isinstance(value, int):
            setattr(small, name, 0)
        if "window" in name and isinstance(value, int) and not isinstance(value, bool) and value > WINDOW:
            setattr(small, name, WINDOW)
    try:
        model: Any = build_as_written(small)
    except Exception:  # what a configuration checks is its own
        small = copy.deepcopy(config)
        model = build_as_written(small)
    seen: set[int] = set()
    held: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for number, parameter in enumerate(model.parameters()):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            parameter.data = _weight(tuple(parameter.shape), number, held)
    return model, model.config


def _weight(shape: tuple[int, ...], number: int, held: dict[tuple[int, ...], list[torch.Tensor]]) -> torch.Tensor:
    """A parameter of the probe. Two dense matrices of each shape serve all layers in turn, so that neighbours, such as
    a gate and what it multiplies, differ.

    Args:
        number: of the parameter. held: what was made of each shape; the next to be used comes first.
    """
    if len(shape) != 2 or shape[0] * shape[1] > MOST_DENSE:
        return _scaled(shape, number)
    made = held.setdefault(shape, [])
    if len(made) < 2:
        made.append(_scaled(shape, number).contiguous())
        return made[-1]
    made.reverse()
    return made[-1]


def _scaled(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """`random_tensor`, with products of about one, and without making it dense."""
    values = random_tensor(shape, seed=seed)
    if len(shape) < 2:
        return values
    held = torch.as_strided(values, (held_numbers(shape),), (1,)) * shape[-1] ** -0.5
    return torch.as_strided(held, shape, values.stride())


@dataclass
class _Seen:
    """One attention that was asked for.

    Args:
        keys, values: what it read. number: by which the layer that asked names itself.
    """

    call: AttentionCall
    keys: torch.Tensor
    values: torch.Tensor
    heads: int
    number: int | None


@dataclass
class _Rows:
    """What a model put into one cache, and what it was given back last."""

    kv_heads: int
    widths: tuple[int, int]
    keys: torch.Tensor
    values: torch.Tensor


class _Watching(Engine):
    """Computes attention as the model's own file does, and writes down what it was asked.

    Args:
        cache: whose rows attentions may read.
    """

    def __init__(self, cache: Any = None) -> None:
        super().__init__()
        self.cache = cache
        self.seen: list[_Seen] = []

    def attend(self, asked: Asked) -> torch.Tensor:
        """By the model's own function, or by ours where it has none that can be called."""
        ours, theirs = _tried(lambda: grouped(asked)), None
        if asked.own is not None:
            theirs = _tried(asked.own)
        why = ""
        if not isinstance(asked.scaling, float | int):
            why = "its scale is computed"
        elif ours is None:
            why = "its keys and values have shapes of another kind"
        elif theirs is not None and not close(ours, theirs):
            why = "it scores otherwise than by scaled products, a cap, a mask, a bias and sinks"
        answer = ours if theirs is None else theirs
        if answer is None:
            raise UnsupportedOpError(f"attention {len(self.seen)} has no plain form", fix="report the model")
        call = AttentionCall(
            None,
            float(asked.scaling) if not why else 1.0,
            asked.softcap,
            sinks=asked.sinks is not None,
            biased=asked.bias is not None or (asked.mask is not None and asked.mask.shape[1] != 1),
            own=why,
            direct=asked.direct,
        )
        self.seen.append(_Seen(call, asked.key, asked.value, int(asked.query.shape[1]), asked.layer))
        return answer

    def reads(self) -> list[int | None]:
        """For each attention the place of the cache that it read as it lies; None where it read something else."""
        rows = [self.cache.rows[number] for number in sorted(self.cache.rows)]
        places: list[int | None] = []
        for seen in self.seen:
            same = (i for i, held in enumerate(rows) if held.keys is seen.keys and held.values is seen.values)
            places.append(next(same, None))
        return places

    def found(self) -> tuple[AttentionCall, ...]:
        """What was asked for, in order, with the caches that were read alone."""
        reads = self.reads()
        return tuple(
            replace(seen.call, cache=place if reads.count(place) == 1 else None)
            for seen, place in zip(self.seen, reads, strict=True)
        )


def _tried(compute: Callable[[], Any]) -> torch.Tensor | None:
    """What it answers, or None when it cannot."""
    try:
        answer = compute()
    except Exception:  # a function of a model's own, which may raise anything
        return None
    return answer if isinstance(answer, torch.Tensor) else None


class _Watched(KeysAndValues):
    """Caches that are made when they are first written, and remember what they gave."""

    rows: dict[int, _Rows]

    def remembered(self, number: int, given: tuple[Any, Any], answer: tuple[Any, Any]) -> tuple[Any, Any]:
        """``answer``, noted."""
        keys, values = given
        self.rows[number] = _Rows(int(keys.shape[1]), (int(keys.shape[-1]), int(values.shape[-1])), *answer)
        return answer


class _Fixed(FixedCache, _Watched):
    def __init__(self, counted: bool) -> None:
        nothing = torch.zeros(1, 1, CONTEXT, 1)
        super().__init__([nothing], [nothing], torch.zeros((), dtype=torch.int64), write_by_select, counted=counted)
        self.keys, self.values = {}, {}  # type: ignore[assignment]
        self.rows = {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        width = max(int(key_states.shape[-1]), int(value_states.shape[-1]))
        # What lies beyond the text must not matter.
        unread = torch.full((1, int(key_states.shape[1]), CONTEXT, width), 7.0)
        self.keys.setdefault(layer_idx, unread)  # type: ignore[attr-defined]
        self.values.setdefault(layer_idx, unread)  # type: ignore[attr-defined]
        answer = super().update(key_states, value_states, layer_idx)
        return self.remembered(layer_idx, (key_states, value_states), answer)


class _Growing(GrowingCache, _Watched):
    def __init__(self) -> None:
        super().__init__({}, {}, 0)
        self.rows = {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        width = max(int(key_states.shape[-1]), int(value_states.shape[-1]))
        nothing = torch.zeros((1, int(key_states.shape[1]), 0, width))
        self.keys.setdefault(layer_idx, nothing)
        self.values.setdefault(layer_idx, nothing)
        answer = super().update(key_states, value_states, layer_idx)
        return self.remembered(layer_idx, (key_states, value_states), answer)


class _Asking(_Fixed):
    """Holds no states, and writes down which are put there, by a model that begins a text.

    Args:
        found: their shapes.
    """

    def __init__(self) -> None:
        super().__init__(counted=False)
        self.found: dict[Key, tuple[int, ...]] = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return None

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        width = int(conv_states.shape[-1]) if conv_kernel_size is None else conv_kernel_size
        self.found["conv", layer_idx, state_idx] = (*map(int, conv_states.shape[:-1]), width)
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        self.found["recurrent", layer_idx, state_idx] = tuple(map(int, recurrent_states.shape))
        return recurrent_states


def _states_of(model: Any, tokens: torch.Tensor) -> tuple[FixedState, ...]:
    """What layers keep beside keys and values; nothing where the model does not run over a cache that asks."""
    cache = _Asking()
    try:
        with computed_by(_Watching(cache)):
            run(model, tokens[:, :CHUNK], cache, 0)
    except Exception:  # what a model does there is said by the trials
        return ()
    return tuple(FixedState(*key, shape) for key, shape in sorted(cache.found.items(), key=lambda item: item[0][1:]))


def _tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Tensors that modules hold beside their parameters, in buffers or not."""
    found: dict[str, torch.Tensor] = dict(model.named_buffers())
    for name, module in model.named_modules():
        held = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        found |= {f"{name}.{key}": value for key, value in held.items()}
    return found


def _held_states(model: Any, tokens: torch.Tensor) -> tuple[FixedState, ...]:
    """What layers keep in attributes of their own: tensors that each of two steps of one token changes."""
    cache = _Asking()
    seen: list[dict[str, torch.Tensor]] = []
    with as_it_was(model):
        try:
            for start in (0, 1):
                cache.position = torch.tensor(start)
                with computed_by(_Watching(cache)):
                    run(model, tokens[:, start : start + 1], cache, start, restored=False)
                seen.append({name: held.clone() for name, held in _tensors_of(model).items()})
        except Exception:  # what a model does there is said by the trials
            return ()
    first, second = seen
    names = [
        name
        for name, held in second.items()
        if name in first and held.shape == first[name].shape and not torch.equal(held, first[name])
    ]
    return tuple(
        FixedState("recurrent", HELD, place, tuple(map(int, second[name].shape)), name)
        for place, name in enumerate(names)
    )


@dataclass(frozen=True)
class _Kind:
    """A kind of cache, and what the model needs to be told beside it; see `Decoder`."""

    grows: bool
    counted: bool = False
    masked: bool = False
    told: bool = True

    @property
    def name(self) -> str:
        """As messages call it."""
        return "that grows" if self.grows else "of fixed length"


FIXED = [
    _Kind(False, counted, masked) for counted, masked in ((False, False), (True, False), (False, True), (True, True))
]
GROWING = [_Kind(True, counted=True), _Kind(True, counted=True, masked=True)]
# Models that number positions otherwise than from zero on: behind those that padding has, say.
FIXED.append(_Kind(False, counted=True, told=False))
GROWING.append(_Kind(True, counted=True, told=False))


def _first_that_holds(
    model: Any, tokens: torch.Tensor, wanted: torch.Tensor, kinds: Sequence[_Kind], states: Sequence[FixedState]
) -> _Trial:
    """The first kind that a text can be read through; what the first says when there is none."""
    first = None
    for kind in kinds:
        trial = _trial(model, tokens, wanted, kind, states)
        if not trial.failure:
            return trial
        first = first or trial
    assert first is not None
    return first


@dataclass
class _Trial:
    """A text read through one kind of cache.

    Args:
        failure: why it does not hold; empty when it does.
    """

    kind: _Kind
    watching: Any = None
    failure: str = ""
    fix: str = "leave out language models of this kind, or report it"


def _trial(model: Any, tokens: torch.Tensor, wanted: torch.Tensor, kind: _Kind, states: Sequence[FixedState]) -> _Trial:
    cache: Any = _Growing() if kind.grows else _Fixed(kind.counted)
    cache.masked, cache.told = kind.masked, kind.told
    cache.states = {state.key: torch.zeros(state.shape) for state in states}
    cache.held = held_names(states)
    # Models with states take one token at a time in every engine.
    first = 1 if states else CHUNK
    watching = _Watching(cache)
    rows: list[torch.Tensor] = []
    try:
        for start, stop in ((0, first), *((i, i + 1) for i in range(first, TOKENS))):
            watching = _Watching(cache)
            with computed_by(watching):
                answer = run(model, tokens[:, start:stop], cache, start)
            assert answer is not None
            rows.append(answer)
            if kind.grows:
                cache.past = stop
            else:
                cache.position = torch.tensor(stop)
    except EdgeshipError as error:
        return _Trial(kind, failure=error.what, fix=error.fix)
    except Exception as error:  # a model's own code, which may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return _Trial(kind, failure=f"it does not run over a cache {kind.name} ({reason})")
    if not cache.rows and not states:
        return _Trial(
            kind, failure="no layer puts keys and values into a cache, and what else it keeps is not known here"
        )
    found = torch.cat(rows, 1)
    if not close(found, wanted, TOLERANCE):
        apart = float((found - wanted).abs().max() / wanted.abs().max())
        return _Trial(
            kind, failure=f"through a cache {kind.name} it answers otherwise than for a whole text (by {apart:.0%})"
        )
    return _Trial(kind, watching)
