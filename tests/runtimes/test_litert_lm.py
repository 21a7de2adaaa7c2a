"""LiteRT-LM: a family's file is written, opened by its kernels and by the engine, and writes what transformers writes."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from edgeship.compression.encode import Encoder
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import Affine, Float, same_numbers
from edgeship.errors import ArtifactError, UsageError
from edgeship.llm.chat import ChatTemplate
from edgeship.llm.generation import generate
from edgeship.lowering.chat_template import litert_template
from edgeship.lowering.litert.container import (
    PREFILL_DECODE,
    Section,
    metadata_section,
    tokenizer_section,
    write_container,
)
from edgeship.passes.lower.decoder_to_litert_lm import DecoderToLiteRTLM
from edgeship.program.program import TorchProgram
from edgeship.runtimes.litert_lm.runtime import RUNTIME
from edgeship.runtimes.litert_lm.session import open_graphs

# What is lowered once is used by all of them.
pytestmark = pytest.mark.xdist_group("litert-lm")

SLOW = [
    "gemma2",
    "gpt2",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "falcon",
    "openelm",
]
FAMILIES = ["llama", *(pytest.param(name, marks=pytest.mark.heavy) for name in SLOW)]
CONTEXT = 64
# One token a letter.
TEXT = "The quick brown fox ju"


@pytest.fixture(scope="module")
def lowered(decoder_model, tmp_path_factory):
    made = {}

    def lower(name):
        if name not in made:
            step, folder = DecoderToLiteRTLM(CONTEXT, 8), tmp_path_factory.mktemp(name)
            made[name] = step.run(decoder_model(name), Context(folder))
            step.ensures(made[name], model=decoder_model(name))
            assert [file.name for file in folder.iterdir()] == ["model.litertlm"]
        return made[name]

    return lower


def _decided(model, encoding, folder):
    """The model with every layer's weight in one encoding."""
    program = TorchProgram.open(model)
    wanted = {use.name: encoding for use in program.record.inventory.weights if use.op in ("linear", "embedding")}
    encoded, _ = Encoder(program, wanted).encode()
    record = dataclasses.replace(program.record, encodings=wanted)
    dataclasses.replace(program, encoded=encoded, record=record).save(folder / "program")
    return TorchModel(folder / "program", model.signature), encoded


def _reference(model, tokens):
    with torch.no_grad():
        return TorchProgram.open(model).module()(tokens)[0].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_it_writes_what_transformers_writes(name, lowered, continued):
    prompt, wanted = continued(name)
    with RUNTIME.open(lowered(name)) as session:
        assert list(generate(session.stepper, prompt, 32)) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_itself_writes_the_same(name, lowered):
    with RUNTIME.open(lowered(name)) as session:
        # Whole chunks, a remainder, and a prompt that leaves less than a chunk.
        for text, new in ((TEXT, 32), (TEXT[:3], 20), ((TEXT * 3)[:59], 4)):
            prompt = session.engine.tokens_of(text)
            assert len(prompt) == len(text)
            session.stepper.reset()
            wanted = list(generate(session.stepper, prompt, new, eos=(1,)))
            assert session.engine.write(text, new) == session.engine.text_of([item for item in wanted if item != 1])


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.heavy)])
def test_a_text_is_scored_through_prefill_decode_and_cache(name, decoder_model, lowered):
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(5))
    with RUNTIME.open(lowered(name)) as session:
        found = session.run({"input_ids": tokens.numpy()})["logits"]
    wanted = _reference(decoder_model(name), tokens)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("encoding", "activations", "closeness"),
    [
        pytest.param(Affine(8), "float", 1e-4, marks=pytest.mark.heavy),
        pytest.param(Affine(4, True, "group", 32), "dynamic", 0.1, marks=pytest.mark.heavy),
        pytest.param(Affine(4), "dynamic", 0.1, marks=pytest.mark.heavy),
        pytest.param(Float(16), "float", 1e-4, marks=pytest.mark.heavy),
    ],
)
def test_weights_are_stored_as_decided_and_once(encoding, activations, closeness, decoder_model, tmp_path):
    # Its layers lie transposed in the checkpoint, and its table of positions is looked up at run time.
    model, encoded = _decided(decoder_model("gpt2"), encoding, tmp_path)
    artifact = DecoderToLiteRTLM(CONTEXT, 8, activations).run(model, Context(tmp_path))
    stored = RUNTIME.read_weights(artifact)
    assert stored.keys() >= encoded.keys()
    for name, tensor in encoded.items():
        assert same_numbers(tensor, stored[name]) == ""
    shared = {placement.stored for placement in artifact.placements}
    file, graphs, _ = open_graphs(artifact.path)
    assert graphs.keys() == {"decode", "prefill_8", "prefill_1"}
    buffers = {name: set() for name in shared}
    for number in graphs.values():
        graph = file.root.Subgraphs(number)
        for index in range(graph.TensorsLength()):
            name = graph.Tensors(index).Name().decode()
            if name in shared:
                buffers[name].add(graph.Tensors(index).Buffer())
    assert all(len(found) == 1 for found in buffers.values())
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(5))
    wanted = _reference(model, tokens)
    with RUNTIME.open(artifact) as session:
        found = session.run({"input_ids": tokens.numpy()})["logits"]
    assert np.linalg.norm(found - wanted) < closeness * np.linalg.norm(wanted)


@pytest.mark.heavy
def test_the_same_model_gives_the_same_bytes(decoder_model, lowered, tmp_path):
    again = DecoderToLiteRTLM(CONTEXT, 8).run(decoder_model("llama"), Context(tmp_path))
    assert again.path.read_bytes() == lowered("llama").path.read_bytes()


def test_the_containers_own_reader_finds_what_the_engine_must_know(lowered):
    import io

    from litert_lm_builder.litertlm_peek import read_litertlm_header
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    path = lowered("llama").path
    header = read_litertlm_header(str(path), io.StringIO())
    first = header.SectionMetadata().Objects(0)
    found = llm_metadata_pb2.LlmMetadata()
    found.ParseFromString(path.read_bytes()[first.BeginOffset() : first.EndOffset()])
    assert found.max_num_tokens == CONTEXT
    assert [list(item.token_ids.ids) for item in found.stop_tokens] == [[1]]
    # The tokenizer has an id for the start of a text, and does not put it there.
    assert not found.HasField("start_token")


def _with_metadata(artifact, decoder, origin, path):
    """The same model with what the engine must know taken from another folder."""
    _, _, model = open_graphs(artifact.path)
    content = artifact.path.read_bytes()[model.start : model.start + model.size]
    sections = [
        metadata_section(decoder, origin, CONTEXT),
        tokenizer_section(origin / "tokenizer.json"),
        Section("TFLiteModel", lambda file: file.write(content), {"model_type": PREFILL_DECODE}),
    ]
    write_container(path, sections)
    return dataclasses.replace(artifact, path=path)


def test_what_starts_a_text_is_told_to_the_engine(family, decoder_model, lowered, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(family("llama") / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    decoder = TorchProgram.open(decoder_model("llama")).record.decoder
    with RUNTIME.open(_with_metadata(lowered("llama"), decoder, tmp_path, tmp_path / "begun.litertlm")) as session:
        wanted = list(generate(session.stepper, tokenizer.encode(TEXT).ids, 20, eos=(1,)))
        assert session.engine.write(TEXT, 20) == session.engine.text_of(wanted)
        assert session.engine.write(TEXT, 20) != "", "an empty text proves nothing"
        session.stepper.reset()
        assert list(generate(session.stepper, tokenizer.encode(TEXT).ids[1:], 20, eos=(1,))) != wanted


@pytest.fixture(scope="module")
def engine(lowered):
    from litert_lm import Backend, Engine

    with Engine(str(lowered("llama").path), backend=Backend.CPU(thread_count=1), cache_dir=":nocache") as opened:
        yield opened


TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": 'Hello  there\n"quoted" \\ {{x}} é🙂 '},
    {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n An answer\t<b> "},
    {"role": "user", "content": "And?"},
]
CALL = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "3"},
    {"role": "user", "content": "So?"},
]
TOOL = {"type": "function", "function": {"name": "add", "description": 'Adds "two".', "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", ["chatml", "blocks", "headers", "turns", "thinking", "inst"])
def test_the_engine_renders_a_conversation_as_transformers_does(name, engine, chat_templates):
    own = ChatTemplate(chat_templates[name], {"bos_token": "<s>", "eos_token": "</s>"}, {})
    written = litert_template(own)
    for messages in (TALK, TALK[1:], TALK[1:2], TALK[:2]):
        with engine.create_conversation(chat_template=written, messages=messages[:-1]) as talk:
            # The engine makes a list of parts of each content.
            assert talk.render_message_to_string(messages[-1]) == own.render(messages)


def test_tools_are_rendered_as_transformers_does(engine, chat_templates):
    import litert_lm

    class Add(litert_lm.Tool):
        def get_tool_description(self):
            return TOOL

        def execute(self, param):
            return 3

    own = ChatTemplate(chat_templates["headers"], {"bos_token": "<s>"}, {})
    with engine.create_conversation(chat_template=litert_template(own), messages=CALL[:-1], tools=[Add()]) as talk:
        assert talk.render_message_to_string(CALL[-1]) == own.render(CALL, tools=[TOOL])
    answer = {"role": "tool", "content": [{"type": "tool_response", "name": "add", "response": "3"}]}
    with engine.create_conversation(chat_template=litert_template(own), messages=CALL[:2], tools=[Add()]) as talk:
        assert talk.render_message_to_string(answer) == own.render(CALL[:3], tools=[TOOL])


@pytest.mark.parametrize(("name", "stop"), [("turns", "<end_of_turn>"), ("blocks", "</s>")])
def test_what_stands_behind_an_answer_is_in_the_next_turn(name, stop, engine, chat_templates):
    own = ChatTemplate(chat_templates[name], {"bos_token": "<s>", "eos_token": "</s>"}, {stop: 1})
    with engine.create_conversation(chat_template=litert_template(own), max_output_tokens=4) as talk:
        said = talk.send_message("Hi")
        reply = str(said)
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply}]
        whole = own.render([*turns, {"role": "user", "content": "And?"}])
        # The token that ends an answer is in the engine's cache already.
        behind = own.render(turns, answering=False).rpartition(stop)[0] + stop
        assert whole.startswith(behind)
        assert talk.render_message_to_string("And?") == whole[len(behind) :]


@pytest.mark.parametrize("named", [True, False])
def test_a_conversation_begins_with_one_start_token(named, family, decoder_model, lowered, tmp_path):
    from litert_lm import Backend, Engine
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(family("llama") / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 0)])
    tokenizer.add_special_tokens(["!"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "!"}')
    source = "{{ bos_token }}" if named else ""
    (tmp_path / "chat_template.jinja").write_text(source + "{% for m in messages %}{{ m.content }}{% endfor %}")
    decoder = dataclasses.replace(TorchProgram.open(decoder_model("llama")).record.decoder, bos=0)
    artifact = _with_metadata(lowered("llama"), decoder, tmp_path, tmp_path / "begun.litertlm")
    template = ChatTemplate.read(tmp_path)
    tokens = tokenizer.encode(template.render([{"role": "user", "content": "Hello"}]), add_special_tokens=False).ids
    assert tokens[:1] == [0] if named else 0 not in tokens
    with (
        Engine(str(artifact.path), backend=Backend.CPU(thread_count=1), cache_dir=":nocache") as opened,
        opened.create_conversation(max_output_tokens=1) as talk,
    ):
        talk.send_message("Hello")
        assert talk.token_count == len(tokens) + 1


def test_it_is_timed_in_the_engine(lowered):
    with RUNTIME.open_fast(lowered("llama")) as session:
        times = session.time_text(list(range(40, 60)), 12)
        behind = session.time_text(list(range(40, 50)), 12, list(range(50, 70)))
    assert (times.prompt, times.decoded, behind.prompt, behind.decoded) == (20, 11, 10, 11)
    assert min(times.prefill_s, times.decode_s, behind.prefill_s, behind.decode_s) > 0
    assert times.tokens


def test_damage_is_named(lowered, tmp_path):
    good = lowered("llama")
    content = good.path.read_bytes()
    broken = dataclasses.replace(good, path=tmp_path / "broken.litertlm")
    other = dataclasses.replace(good, language=dataclasses.replace(good.language, context=32))
    with pytest.raises(ArtifactError, match="another context"):
        RUNTIME.open(other)
    for damaged in (b"", b"LITERTLM", content[:5000], content[:-500], b"X" + content[1:], content[:24] + b"\xff" * 9):
        broken.path.write_bytes(damaged)
        for use in (RUNTIME.open, RUNTIME.open_fast, RUNTIME.read_weights):
            with pytest.raises(ArtifactError):
                use(broken)


def test_a_flipped_byte_is_refused_or_survived(lowered, tmp_path):
    good = lowered("llama")
    content = good.path.read_bytes()
    broken = dataclasses.replace(good, path=tmp_path / "broken.litertlm")
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        place = draw.randrange(600)
        broken.path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
        )
        try:
            RUNTIME.open(broken).close()
        except ArtifactError:
            refused += 1
    assert refused > 10


def test_what_cannot_be_is_refused_before_anything_is_written(decoder_model, tmp_path):
    with pytest.raises(UsageError, match="--context 4096 is not among the 128 positions"):
        DecoderToLiteRTLM(4096).run(decoder_model("llama"), Context(tmp_path))
    with pytest.raises(UsageError, match="a chunk of 65 tokens does not fit a context of 64"):
        DecoderToLiteRTLM(64, 65).run(decoder_model("llama"), Context(tmp_path))
    assert not list(tmp_path.iterdir())


def test_static_activations_are_refused_and_the_rest_is_litert():
    assert "caches" in RUNTIME.holds("linear", Affine(8), "int8")
    assert RUNTIME.holds("linear", Affine(4, True, "group", 32), "dynamic") == ""
    assert "dynamic activations" in RUNTIME.holds("linear", Affine(4, True, "group", 32), "float")
    assert RUNTIME.container_bits("linear", Affine(3)) == 4
