"""A decoder for onnxruntime-genai: one graph of free lengths with GroupQueryAttention and past and present caches.

    input_ids [1, T], attention_mask [1, S + T], position_ids [1, T], past_key_values.N.key|value [1, KV, S, D]
    -> logits [1, 1, vocabulary] of the last token, present.N.key|value [1, KV, S + T, D]

and for layers that adapters touch LAYER.lora_A [in, r], LAYER.lora_B [r, out], which have defaults.

Positions are rotated as the model's authors wrote it, inside the graph; the operator only attends and keeps the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from edgeship.errors import LoweringError
from edgeship.llm.models import build_hollow, read_config
from edgeship.llm.names import program_names
from edgeship.lowering.onnx.adapters import Matrices, default_matrices, example_matrices, matrix_names, open_layers
from edgeship.lowering.onnx.export import OPSET, explained, forget_origins, quiet
from edgeship.lowering.onnx.fuse import fuse
from edgeship.program.collector import few_collections

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from edgeship.core.decoder import Decoder
    from edgeship.program.program import TorchProgram

NAME = "edgeship_grouped"
DOMAIN = "com.microsoft"


class _Growing:
    """A cache as transformers' models see it, whose keys and values the operator keeps."""

    def __init__(self, past: Sequence[torch.Tensor], mask: torch.Tensor, decoder: Decoder) -> None:
        self.past, self.mask, self.decoder = past, mask, decoder
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # 32-bit integers, as the operator takes them: the length of each text but one, and of the longest.
        self.lengths = (mask.sum(1, keepdim=True) - 1).to(torch.int32)
        self.total = torch.scalar_tensor(mask.shape[1], dtype=torch.int32)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, softcap: float
    ) -> torch.Tensor:
        """Attention of ``[1, heads, T, D]`` over the past and these; returns ``[1, T, heads, D]``."""
        spec = self.decoder.layers[layer]
        flat = [part.transpose(1, 2).reshape(part.shape[0], part.shape[2], -1) for part in (query, key, value)]
        shape = (query.shape[0], spec.kv_heads, self.mask.shape[1], spec.head_dim)
        mixed, *present = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::GroupQueryAttention",
            [*flat, self.past[2 * layer], self.past[2 * layer + 1], self.lengths, self.total],
            {
                "num_heads": spec.heads,
                "kv_num_heads": spec.kv_heads,
                "scale": float(scaling),
                **({"softcap": float(softcap)} if softcap else {}),
                **({"local_window_size": spec.window} if spec.window else {}),
            },
            dtypes=[torch.float32] * 3,
            shapes=[tuple(flat[0].shape), shape, shape],
            version=1,
        )
        self.present[layer] = (present[0], present[1])
        return mixed.reshape(query.shape[0], query.shape[2], spec.heads, spec.head_dim)


_active: list[_Growing] = []


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _active[-1].attend(int(module.layer_idx), query, key, value, scale, softcap or 0.0), None


class _Step(torch.nn.Module):
    def __init__(self, model: Any, decoder: Decoder, adapted: Sequence[str]) -> None:
        super().__init__()
        self.model, self.decoder, self.adapted = model, decoder, adapted

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        caches = 2 * len(self.decoder.layers)
        _active.append(_Growing(rest[:caches], attention_mask, self.decoder))
        try:
            with Matrices(self.adapted, rest[caches:]):
                logits = self.model(
                    input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=1
                ).logits
            present = _active[-1].present
        finally:
            _active.pop()
        return (logits, *(tensor for layer in range(len(self.decoder.layers)) for tensor in present[layer]))


class _Norm(torch.nn.Module):
    """RMS norm as ONNX Runtime's own operator, which the exporter would write as six."""

    def __init__(self, weight: torch.nn.Parameter, epsilon: float, shifted: bool) -> None:
        super().__init__()
        self.weight, self.epsilon, self.shifted = weight, epsilon, shifted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = 1.0 + self.weight if self.shifted else self.weight
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization", [x, weight], {"axis": -1, "epsilon": self.epsilon, "stash_type": 1},
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
    config = read_config(origin)
    with _registered():
        config._attn_implementation = NAME
        model = build_hollow(config)
        names = program_names(model, program)
        _swap_norms(model)
        open_layers(model, adapted)
        step = _Step(model, decoder, adapted).eval()
        inputs, shapes = _examples(decoder, *example_matrices(model, adapted))
        with quiet(), few_collections():
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
    return ["input_ids", "attention_mask", "position_ids", *past]


def output_names(decoder: Decoder) -> list[str]:
    """The graph's outputs, in order."""
    return ["logits", *(f"present.{i}.{kind}" for i in range(len(decoder.layers)) for kind in ("key", "value"))]


def _examples(
    decoder: Decoder, matrices: Sequence[torch.Tensor], ranks: Sequence[Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Example inputs of lengths that no size of the model equals, and which of their sizes are free."""
    tokens, past, total = (torch.export.Dim(name) for name in ("tokens", "past", "total"))
    old = [torch.zeros(1, layer.kv_heads, 5, layer.head_dim) for layer in decoder.layers for _ in range(2)]
    inputs = (
        torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64),
        torch.zeros(1, 3, dtype=torch.int64), *old, *matrices,
    )  # fmt: skip
    # One conversation at a time: each free size more is arithmetic on symbols throughout the export.
    shapes = ({1: tokens}, {1: total}, {1: tokens}, (*({2: past} for _ in old), *ranks))
    return inputs, shapes


@contextmanager
def _registered() -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FALCON_ATTENTION_CLASSES[NAME] = modeling_falcon.FalconAttention
    yield


def _swap_norms(model: torch.nn.Module) -> None:
    """Every RMS norm as one operator. Gemma's scale by one more than their weight."""
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if not kind.endswith("RMSNorm"):
            continue
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if epsilon is None:
            continue
        parent, _, leaf = name.rpartition(".")
        norm = _Norm(module.weight, float(epsilon), kind.startswith("Gemma"))  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), leaf, norm)


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
