"""A decoder for onnxruntime-genai: one graph of free lengths with GroupQueryAttention and past and present caches.

    input_ids [1, T], attention_mask [1, S + T], position_ids [1, T], past_key_values.N.key|value [1, KV, S, D]
    -> logits [1, 1, vocabulary] of the last token, present.N.key|value [1, KV, S + T, D]

States of fixed size stand behind those (see `states`), and T is 1 then: the engine is told to feed prompts token by
token.

and for layers that adapters touch LAYER.lora_A [in, r], LAYER.lora_B [r, out], which have defaults.

Positions are rotated as the model's authors wrote it, inside the graph; the operator only attends and keeps the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from edgeship.compat.torch import onnx_table_kept, quick_decompositions
from edgeship.compat.transformers_attention import choose_attention
from edgeship.errors import LoweringError, UnsupportedOpError
from edgeship.llm.attention import UNMASKED, Asked, Engine, computed_by, repeated
from edgeship.llm.cache import GrowingCache, narrowed, widened
from edgeship.llm.models import build_hollow, read_config
from edgeship.llm.names import program_names
from edgeship.llm.probing import root_norm_of
from edgeship.llm.step import cache_name, held_names, holding, only_last, states_by_key, takes_positions
from edgeship.lowering.onnx.adapters import Matrices, default_matrices, example_matrices, matrix_names, open_layers
from edgeship.lowering.onnx.export import OPSET, explained, forget_origins, quiet
from edgeship.lowering.onnx.fuse import fuse
from edgeship.lowering.onnx.states import empty_states, packed, state_names, unpacked
from edgeship.program.collector import few_collections

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.core.decoder import AttentionCall, Decoder
    from edgeship.llm.probing import RootNorm
    from edgeship.program.program import TorchProgram

DOMAIN = "com.microsoft"
# Where GroupQueryAttention takes a score for each head that mixes nothing, behind tables and biases that are not given.
SINKS = 11


class _Operators(Engine):
    """Attention by GroupQueryAttention where it computes what a layer asks for, and in plain operators elsewhere.

    Args:
        past: keys and values of each cache in turn, ``[1, kv_heads, S, D]``. mask: ``[1, S + T]``, ones.
        grouped: places of the caches that the operator keeps.
    """

    def __init__(
        self, past: Sequence[torch.Tensor], mask: torch.Tensor, decoder: Decoder, grouped: frozenset[int]
    ) -> None:
        super().__init__(decoder.calls)
        self.past, self.ones, self.decoder, self.grouped = past, mask, decoder, grouped
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # 32-bit integers, as the operator takes them: the length of each text but one, and of the longest.
        self.lengths = (mask.sum(1, keepdim=True) - 1).to(torch.int32)
        self.total = torch.scalar_tensor(mask.shape[1], dtype=torch.int32)

    def attend(self, asked: Asked) -> torch.Tensor:
        """``[1, heads, T, D]`` over the past and these; returns ``[1, T, heads, D]``."""
        call = self.next_call()
        if call is not None and call.cache in self.grouped:
            return self._grouped(asked, call)
        return repeated(asked) if asked.own is None else asked.own()

    def _grouped(self, asked: Asked, call: AttentionCall) -> torch.Tensor:
        assert call.cache is not None
        spec = self.decoder.layers[call.cache]
        query = asked.query
        batch, tokens, width = query.shape[0], query.shape[2], asked.value.shape[-1]
        # [1, heads, T, D] -> [1, T, heads * D], the narrower of keys and values with zeros behind
        parts = (widened(part, spec.head_dim) for part in (query, asked.key, asked.value))
        flat = [part.transpose(1, 2).reshape(part.shape[0], part.shape[2], -1) for part in parts]
        shape = (batch, spec.kv_heads, self.ones.shape[1], spec.head_dim)
        sinks = [] if asked.sinks is None else [*([None] * (SINKS - 7)), asked.sinks]
        mixed, *present = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::GroupQueryAttention",
            [*flat, self.past[2 * call.cache], self.past[2 * call.cache + 1], self.lengths, self.total, *sinks],
            {
                "num_heads": spec.heads,
                "kv_num_heads": spec.kv_heads,
                "scale": float(asked.scaling),
                **({"softcap": float(asked.softcap)} if asked.softcap else {}),
                **({"local_window_size": call.window} if call.window else {}),
            },
            dtypes=[torch.float32] * 3,
            shapes=[tuple(flat[0].shape), shape, shape],
            version=1,
        )
        self.present[call.cache] = (present[0], present[1])
        return narrowed(mixed.reshape(batch, tokens, spec.heads, spec.head_dim), int(width))


def grouped_places(decoder: Decoder) -> frozenset[int]:
    """The caches that GroupQueryAttention can keep: read once, by an attention of which it computes everything."""
    return frozenset(
        call.cache
        for call in decoder.calls
        if call.cache is not None and not call.own and call.causal and not call.biased
    )


class _Step(torch.nn.Module):
    def __init__(self, model: Any, decoder: Decoder, adapted: Sequence[str]) -> None:
        super().__init__()
        self.model, self.decoder, self.adapted = model, decoder, adapted
        self.grouped = grouped_places(decoder)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        count, kept = len(self.decoder.layers), len(state_names(self.decoder))
        past, states, matrices = rest[: 2 * count], rest[2 * count : 2 * count + kept], rest[2 * count + kept :]
        operators = _Operators(past, attention_mask, self.decoder, self.grouped)
        told = takes_positions(self.model, position_ids) if self.decoder.told else {}
        inputs: dict[str, Any] = {"input_ids": input_ids, **told}
        with computed_by(operators), Matrices(self.adapted, matrices):
            if not kept and len(self.grouped) == count and not self.decoder.counted:
                # The operator keeps all that a layer writes, and the model counts nothing: it sees no cache.
                logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits
                return (logits, *(tensor for place in range(count) for tensor in operators.present[place]))
            keys = {place: past[2 * place] for place in range(count)}
            values = {place: past[2 * place + 1] for place in range(count)}
            before = attention_mask.shape[1] - input_ids.shape[1] if not past else past[0].shape[2]
            cache = GrowingCache(keys, values, before, self.decoder.numbers, self.grouped)
            cache.states = states_by_key(self.decoder, unpacked(self.decoder, states))
            cache.held = held_names(self.decoder.states)
            if self.decoder.masked:
                inputs["attention_mask"] = torch.ones((1, before + input_ids.shape[1]), dtype=torch.int64)
            inputs |= {cache_name(self.model): cache, "use_cache": True}
            with holding(self.model, cache):
                logits = self.model(**inputs, **only_last(self.model)).logits
        present = {**{place: (keys[place], values[place]) for place in range(count)}, **operators.present}
        rows = [tensor for place in range(count) for tensor in present[place]]
        after = [cache.states[state.key] for state in self.decoder.states]
        return (logits[:, -1:], *rows, *packed(self.decoder, after, states))


class _Norm(torch.nn.Module):
    """RMS norm as ONNX Runtime's own operator, which the exporter would write as six."""

    def __init__(self, weight: torch.nn.Parameter | None, norm: RootNorm) -> None:
        super().__init__()
        self.weight, self.norm = weight, norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            weight = torch.ones(int(x.shape[-1]))
        else:
            weight = self.norm.offset + self.weight if self.norm.offset else self.weight
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization", [x, weight], {"axis": -1, "epsilon": self.norm.epsilon, "stash_type": 1},
            dtype=torch.float32, shape=x.shape, version=1,
        )  # fmt: skip


def export_decoder(program: TorchProgram, adapted: Sequence[str] = ()) -> tuple[ir.Model, dict[str, ir.Value]]:
    """The graph, and its weights by the program's names: initializers without content yet.

    Args:
        adapted: linear layers that adapters touch.

    Raises:
        UnsupportedOpError: an operator has no ONNX form. LoweringError: the exporter failed otherwise.
    """
    decoder, origin = program.language()
    if decoder.growing and not decoder.is_whole:
        raise UnsupportedOpError(
            f"onnxruntime-genai's caches grow: {decoder.growing}", fix="leave genai out with --runtime"
        )
    model = build_hollow(read_config(origin))
    if len(grouped_places(decoder)) == len(decoder.layers) and not any(call.direct for call in decoder.calls):
        # The operator hides by itself what each layer does not see.
        choose_attention(model.config, UNMASKED)
    names = program_names(model, program)
    _swap_norms(model)
    open_layers(model, adapted)
    step = _Step(model, decoder, adapted).eval()
    inputs, shapes = _examples(decoder, *example_matrices(model, adapted))
    with quiet(), few_collections(), quick_decompositions(), onnx_table_kept(OPSET):
        try:
            exported = torch.onnx.export(
                step, inputs, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                dynamic_shapes=shapes, input_names=[*input_names(decoder), *matrix_names(adapted)],
                output_names=output_names(decoder),
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            raise explained(error, None) from error
    if exported is None:
        raise LoweringError("the ONNX exporter returned nothing", fix="report this as a bug")
    graph: ir.Model = exported.model
    _name_sizes(graph, decoder)
    weights = _hide(graph, names)
    _tidy(graph)
    fuse(graph)
    for value in weights.values():
        graph.graph.inputs.remove(value)
    default_matrices(graph, adapted)
    forget_origins(graph)
    return graph, weights


def _tidy(graph: ir.Model) -> None:
    """Fold constants and drop what is unused or there twice.

    onnxscript's rewriting rules are left out: they match every node with every rule, a quarter of the time of a
    conversion, and ONNX Runtime fuses at load what they would.
    """
    import onnx_ir.passes.common as common
    import onnxscript.optimizer
    from onnx_ir.passes import Sequential

    common.InlinePass()(graph)
    onnxscript.optimizer.fold_constants(graph)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(graph)


def input_names(decoder: Decoder) -> list[str]:
    """The graph's inputs, in order."""
    past = [f"past_key_values.{i}.{kind}" for i in range(len(decoder.layers)) for kind in ("key", "value")]
    return [
        "input_ids",
        "attention_mask",
        "position_ids",
        *past,
        *(f"past_key_values.{name}" for name in state_names(decoder)),
    ]


def output_names(decoder: Decoder) -> list[str]:
    """The graph's outputs, in order."""
    present = [f"present.{i}.{kind}" for i in range(len(decoder.layers)) for kind in ("key", "value")]
    return ["logits", *present, *(f"present.{name}" for name in state_names(decoder))]


def _examples(
    decoder: Decoder, matrices: Sequence[torch.Tensor], ranks: Sequence[Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Example inputs of lengths that no size of the model equals, and which of their sizes are free."""
    tokens, past, total = (torch.export.Dim(name) for name in ("tokens", "past", "total"))
    old = [torch.zeros(1, layer.kv_heads, 5, layer.head_dim) for layer in decoder.layers for _ in range(2)]
    states = empty_states(decoder)
    new = 1 if states else 3
    inputs = (
        torch.zeros(1, new, dtype=torch.int64), torch.ones(1, 5 + new, dtype=torch.int64),
        torch.zeros(1, new, dtype=torch.int64), *old, *states, *matrices,
    )  # fmt: skip
    # One conversation at a time: each free size more is arithmetic on symbols throughout the export.
    free: dict[int, Any] = {} if states else {1: tokens}
    shapes = (free, {1: total}, free, (*({2: past} for _ in old), *({} for _ in states), *ranks))
    return inputs, shapes


def _swap_norms(model: torch.nn.Module) -> None:
    """Every RMS norm as one operator."""
    for name, module in list(model.named_modules()):
        norm = root_norm_of(module)
        if norm is not None:
            parent, _, leaf = name.rpartition(".")
            weight = cast("torch.nn.Parameter | None", getattr(module, "weight", None))
            setattr(model.get_submodule(parent), leaf, _Norm(weight, norm))


def _name_sizes(model: ir.Model, decoder: Decoder) -> None:
    """Say plainly what the engine allocates by: a step has one row of logits, and caches are as long as the mask.

    Where a model's own operators make them, the exporter writes formulas of the sizes of inputs.
    """
    import onnx_ir as ir

    logits, *present = model.graph.outputs[: 1 + 2 * len(decoder.layers)]
    logits.shape = ir.Shape((1, 1, decoder.vocabulary))
    for place, value in enumerate(present):
        layer = decoder.layers[place // 2]
        if value.shape is None or not _is_name(value.shape[2]):
            value.shape = ir.Shape((1, layer.kv_heads, "total", layer.head_dim))


def _is_name(size: Any) -> bool:
    return str(getattr(size, "value", size)).isidentifier()


def _hide(model: ir.Model, names: dict[str, str]) -> dict[str, ir.Value]:
    """Turn each weight's initializer into a graph input, so that no optimizer touches it; tied ones become one."""
    graph = model.graph
    weights: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        main = names.get(name.removeprefix("model."))
        if main is None:
            continue
        del graph.initializers[name]
        value.const_value = None
        if main in weights:
            value.replace_all_uses_with(weights[main])
            continue
        value.name = main
        weights[main] = value
        graph.inputs.append(value)
    return weights
