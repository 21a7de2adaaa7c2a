"""What transformers keeps to itself about attention: its choice by name, tables of classes, and its plain functions."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EAGER = "eager"


def register_attention(name: str, attend: Callable[..., Any], mask: Callable[..., Any] | None = None) -> None:
    """Make ``attn_implementation=name`` known. Safe to call again.

    Args:
        attend: as `transformers.AttentionInterface` calls it. mask: as `transformers.AttentionMaskInterface` does; no
            masks are made without it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)


def choose_attention(config: Any, name: str) -> None:
    """Choose an implementation for models that are made from a configuration, and for those that already were."""
    config._attn_implementation = name


def choose_batched_experts(config: Any) -> None:
    """Choose the form of experts that looks their weights up: it runs on any strides, and can be traced."""
    config._experts_implementation = "batched_mm"


@contextmanager
def classes_by_name(config: Any, name: str) -> Iterator[None]:
    """Let modules that pick their attention's class from a table of names take the plain one for ``name``.

    Some models' files have a dictionary ``{"eager": class, ..}`` which is looked up with the chosen name while a model
    is made; it knows no names that were registered later. The tables are as they were after the block.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    added = [table for table in _tables(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__) if name not in table]
    for table in added:
        table[name] = table[EAGER]
    try:
        yield
    finally:
        for table in added:
            del table[name]


def attend_by_torch(model: Any) -> None:
    """Let layers whose class is of such a table use torch's one function for attention where they know it.

    They ask for it by the name in their configuration, which becomes one of their own.
    """
    files = {type(module).__module__ for module in model.modules()}
    classes = tuple(table[EAGER] for name in files for table in _tables(name))
    for module in model.modules():
        if isinstance(module, classes) and hasattr(module, "config"):
            module.config = copy.deepcopy(module.config)
            module.config._attn_implementation = "sdpa"


def _tables(module: str) -> list[dict[str, Any]]:
    """The tables of classes of attention in a model's file."""
    from torch import nn

    return [
        held
        for held in vars(sys.modules[module]).values()
        if isinstance(held, dict) and isinstance(held.get(EAGER), type) and issubclass(held[EAGER], nn.Module)
    ]


def own_attention(module: Any) -> Callable[..., Any] | None:
    """The plain attention function of a layer's own file, ``eager_attention_forward``; None where it has none."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def gate_of(experts: Any) -> Callable[..., Any] | None:
    """What a module of experts does between its two products, in its own words; None where it says nothing."""
    return getattr(experts, "_apply_gate", None)


def small_decoder(**sizes: Any) -> Any:
    """The plain decoder of norms, rotated grouped attention and gated layers that llama2.c's checkpoints hold.

    Args:
        sizes: settings of its configuration.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**sizes))
