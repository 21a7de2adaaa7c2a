"""What edgeship needs of transformers that it does not document: an upgrade that breaks it is red here and says what."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from edgeship.compat import transformers as compat

TEMPLATE = (
    "{{ bos }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(("answering", "end"), [(True, "<assistant>"), (False, "")])
def test_a_template_is_rendered_without_a_tokenizer(answering, end) -> None:
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    found = compat.rendered(TEMPLATE, turns, answering=answering, bos="<s>")
    assert found == "<s><user>Where?<assistant>Here." + end


def test_what_a_template_refuses_is_jinjas_error() -> None:
    import jinja2

    with pytest.raises(jinja2.TemplateError, match="no system"):
        compat.rendered("{{ raise_exception('no system') }}", [{"role": "user", "content": ""}], answering=True)


def test_templates_run_in_a_sandbox() -> None:
    import jinja2

    with pytest.raises(jinja2.TemplateError):
        compat.rendered(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}", [{"role": "user", "content": ""}], answering=True
        )
