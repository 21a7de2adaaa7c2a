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


def test_language_models_are_known_by_name_those_that_were_registered_too() -> None:
    from edgeship.compat import openelm

    openelm.register()
    kinds = compat.decoder_kinds()
    assert {"llama", "rwkv", "openelm"} <= kinds
    assert "mllama_text_model" not in kinds


def test_a_part_that_writes_is_made_by_the_class_that_saved_it() -> None:
    import transformers

    compat.list_by_architecture("mllama_text_model", ["LlamaForCausalLM", "MllamaForCausalLM", "Nobody"])
    assert "mllama_text_model" in compat.decoder_kinds()
    config = transformers.AutoConfig.for_model("mllama_text_model")
    assert transformers.AutoModelForCausalLM._model_mapping[type(config)] is transformers.MllamaForCausalLM
