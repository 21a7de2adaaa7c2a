"""A model's chat template: what is written around messages, and which token ends an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tokens that transformers gives to a template by name.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# An answer that no template writes by itself.
ANSWER = "Zanzibar"


@dataclass(frozen=True)
class ChatTemplate:
    """A template of a model's folder.

    Args:
        source: Jinja. variables: texts of the special tokens that it may name. added: tokens that are found in a text
            before it is split, and their ids.
    """

    source: str
    variables: Mapping[str, str]
    added: Mapping[str, int]

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """The template of a folder with a tokenizer's files; None where it has none."""
        source = template_source(folder)
        if not source:
            return None
        variables: dict[str, str] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            found = _json(folder / name)
            for key in NAMED:
                text = found.get(key)
                text = text.get("content") if isinstance(text, dict) else text
                if isinstance(text, str):
                    variables[key] = text
        tokens = _json(folder / "tokenizer.json").get("added_tokens") or []
        return cls(source, variables, {item["content"]: int(item["id"]) for item in tokens})

    def render(self, messages: Sequence[Mapping[str, Any]], *, answering: bool = True, **more: Any) -> str:
        """The text that transformers makes of messages.

        Args:
            answering: with what begins an answer behind them. more: what else a template may name.

        Raises:
            jinja2.TemplateError, TypeError: what a template does not take.
        """
        from edgeship.compat.transformers import rendered

        return rendered(self.source, messages, answering=answering, **{**self.variables, **more})

    def behind_answer(self) -> str:
        """What the template writes behind an answer; empty when it takes no plain conversation."""
        turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": ANSWER}]
        try:
            text = self.render(turns, answering=False)
        except Exception:  # whatever its expressions raise: it has no answers, so none that a token ends
            return ""
        return text.rpartition(ANSWER)[2] if ANSWER in text else ""

    def turn_end(self) -> str:
        """Text of the token that ends an answer; empty when none does."""
        end = self.behind_answer().lstrip(" ")
        return max((token for token in self.added if token and end.startswith(token)), key=len, default="")

    def begins_with(self, token: str) -> bool:
        """Whether a conversation begins with this text."""
        try:
            return bool(token) and self.render([{"role": "user", "content": "Where?"}]).startswith(token)
        except Exception:  # as above
            return False


def template_source(folder: Path) -> str:
    """The template as it is written; empty when there is none."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    found = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = next((item.get("template") for item in found if item.get("name") == "default"), None)
    return found if isinstance(found, str) else ""


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # said where the tokenizer itself is read
        return {}
    return found if isinstance(found, dict) else {}
