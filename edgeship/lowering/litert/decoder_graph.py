"""A language model's step as LiteRT-LM takes it, one graph for each number of tokens.

    tokens i32 [1, T], input_pos i32 [T], mask f32 [1, 1, T, L], kv_cache_k_N, kv_cache_v_N f32 [1, KV, L, D]
    -> logits f32 [1, 1, vocabulary] (decode only), kv_cache_k_N, kv_cache_v_N

The engine fills a chunk's end with token 0 at position 0 and masks those rows wholly, so rows are written one after
the other from the first position on: what lies behind the text is masked, and written over later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from edgeship.compat.torch import decomposed, is_mutable
from edgeship.core.model import Signature, TensorSpec
from edgeship.errors import EdgeshipError, LoweringError, UnsupportedOpError
from edgeship.llm.attention import Engine, Form, additive_mask, computed_by
from edgeship.llm.models import build_hollow, read_config
from edgeship.llm.names import program_names
from edgeship.llm.step import fixed_cache, run
from edgeship.lowering.litert.opened import OpenedProgram, constant_nodes, open_weights
from edgeship.program.stored import Overlay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeship.core.decoder import Decoder
    from edgeship.program.program import TorchProgram

DECODE = "decode"
# Of a cache as the engine takes it.
CACHE_AXES = 4
_FIX = "leave LiteRT-LM out with --runtime"


@dataclass(frozen=True)
class OpenedStep:
    """One signature of the artifact: its graph with open weights, and its interface."""

    key: str
    opened: OpenedProgram
    signature: Signature


class StepGraphs:
    """Traces the steps of one program; the hollow model is built once.

    Args:
        context: positions of the cache.
    """

    def __init__(self, program: TorchProgram, context: int) -> None:
        assert program.origin is not None
        assert program.record.decoder is not None
        self.program, self.context, self.decoder = program, context, program.record.decoder
        if not self.decoder.layers:
            what = f"{self.decoder.family} keeps states alone"
            raise UnsupportedOpError(f"LiteRT-LM opens no model without keys and values, and {what}", fix=_FIX)
        if self.decoder.fixed:
            raise UnsupportedOpError(f"LiteRT-LM's caches have a fixed length: {self.decoder.fixed}", fix=_FIX)
        self.model = build_hollow(read_config(program.origin))
        self.names = program_names(self.model, program)

    def trace(self, tokens: int, weights: Sequence[str], *, decode: bool = False) -> OpenedStep:
        """The graph for ``tokens`` tokens, with those of ``weights`` that it uses as inputs.

        Raises:
            LoweringError: torch cannot trace it.
        """
        interface = step_interface(self.decoder, tokens, self.context, decode=decode)
        examples = tuple(_example(spec) for spec in interface.inputs)
        step = _Step(self.model, self.decoder, decode=decode).eval()
        try:
            with torch.no_grad():
                exported = torch.export.export(step, examples, strict=False)
                if any(map(_writes, exported.graph.nodes)):
                    exported = decomposed(exported, {})
        except EdgeshipError:
            raise
        except Exception as error:  # of many types
            reason = " ".join(str(error).split())[:300]
            raise LoweringError(f"the step of {tokens} tokens cannot be traced: {reason}", fix=_FIX) from error
        _drop_unused(exported.graph)
        names = {f"model.{own}": name for own, name in self.names.items()}
        computed = {**exported.state_dict, **exported.constants}
        program = replace(
            self.program,
            held=exported,
            weights=Overlay(self.program.weights, {k: v for k, v in computed.items() if k not in names}),
            record=replace(self.program.record, aliases=names),
        )
        used = {names.get(name, name) for name, node in constant_nodes(exported).items() if node.users}
        opened = open_weights(program, [name for name in weights if name in used])
        return OpenedStep(DECODE if decode else f"prefill_{tokens}", opened, interface)


def _writes(node: torch.fx.Node) -> bool:
    """Whether an operator changes a tensor in place; without their table, decompositions make such ones return it."""
    return is_mutable(node.target)


def _drop_unused(graph: torch.fx.Graph) -> None:
    """Prefill reads nothing but the caches: the last layer ends with its keys and values."""
    # Checks, and dropout that drops nothing, keep alive what they read unless they are told not to.
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _states(decoder: Decoder) -> list[TensorSpec]:
    """Specifications of states, by names that the engine takes for those of caches; of four axes, as caches have.

    Raises `UnsupportedOpError` for more axes.
    """
    specs = []
    for place, state in enumerate(decoder.states, len(decoder.layers)):
        if len(state.shape) > CACHE_AXES:
            raise UnsupportedOpError(f"a state of {len(state.shape)} axes is no cache of LiteRT-LM", fix=_FIX)
        ones = (1,) * (CACHE_AXES - len(state.shape))
        specs.append(TensorSpec(f"kv_cache_k_{place}", "f32", (*ones, *state.shape)))
    return specs


def step_interface(decoder: Decoder, tokens: int, context: int, *, decode: bool) -> Signature:
    """Names, dtypes and shapes as LiteRT-LM expects them."""
    caches = tuple(
        TensorSpec(f"kv_cache_{kind}_{index}", "f32", (1, layer.kv_heads, context, layer.head_dim))
        for kind in "kv"
        for index, layer in enumerate(decoder.layers)
    )
    inputs = (
        TensorSpec("tokens", "i32", (1, tokens)),
        TensorSpec("input_pos", "i32", (tokens,)),
        TensorSpec("mask", "f32", (1, 1, tokens, context)),
    )
    logits = (TensorSpec("logits", "f32", (1, 1, decoder.vocabulary)),) if decode else ()
    kept = (*caches, *_states(decoder))
    return Signature((*inputs, *kept), (*logits, *kept))


def _example(spec: TensorSpec) -> torch.Tensor:
    """One number, seen from everywhere: caches of a long context are large."""
    dtype = torch.int32 if spec.dtype == "i32" else torch.float32
    return torch.zeros((), dtype=dtype).expand(spec.shape)


class _Step(torch.nn.Module):
    def __init__(self, model: Any, decoder: Decoder, *, decode: bool) -> None:
        super().__init__()
        self.model, self.decoder, self.decode = model, decoder, decode

    def forward(
        self, tokens: torch.Tensor, input_pos: torch.Tensor, mask: torch.Tensor, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        count = len(self.decoder.layers)
        keys, values, given = caches[:count], caches[count : 2 * count], caches[2 * count :]
        states = []
        for state, held in zip(self.decoder.states, given, strict=True):
            # The engine clears no caches between texts: what is beyond a text's beginning is masked, but no state is.
            begun = torch.where(input_pos[0] == 0, torch.zeros(()), held)
            states.append(begun.reshape(state.shape))
        cache = fixed_cache(self.decoder, keys, values, input_pos[0], _write, states)
        with computed_by(_Masked(self.decoder, mask)):
            logits = run(self.model, tokens, cache, cache.position, logits=self.decode)
        kept = [
            cache.states[state.key].reshape(held.shape) for state, held in zip(self.decoder.states, given, strict=True)
        ]
        return (*(() if logits is None else (logits,)), *cache.keys, *cache.values, *kept)


class _Masked(Engine):
    """Attention whose products read the keys as they lie: a transposed view would be a copy of the whole cache.

    Args:
        host: the engine's own mask ``[1, 1, T, L]``.
    """

    def __init__(self, decoder: Decoder, host: torch.Tensor) -> None:
        from edgeship.compat.litert import product_of_rows

        super().__init__(decoder.calls, Form(scaled="rows", product=product_of_rows))
        self.host = host

    def mask(self, **asked: Any) -> torch.Tensor:
        """Where a token may look by its position and by the engine's own mask both."""
        return torch.minimum(additive_mask(**asked), self.host)


def _write(cache: torch.Tensor, rows: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """DYNAMIC_UPDATE_SLICE, which writes in place where the engine lets it."""
    from edgeship.compat.litert import write_slice

    zero = torch.zeros((), dtype=torch.int32)
    return write_slice(cache, rows, [zero, zero, position, zero])
