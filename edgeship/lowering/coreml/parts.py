"""The parts of a decoder's layers, found by watching a text go through them, for the form that the Neural Engine likes.

Each module of a layer is known by what it computes and by what it is given: a norm of the layer's own input stands
before attention, products of that are queries, keys and values, and so on. What is found is checked:
`edgeship.lowering.coreml.check` compares the layers rebuilt from the parts with the model itself before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgeship.errors import LoweringError
from edgeship.llm.attention import Asked, Engine, computed_by
from edgeship.llm.probing import angles_of, close, root_norm_of, rotation_kinds

if TYPE_CHECKING:
    from edgeship.core.decoder import AttentionLayer

GENERIC = "use --set lower/decoder_to_coreml.form=generic"


@dataclass(frozen=True)
class Parts:
    """One layer of a decoder, taken apart.

    ``x = x + after_attention(attention(before_attention(x)))``, then the same with the feed-forward; norms that a
    layer lacks are None.

    Args:
        projections: linear layers whose outputs, one after the other, are queries, keys and values.
        out: linear layer after attention.
        query_norm, key_norm: RMS norms before rotation, over a head, or over all heads when ``whole_norms``.
        rotary: which table of angles; None where the layer does not rotate, "" where the model has one table.
        scaling: of scores. softcap: of scores, 0 for none.
        inner: linear layers whose outputs, one after the other, are gate and up; only up when not ``gated``.
        down: the linear layer after them. activation: of the gate, or of up.
    """

    projections: tuple[nn.Linear, ...]
    out: nn.Linear
    inner: tuple[nn.Linear, ...]
    down: nn.Linear
    activation: Callable[..., Any]
    before_attention: nn.Module | None = None
    after_attention: nn.Module | None = None
    before_inner: nn.Module | None = None
    after_inner: nn.Module | None = None
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    whole_norms: bool = False
    rotary: str | None = ""
    scaling: float = 1.0
    softcap: float = 0.0
    gated: bool = True


@dataclass(frozen=True)
class Roles:
    """`Parts` by the paths of modules in a layer, to be found again in another model of the same configuration."""

    projections: tuple[str, ...]
    out: str
    inner: tuple[str, ...]
    down: str
    activation: str
    norms: tuple[tuple[str, str], ...]
    whole_norms: bool
    rotary: str | None
    scaling: float
    softcap: float
    gated: bool

    def of(self, layer: nn.Module) -> Parts:
        """The modules of a layer."""

        def at(paths: Sequence[str]) -> tuple[Any, ...]:
            return tuple(layer.get_submodule(path) for path in paths)

        out, down, activation = at((self.out, self.down, self.activation))
        norms: dict[str, Any] = {role: layer.get_submodule(path) for role, path in self.norms}
        return Parts(
            at(self.projections),
            out,
            at(self.inner),
            down,
            activation,
            norms.get("before_attention"),
            norms.get("after_attention"),
            norms.get("before_inner"),
            norms.get("after_inner"),
            norms.get("query_norm"),
            norms.get("key_norm"),
            self.whole_norms,
            self.rotary,
            self.scaling,
            self.softcap,
            self.gated,
        )


@dataclass
class _Event:
    """A module of a layer that ran, or the attention between them when it is None."""

    path: str
    module: nn.Module | None
    given: torch.Tensor
    answer: torch.Tensor


@dataclass
class _Layer:
    """What was seen of one layer. ``given``: ``[1, T, C]``."""

    given: torch.Tensor | None = None
    events: list[_Event] = field(default_factory=list)
    asked: Asked | None = None


class _Watching(Engine):
    def __init__(self) -> None:
        super().__init__()
        self.layer: _Layer | None = None

    def attend(self, asked: Asked) -> torch.Tensor:
        answer = super().attend(asked)
        if self.layer is not None:
            if self.layer.asked is not None:
                raise _not_known("a layer attends twice")
            self.layer.asked = asked
            self.layer.events.append(_Event("", None, asked.query, answer))
        return answer


def _not_known(why: str) -> LoweringError:
    return LoweringError(f"layers are not rebuilt for the Neural Engine: {why}", fix=GENERIC)


def find_roles(model: Any, sizes: Sequence[AttentionLayer], tokens: torch.Tensor) -> list[Roles]:
    """The roles of the modules of each layer.

    Args:
        model: a decoder with random weights. sizes: of its layers. tokens: ``[1, T]``, a few.

    Raises:
        LoweringError: a layer has other parts than norms, products, an attention and an activation.
    """
    layers = layers_of(model)
    if len(layers) != len(sizes):
        raise _not_known("not every layer has a cache of its own")
    seen = [_Layer() for _ in layers]
    engine = _Watching()
    with torch.no_grad(), computed_by(engine), _hooks(layers, seen, engine):
        model(input_ids=tokens, use_cache=False)
    base = getattr(model, model.base_model_prefix)
    rotary = next((module for module in base.modules() if rotation_kinds(module)), None)
    return [_roles(layer, size, rotary) for layer, size in zip(seen, sizes, strict=True)]


def layers_of(model: Any) -> nn.ModuleList:
    """A decoder's layers. Raises `LoweringError` where there are none by that name."""
    layers = getattr(getattr(model, model.base_model_prefix), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise _not_known(f"{type(model).__name__} keeps its layers elsewhere")
    return layers


@contextmanager
def _hooks(layers: nn.ModuleList, seen: Sequence[_Layer], engine: _Watching) -> Iterator[None]:
    handles = []
    for layer, found in zip(layers, seen, strict=True):
        handles.append(layer.register_forward_pre_hook(_entered(found, engine), with_kwargs=True))
        for path, module in layer.named_modules():
            if path and not list(module.children()):
                handles.append(module.register_forward_hook(_ran(found, path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entered(layer: _Layer, engine: _Watching) -> Callable[..., None]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        engine.layer = layer
        layer.given = args[0] if args else kwargs.get("hidden_states")

    return enter


def _ran(layer: _Layer, path: str) -> Callable[..., None]:
    def ran(module: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
        if not args or not isinstance(args[0], torch.Tensor) or not isinstance(answer, torch.Tensor):
            raise _not_known(f"{path} takes or gives something else than one tensor")
        # Dropout that drops nothing.
        if answer is not args[0] and not (answer.shape == args[0].shape and torch.equal(answer, args[0])):
            layer.events.append(_Event(path, module, args[0], answer))

    return ran


def _roles(layer: _Layer, size: AttentionLayer, rotary: nn.Module | None) -> Roles:
    if layer.asked is None or layer.given is None:
        raise _not_known("a layer does not attend")
    asked = layer.asked
    if asked.sinks is not None or asked.bias is not None or not isinstance(asked.scaling, float | int):
        raise _not_known("attention has sinks, or a bias by position")
    place = next(i for i, event in enumerate(layer.events) if event.module is None)
    before, after = layer.events[:place], layer.events[place + 1 :]
    linear_before, norms_before = _sorted(before)
    norms: dict[str, str] = {}
    heads: list[_Event] = []
    for event in norms_before:
        if event.given is layer.given:
            norms["before_attention"] = event.path
        else:
            heads.append(event)
    if len(linear_before) not in (1, 3) or len(heads) not in (0, 2):
        raise _not_known("queries, keys and values are made in another way")
    norms |= {role: event.path for role, event in zip(("query_norm", "key_norm"), heads, strict=False)}
    whole = bool(heads) and int(heads[0].given.shape[-1]) != size.head_dim
    inner = _inner(after, norms)
    return Roles(
        tuple(event.path for event in linear_before),
        inner.out,
        inner.inner,
        inner.down,
        inner.activation,
        tuple(norms.items()),
        whole,
        _rotation(linear_before, heads, asked, size, rotary),
        float(asked.scaling),
        float(asked.softcap or 0.0),
        inner.gated,
    )


@dataclass(frozen=True)
class _Inner:
    out: str
    inner: tuple[str, ...]
    down: str
    activation: str
    gated: bool


def _inner(events: Sequence[_Event], norms: dict[str, str]) -> _Inner:
    """What stands behind attention; norms are added to ``norms``."""
    linears, found = _sorted([event for event in events if not _is_activation(event)])
    activations = [event for event in events if _is_activation(event)]
    if len(linears) not in (3, 4) or len(activations) != 1:
        raise _not_known("the feed-forward is made in another way")
    out, *inner, down = linears
    for event in found:
        if event.given is out.answer:
            norms["after_attention"] = event.path
        elif event.given is down.answer:
            norms["after_inner"] = event.path
        elif event.answer is inner[0].given:
            norms["before_inner"] = event.path
        else:
            raise _not_known(f"nothing is known of {event.path}")
    if len(inner) == 2 and activations[0].given is not inner[0].answer:
        inner.reverse()
    width = int(inner[0].answer.shape[-1])
    gated = len(inner) == 2 or width == 2 * int(down.given.shape[-1])
    paths = tuple(event.path for event in inner)
    return _Inner(out.path, paths, down.path, activations[0].path, gated)


def _is_activation(event: _Event) -> bool:
    """Whether a module changes each number by itself: neither a product nor a norm, and of the same shape."""
    if event.module is None or isinstance(event.module, nn.Linear) or next(event.module.parameters(), None) is not None:
        return False
    if root_norm_of(event.module) is not None:
        return False
    return event.given.shape == event.answer.shape


def _sorted(events: Sequence[_Event]) -> tuple[list[_Event], list[_Event]]:
    """Products, and norms. Raises `LoweringError` for anything else."""
    linears, norms = [], []
    for event in events:
        if isinstance(event.module, nn.Linear):
            linears.append(event)
        elif event.module is not None and root_norm_of(event.module) is not None:
            norms.append(event)
        else:
            raise _not_known(f"nothing is known of {event.path}")
    return linears, norms


def _rotation(
    linears: Sequence[_Event], norms: Sequence[_Event], asked: Asked, size: AttentionLayer, rotary: nn.Module | None
) -> str | None:
    """The table that turns queries: None for none, "" for the only one."""
    tokens = int(asked.query.shape[2])
    made = norms[0].answer if norms else linears[0].answer[..., : size.heads * size.head_dim]
    # Before rotation, [1, heads, T, D], from [1, T, heads * D], [1, T, heads, D] or the same already turned.
    plain = made
    if made.shape != asked.query.shape:
        plain = made.reshape(1, tokens, size.heads, size.head_dim).transpose(1, 2)
    if close(plain, asked.query):
        return None
    for kind in rotation_kinds(rotary) if rotary is not None else []:
        assert rotary is not None
        cos, sin = angles_of(rotary, torch.arange(tokens), kind)
        if close(_turned(plain, cos, sin), asked.query):
            return kind or ""
    raise _not_known("positions are rotated in another way")


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``[1, H, T, D]``, of which the first ``width`` numbers of a row are turned, half against half."""
    width = int(cos.shape[-1])
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)
