"""Chat templates written again for an engine are the same template to transformers, or are refused by name."""

from __future__ import annotations

import re

import jinja2
import pytest

from edgeship.errors import LoweringError
from edgeship.llm.chat import ChatTemplate
from edgeship.lowering.chat_template import genai_template, litert_template

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TEXT = 'Hello  there\n"quoted" \\ {{x}} {% é🙂 '
DIALOGUES = [
    [{"role": "user", "content": TEXT}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": TEXT}],
    [
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n An answer\t<b> "},
        {"role": "user", "content": "And?"},
    ],
]


@pytest.mark.parametrize("name", ["chatml", "blocks", "headers", "turns", "thinking", "inst"])
@pytest.mark.parametrize("answering", [True, False])
def test_transformers_renders_what_genai_is_given_as_the_original(name, answering, chat_templates) -> None:
    own = ChatTemplate(chat_templates[name], NAMES, {})
    written = ChatTemplate(genai_template(own), NAMES, {})
    for dialogue in DIALOGUES:
        assert written.render(dialogue, answering=answering) == own.render(dialogue, answering=answering)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ messages|groupby('role') }}", "the filter groupby"),
        ("{{ 'a'.zfill(3) }}", "the method zfill"),
        ("{{ '%s' % 'a' }}", "a text filled in by %"),
        ("{{ cycler('a')() }}", "this call"),
        ("{% for m in messages recursive %}{% endfor %}", "a recursive loop"),
        ("{% include 'other' %}", "the statement Include"),
        ("{{ messages is sameas(messages) }}", "the test sameas"),
        ("\n\n{{ messages|tojson(separators=(',', ':')) }}", "these options of tojson, line 3"),
    ],
)
@pytest.mark.parametrize("write", [litert_template, genai_template])
def test_what_an_engine_cannot_express_is_named(source, what, write) -> None:
    with pytest.raises(LoweringError, match=re.escape(what)):
        write(ChatTemplate(source, {}, {}))


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(LoweringError, match=r"not valid Jinja: .*line 2"):
        litert_template(ChatTemplate("\n{% if %}", {}, {}))


@pytest.mark.parametrize(
    ("name", "added", "end"),
    [
        ("chatml", {"<|im_end|>": 2, "<|im": 3}, "<|im_end|>"),
        ("headers", {"<|eot|>": 7}, "<|eot|>"),
        ("turns", {"<end_of_turn>": 7}, "<end_of_turn>"),
        ("inst", {"</s>": 2}, "</s>"),
        ("chatml", {"</s>": 2}, ""),
    ],
)
def test_the_token_that_ends_an_answer_is_the_one_behind_it(name, added, end, chat_templates) -> None:
    assert ChatTemplate(chat_templates[name], NAMES, added).turn_end() == end


def test_a_template_that_takes_no_conversation_ends_no_answer() -> None:
    template = ChatTemplate("{{ raise_exception('no') }}", {}, {"</s>": 1})
    assert (template.turn_end(), template.begins_with("<s>")) == ("", False)
    with pytest.raises(jinja2.TemplateError):
        template.render(DIALOGUES[0])
