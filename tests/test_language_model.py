"""The storyteller from its folder to a conversation, as a user would do it, and what is refused on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgeship.conversation import open_conversation
from edgeship.core.artifact import file_digest
from edgeship.core.decoder import LanguageFacts
from edgeship.core.records import from_plain, to_plain
from edgeship.errors import UsageError
from edgeship.shipping.bundle import read_bundle

pytestmark = pytest.mark.xdist_group("storyteller")


def as_version_1(bundle: Path) -> None:
    """A bundle as it was written before what is special of a language model had a record of its own."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["schema_version"] = 1
    for record in manifest["artifacts"]:
        record["facts"] |= from_plain(LanguageFacts, record.pop("language")).texts()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / "manifest.sha256").write_text(f"{file_digest(bundle / 'manifest.json')}  manifest.json\n")


@pytest.fixture
def built(storyteller):
    return storyteller


def test_the_bundle_says_what_it_holds(built) -> None:
    bundle, ran = built
    manifest = json.loads((bundle / "manifest.json").read_text())
    (record,) = manifest["artifacts"]
    assert (record["runtime"], record["main"], record["language"]["context"]) == ("genai", "genai/genai", 256)
    assert (bundle / "tokenizer" / "tokenizer.json").is_file()
    assert "tokens/s" in ran.out
    assert "perplexity" in ran.out
    report = json.loads((bundle / "report.json").read_text())
    figures = {item["name"]: item["value"] for v in report["rows"][0]["verdicts"] for item in v["measurements"]}
    # 5 layers x 2 heads x 32 numbers, keys and values, float32, 256 positions.
    assert figures["memory_cache"] == 5 * 2 * 32 * 2 * 4 * 256
    assert figures["longest_context"] == 512


def test_it_talks_and_is_timed(built, cli) -> None:
    bundle, _ = built
    said = cli("chat", str(bundle), "--plain", "--prompt", "ROMEO:", "--max-tokens", "12")
    again = cli("chat", str(bundle), "--plain", "--prompt", "ROMEO:", "--max-tokens", "12")
    assert said.code == 0, said.err
    assert len(said.out.strip()) > 10
    assert said.out == again.out
    drawn = {
        cli(
            "chat",
            str(bundle),
            "--plain",
            "--prompt",
            "ROMEO:",
            "--max-tokens",
            "12",
            "--temperature",
            "1.5",
            "--seed",
            seed,
        ).out
        for seed in "123"
    }
    assert len(drawn) > 1
    estimated = json.loads(cli("bench", str(bundle), "--device", "estimate:linux-x86", "--json").out)
    assert [(row["name"], row["how"], row["unit"]) for row in estimated] == [
        ("prefill", "estimated", "tokens/s"), ("decode", "estimated", "tokens/s"),
    ]  # fmt: skip
    assert all(row["low"] <= row["value"] <= row["high"] for row in estimated)
    timed = cli("bench", str(bundle), "--prompt", "32", "--new", "8", "--depth", "0,64,255", "--runs", "2", "--json")
    assert timed.code == 0, timed.err
    figures = {item["name"]: item for item in json.loads(timed.out)}
    assert figures["decode"]["value"] > 1
    assert figures["decode@64"]["low"] <= figures["decode@64"]["value"] <= figures["decode@64"]["high"]
    assert any("do not fit 256 positions" in item["note"] for item in figures.values())


def test_the_bundle_verifies_and_shows_a_changed_byte(built, cli, tmp_path) -> None:
    bundle, _ = built
    assert cli("verify", str(bundle)).code == 0
    broken = tmp_path / "b"
    shutil.copytree(bundle, broken)
    path = broken / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("a", "b", 1))
    ran = cli("chat", str(broken), "--prompt", "x")
    assert ran.code != 0
    assert "tokenizer" in ran.errors[0]


@pytest.fixture(scope="module")
def poet(tmp_path_factory):
    """A random adapter for the storyteller."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("poet")
    torch.manual_seed(0)
    made = {}
    for layer in range(5):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        made |= {f"{stem}.lora_A.weight": torch.randn(4, 192) * 0.1, f"{stem}.lora_B.weight": torch.randn(192, 4) * 0.3}
    save_file(made, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


def test_an_adapter_ships_beside_its_base(poet, cli, root, tmp_path) -> None:
    given = ("--target", "linux-x86", "--adapter", f"poet={poet}", "-o", str(tmp_path / "b"), "--profile", "small")
    refused = cli("build", "samples/storyteller", *given, cwd=root)
    assert "LiteRT-LM loads no adapters beside a model; --lora merges one" in refused.errors[0]
    refused = cli("build", "samples/storyteller", *given, "--runtime", "onnx", "--kv-cache", "int8", cwd=root)
    assert "the scales of an int8 cache are the base's" in refused.errors[0]
    ran = cli("build", "samples/storyteller", *given, "--runtime", "onnx", cwd=root)
    assert ran.code == 0, ran.err
    (record,) = json.loads((tmp_path / "b" / "manifest.json").read_text())["artifacts"]
    assert record["language"]["adapters"] == ["poet"]
    as_version_1(tmp_path / "b")
    (read,) = read_bundle(tmp_path / "b").manifest.artifacts
    assert to_plain(read.language) == record["language"]
    assert cli("verify", tmp_path / "b", "--no-run").code == 0
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    figures = {item["name"]: item["value"] for v in report["rows"][0]["verdicts"] for item in v["measurements"]}
    assert figures["adapter_poet_snr"] > 18
    say = ("chat", str(tmp_path / "b"), "--plain", "--prompt", "ROMEO:", "--max-tokens", "12")
    assert cli(*say).out != cli(*say, "--adapter", "poet").out
    assert "genai has no adapter 'cook'; it has poet" in cli(*say, "--adapter", "cook").errors[0]


def test_an_adapter_of_another_base_is_refused_before_anything_is_converted(poet, cli, root, tmp_path) -> None:
    import torch
    from safetensors.torch import save_file

    other = tmp_path / "other"
    shutil.copytree(poet, other)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{stem}.lora_A.weight": torch.ones(4, 64), f"{stem}.lora_B.weight": torch.ones(64, 4)},
        other / "adapter_model.safetensors",
    )
    given = ("--target", "linux-x86", "--runtime", "onnx", "--adapter", f"other={other}", "--dry-run")
    ran = cli("build", "samples/storyteller", *given, cwd=root)
    assert ran.code != 0
    assert "belongs to another base" in ran.errors[0]


@pytest.mark.heavy
def test_an_adapter_that_the_engine_ignores_is_found(poet, cli, root, tmp_path, monkeypatch) -> None:
    import onnxruntime_genai

    # A weak one, whose answers lie within the noise of 4 bits.
    config = json.loads((poet / "adapter_config.json").read_text())
    weak = tmp_path / "weak"
    shutil.copytree(poet, weak)
    (weak / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0.2}))
    given = ("--target", "linux-x86", "--adapter", f"weak={weak}", "--runtime", "onnx", "--profile", "small")
    ran = cli("build", "samples/storyteller", *given, "-o", str(tmp_path / "good"), cwd=root)
    assert ran.code == 0, ran.err
    monkeypatch.setattr(onnxruntime_genai.Generator, "set_active_adapter", lambda *_: None)
    ran = cli("build", "samples/storyteller", *given, "-o", str(tmp_path / "bad"), "--no-cache", cwd=root)
    assert ran.code != 0
    assert "does not bring the answers nearer" in ran.err


@pytest.mark.parametrize("runtime", ["onnx", pytest.param("tflite", marks=pytest.mark.heavy)])
def test_a_context_below_the_usual_text_is_built(runtime, cli, root, tmp_path) -> None:
    given = ("--target", "linux-x86", "--runtime", runtime, "--context", "24", "-o", str(tmp_path / "b"))
    ran = cli("build", "samples/storyteller", *given, cwd=root)
    assert ran.code == 0, ran.err


def test_what_does_not_fit_the_context_is_refused(built) -> None:
    with pytest.raises(UsageError, match="build it with --adapter"), open_conversation(built[0], adapter="poet"):
        pass
    with open_conversation(built[0], "onnx", plain=True) as talk:
        assert talk.say("ROMEO:", 4) is not None
        with pytest.raises(UsageError, match=r"this message is .* tokens, and the context holds 256"):
            list(talk.say("my lord " * 400, 4))
        assert "".join(talk.say("JULIET:", 6))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--context", "5000"), "not among the 512 positions"),
        (("--kv-cache", "int8"), "LiteRT-LM keeps keys and values in float32, not in int8; .*leave litert-lm out"),
        (("--kv-cache", "int4"), "int4"),
        (
            ("--target", "iphone15pro", "--runtime", "coreai", "--profile", "small", "--kv-cache", "float32"),
            "computes in float16, and its cache is as wide, not float32",
        ),
        (("--adapter", "poet"), "'poet' is not NAME=DIR"),
        (("--adapter", "a,b=samples"), "is not NAME=DIR"),
        (("--adapter", "poet=nowhere"), "has no adapter_config.json"),
        (("--lora", "nowhere"), "has no adapter_config.json"),
        (("--runtime", "qnn"), "does not run qnn|no engine for language models"),
        (("--set", "load/decoder.tokens=9999"), "the model has 512 positions"),
        (("--set", "lower/decoder_to_genai.context=12"), "change --context instead"),
    ],
)
def test_orders_that_cannot_be_met_are_refused(cli, root, tmp_path, arguments, error) -> None:
    ran = cli("build", "samples/storyteller", "--target", "linux-x86", "-o", str(tmp_path / "b"), *arguments, cwd=root)
    assert ran.code not in (0, 1)
    assert len(ran.errors) == 1
    import re

    assert re.search(error, ran.errors[0]), ran.errors
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (("chat", "samples"), "holds no manifest.json"),
        (
            ("build", "samples/digits_cnn", "--target", "linux-x86", "--context", "64"),
            "--context is for language models",
        ),
        (
            ("build", "samples/digits_cnn", "--target", "linux-x86", "--kv-cache", "int8"),
            "--kv-cache is for language models",
        ),
        (
            ("build", "samples/digits_cnn", "--target", "linux-x86", "--adapter", "a=x"),
            "--adapter is for language models",
        ),
        (("build", "samples/digits_cnn", "--target", "linux-x86", "--lora", "x"), "--lora is for language models"),
        (("build", "samples/digits_cnn", "--target", "linux-x86", "--runtime", "genai"), "runs language models only"),
    ],
)
def test_networks_are_no_language_models(cli, root, command, error) -> None:
    ran = cli(*command, cwd=root)
    assert ran.code != 0
    assert error in ran.errors[0]
