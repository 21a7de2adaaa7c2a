"""What edgeship takes from transformers that it does not document, beside attention. Written for transformers 5.23.

It ends when transformers renders a chat template without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

__all__ = ["rendered"]


def rendered(template: str, messages: Sequence[Mapping[str, Any]], *, answering: bool, **given: Any) -> str:
    """The text that a chat template makes of messages.

    Args:
        answering: with what begins an answer behind them. given: what else the template may name.

    Raises:
        jinja2.TemplateError, TypeError: what a template does not take.
    """
    found, _ = render_jinja_template([list(messages)], chat_template=template, add_generation_prompt=answering, **given)
    return str(found[0])
