"""What edgeship takes from transformers that it does not document, beside attention. Written for transformers 5.23.

It ends when transformers renders a chat template without a tokenizer, and says which language models it knows without
importing the configuration of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

__all__ = ["decoder_kinds", "list_by_architecture", "rendered"]


def rendered(template: str, messages: Sequence[Mapping[str, Any]], *, answering: bool, **given: Any) -> str:
    """The text that a chat template makes of messages.

    Args:
        answering: with what begins an answer behind them. given: what else the template may name.

    Raises:
        jinja2.TemplateError, TypeError: what a template does not take.
    """
    found, _ = render_jinja_template([list(messages)], chat_template=template, add_generation_prompt=answering, **given)
    return str(found[0])


def decoder_kinds() -> set[str]:
    """The model types of all language models, those that were registered too. To go through the mapping itself imports
    190 files, which takes seconds."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    registered = MODEL_FOR_CAUSAL_LM_MAPPING._extra_content
    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | {config.model_type for config in registered}


def list_by_architecture(kind: str, names: Sequence[str]) -> None:
    """Let the ``Auto`` class make a language model of the configuration that its class saves, where the table lists the
    class under a larger model's: a part that writes, which was saved by itself.

    Args:
        kind: model type of the configuration. names: of classes, as ``architectures`` has them.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for name in names:
        if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            cls = getattr(transformers, name)
            if cls.config_class.model_type == kind:
                transformers.AutoModelForCausalLM.register(cls.config_class, cls, exist_ok=True)
