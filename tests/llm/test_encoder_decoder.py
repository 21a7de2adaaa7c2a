"""Encoder-decoders as two networks: together they write what transformers writes, in torch and in runtimes."""

from __future__ import annotations

import numpy as np
import pytest
import transformers

from edgeship.conversation import open_encoder_decoder
from edgeship.core.model import TensorSpec
from edgeship.core.registry import runtimes
from edgeship.data.batches import generate_batches
from edgeship.errors import UsageError
from edgeship.llm.encoder_decoder import EncoderDecoder, decoder_of
from edgeship.llm.generation import generate
from edgeship.program.compare import Reference

NAMES = ["t5", "whisper", "bart"]
NEW, CONTEXT, READ = 32, 40, 24


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """The folder of a small random encoder-decoder; each is written once."""
    made = {}

    def make(name):
        from families import make_encoder_decoder

        if name not in made:
            made[name] = make_encoder_decoder(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="module")
def parts(folder):
    """The programs of both parts of a model, and inputs for the encoder."""
    made = {}

    def load(name):
        import encoder_decoders

        if name not in made:
            programs, inputs = encoder_decoders.load(folder(name), name)
            made[name] = (*programs, inputs)
        return made[name]

    return load


def _written(folder, inputs):
    """The first token as a prompt, and what transformers writes after it with its own attention and cache."""
    import encoder_decoders

    first, wanted, _ = encoder_decoders.transformers_writes(folder, inputs)
    return [first], wanted


@pytest.mark.parametrize(
    "name", [name if name == "t5" else pytest.param(name, marks=pytest.mark.heavy) for name in NAMES]
)
def test_two_networks_write_what_transformers_writes(name, folder, parts):
    encoder, decoder, inputs = parts(name)
    first, wanted = _written(folder(name), inputs)
    assert len(set(wanted)) > 4
    host = EncoderDecoder(Reference(encoder), Reference(decoder), decoder.signature.inputs)
    host.take(inputs)
    assert list(generate(host, first, NEW)) == wanted
    host.reset()
    assert list(generate(host, first, 4)) == wanted[:4]
    # About something else it writes something else.
    other = generate_batches(encoder.signature, 1, seed=11)[0]
    host.take(other)
    assert list(generate(host, first, NEW)) == _written(folder(name), other)[1] != wanted


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("t5", "onnx"),
        *(
            pytest.param(name, runtime, marks=pytest.mark.heavy)
            for name in ("t5", "whisper")
            for runtime in ("onnx", "tflite", "coreml", "coreai")
            if (name, runtime) != ("t5", "onnx")
        ),
    ],
)
def test_they_write_it_in_every_runtime(name, runtime, folder, parts, tmp_path):
    import encoder_decoders

    *programs, inputs = parts(name)
    first, wanted = _written(folder(name), inputs)
    artifacts = [encoder_decoders.lower(runtime, program, tmp_path / str(i)) for i, program in enumerate(programs)]
    with runtimes()[runtime].open(artifacts[0]) as reading, runtimes()[runtime].open(artifacts[1]) as writing:
        host = EncoderDecoder(reading, writing, artifacts[1].signature.inputs)
        host.take(inputs)
        assert list(generate(host, first, NEW)) == wanted


@pytest.mark.heavy
def test_both_parts_are_built_and_written_with(folder, parts, cli, tmp_path):
    _, _, inputs = parts("t5")
    first, wanted = _written(folder("t5"), inputs)
    for part in ("encoder", "decoder"):
        more = ("--context", str(CONTEXT)) if part == "decoder" else ()
        ran = cli(
            "build", folder("t5"), "--part", part, "--input", f"input_ids:i64[1,{READ}]", "--target", "linux-x86",
            "--runtime", "onnx", "--profile", "exact", "-o", tmp_path / part, *more,
        )  # fmt: skip
        assert ran.code == 0, ran.err
    with open_encoder_decoder(tmp_path / "encoder", tmp_path / "decoder") as host:
        host.take(inputs)
        # Weights of float16 choose another token soon.
        host.recording = True
        written = list(generate(host, first, 8))
        assert (len(written), written[:2]) == (8, wanted[:2])
        host.save_steps(tmp_path / "steps.npz")
        with pytest.raises(UsageError, match="context of 40 tokens is full"):
            list(map(host.decode, [3] * 40))
        with pytest.raises(UsageError, match="nothing to write about"):
            EncoderDecoder(host, host, parts("t5")[1].signature.inputs).decode(3)
    with np.load(tmp_path / "steps.npz") as steps:
        # A row for the first token and for each that another followed.
        assert steps["position"].tolist() == [[i] for i in range(8)]
        assert steps["k_0"].shape == (8, 1, 4, CONTEXT, 16)
    asked = ("build", folder("t5"), "--part", "decoder", "--target", "galaxy-s24", "--runtime", "qnn", "--dry-run")
    # Without data Hexagon computes in float16, for which drawn caches are enough; 16-bit grids want real ones.
    ran = cli(*asked, "--activations", "int16", "--context", str(CONTEXT), "--input", f"input_ids:i64[1,{READ}]")
    assert (ran.code, "need recorded caches" in ran.err) == (2, True), ran.err
    ran = cli(
        *asked,
        "--context",
        str(CONTEXT),
        "--input",
        f"input_ids:i64[1,{READ}]",
        "--calibration",
        tmp_path / "steps.npz",
    )
    assert ran.code == 0, ran.err
    for encoder, decoder, runtime, message in (
        ("decoder", "decoder", None, "cross_k_0"),
        ("encoder", "encoder", None, "no decoder"),
        ("encoder", "decoder", "coreml", "nothing for coreml"),
    ):
        pair = open_encoder_decoder(tmp_path / encoder, tmp_path / decoder, runtime)
        with pytest.raises(UsageError, match=message), pair:
            pass


@pytest.mark.heavy
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_apple_has_them_in_half(part, folder, cli, tmp_path):
    given = ("--target", "iphone15pro", "--runtime", "coreml,coreai", "-o", tmp_path / "b")
    ran = cli("build", folder("bart"), "--part", part, *given, "--input", f"input_ids:i64[1,{READ}]")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--part", "decoder", "--context", "65"), "65 is not among the 64 positions"),
        (("--part", "decoder", "--input", "decoder_input_ids:i64[1,5]"), "a step takes one token"),
        (("--part", "encoder", "--context", "32"), "--context is for language models"),
        (("--context", "32"), "--context is for language models"),
        (("--part", "decoder", "--kv-cache", "int8"), "--kv-cache is for language models"),
    ],
)
def test_what_a_part_has_not_is_refused(options, message, folder, cli, tmp_path):
    ran = cli("build", folder("bart"), "--target", "linux-x86", "-o", tmp_path / "b", *options)
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert not (tmp_path / "b").exists()


def test_a_pair_of_models_takes_the_tokens_that_its_decoder_writes():
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    parts = [transformers.BertConfig(vocab_size=number, **tiny) for number in (60, 40)]
    model = transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    ).eval()
    _, inputs, names = decoder_of(model, [TensorSpec("input_ids", "i64", (1, 8), low=0, high=59)], 12)
    assert (inputs[0].low, inputs[0].high) == (0, 39)
    assert names == ["logits", "k_new_0", "v_new_0"]


def test_only_encoder_decoders_that_write_have_parts(family, folder, cli, tmp_path):
    ran = cli("build", family("llama"), "--part", "decoder", "--target", "linux-x86", "-o", tmp_path / "b")
    assert (ran.code, "--part is for encoder-decoders" in ran.err) == (2, True), ran.err
    shapes = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    models = (
        (transformers.T5Model(shapes), "T5Model writes no text"),
        (transformers.BertModel(transformers.BertConfig(vocab_size=60, **tiny)), "BertModel is not an encoder-decoder"),
    )
    for model, message in models:
        model.save_pretrained(tmp_path / message[:4])
        given = ("--part", "decoder", "--target", "linux-x86", "-o", tmp_path / "b", "--input", "input_ids:i64[1,8]")
        ran = cli("build", tmp_path / message[:4], *given)
        assert (ran.code, message in ran.err) == (2, True), ran.err
    given = ("--part", "encoder", "--target", "linux-x86", "-o", tmp_path / "b")
    ran = cli("build", folder("whisper"), *given, "--input", "input_features:f32[1,8,10]")
    assert "the model does not run on input_features:f32[1,8,10]" in ran.err
