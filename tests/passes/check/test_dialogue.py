"""check/dialogue: what an app would hear is compared, and what is wrong with it is said in one sentence."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest

from edgeship.core.model import TorchModel
from edgeship.core.passes import Context
from edgeship.frontends.decoder import load_decoder
from edgeship.llm.dialogue import Speaker
from edgeship.passes.check import dialogue
from edgeship.passes.check.dialogue import CheckDialogue, Heard
from edgeship.passes.lower.decoder_to_genai import DecoderToGenai
from edgeship.program.compare import Reference
from edgeship.program.program import TorchProgram
from edgeship.runtimes.genai import RUNTIME

pytestmark = pytest.mark.xdist_group("genai")
TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content + '!' }}{% endfor %}{{ 'a' if add_generation_prompt }}"
SHORT = ("Hi", "So", "Yes")


@pytest.fixture(scope="module")
def talking(family, tmp_path_factory):
    """A random model with a chat template, and its artifact: texts of 64 tokens, one token a letter."""
    folder = tmp_path_factory.mktemp("talking")
    model = shutil.copytree(family("llama"), folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    program = load_decoder(model, 64).program
    program.save(folder / "program")
    reference = TorchModel(folder / "program", program.signature)
    artifact = DecoderToGenai(64).run(reference, Context(folder))
    return reference, artifact


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(dialogue, "MESSAGES", SHORT)


def _checked(talking, tmp_path, artifact=None, **options):
    reference, own = talking
    return CheckDialogue("genai", **options).run(artifact or own, reference, Context(tmp_path))


def _changed(artifact, tmp_path, name, change):
    """The artifact with one file written again."""
    folder = shutil.copytree(artifact.path, tmp_path / "changed")
    path = folder / name
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    return dataclasses.replace(artifact, path=folder)


def test_a_right_artifact_talks_as_the_reference(talking, tmp_path) -> None:
    found = _checked(talking, tmp_path)
    assert found.passed, found.summary
    figures = {item.name: item.value for item in found.measurements}
    assert figures["tokens_compared"] >= 12
    assert figures["furthest_token"] < 0.02
    assert "onnxruntime-genai's tokenizer and generator" in found.summary


def test_another_template_is_told(talking, tmp_path) -> None:
    changed = _changed(talking[1], tmp_path, "chat_template.jinja", lambda text: text.replace("'!'", "'?'"))
    found = _checked(talking, tmp_path, changed)
    assert not found.passed
    assert re.search(r"answer 1 the engine hands over .*\?.* where transformers writes .*!", found.summary)


def test_search_that_is_not_greedy_is_told(talking, tmp_path) -> None:
    def drawn(text):
        settings = json.loads(text)
        settings["search"].update(do_sample=True, temperature=3.0, top_k=50)
        return json.dumps(settings)

    found = _checked(talking, tmp_path, _changed(talking[1], tmp_path, "genai_config.json", drawn))
    assert not found.passed
    assert re.search(
        r"token \d+ of answer 1 is .* where the reference has .* standard deviations better", found.summary
    )


def test_an_end_that_the_engine_does_not_know_is_told(talking, tmp_path) -> None:
    """What the first answer begins with shall end it: the reference's ends there, the engine's goes on."""
    reference, artifact = talking
    heard = Heard(Speaker(TorchProgram.open(reference).language()[1]), (1,), 0.02)
    with RUNTIME.open(artifact) as session:
        talk = session.dialogue(tmp_path, (1,))
        answer = talk.say("Hi", 6)
        talk.close()
    ended = dataclasses.replace(answer, tokens=3, written=answer.written[:3], ended=True)
    heard.add("Hi", ended, whole=True)
    heard.judge(Reference(TorchProgram.open(reference)), 64)
    assert "token 4 of answer 1" in heard.problems[0]


def test_an_engine_that_refuses_a_message_fails(talking, tmp_path) -> None:
    changed = _changed(talking[1], tmp_path, "chat_template.jinja", lambda _: "{{ raise_exception('not so') }}")
    found = _checked(talking, tmp_path, changed)
    assert not found.passed
    assert "stopped" in found.summary
    assert "not so" in found.summary


def test_a_context_without_room_says_nothing(talking, tmp_path) -> None:
    found = _checked(talking, tmp_path, tokens=64)
    assert found.passed
    assert "no message fits the context" in found.summary
