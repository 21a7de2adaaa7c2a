"""The committed storyteller loads from its folder, writes, and is described as it is."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "samples" / "storyteller"
# Of the held-out part: Gonzalo in The Tempest.
UNSEEN = """GONZALO:
I' the commonwealth I would by contraries
Execute all things; for no kind of traffic
Would I admit; no name of magistrate;
Letters should not be known; riches, poverty,
And use of service, none;
"""


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "model")


def test_size_of_the_folder():
    files = {path.name: path.stat().st_size for path in (FOLDER / "model").iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(files.values()) < 8_000_000


def test_tokenizer_begins_a_text_and_spells_anything(tokenizer):
    for text in ("ROMEO:\nWhat light is this?\n", "  tabs\tand  spaces \n\n", "Grüße, 世界 \U0001f30d", ""):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 0
        assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text
    assert len(tokenizer) == 1024


@torch.no_grad()
def test_held_out_lines_are_likelier_than_their_words_shuffled(model, tokenizer):
    order = torch.randperm(len(UNSEEN.split()), generator=torch.Generator().manual_seed(0))
    losses = []
    for text in (UNSEEN, " ".join(UNSEEN.split()[i] for i in order)):
        ids = tokenizer(text, return_tensors="pt").input_ids
        losses.append(float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1) / len(text))
    assert losses[0] < 0.8 * losses[1]


def test_greedy_writes_a_play_with_and_without_a_cache(model, tokenizer):
    ids = tokenizer("ROMEO:\n", return_tensors="pt").input_ids
    cached = model.generate(ids, max_new_tokens=48, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=48, do_sample=False, use_cache=False))
    assert len(set(cached[0].tolist())) > 15


def test_readme_says_what_was_measured():
    measured = json.loads((FOLDER / "eval.json").read_text())
    text = " ".join((FOLDER / "README.md").read_text().split())
    assert f"**{measured['perplexity_per_token']:.1f}**" in text
    assert f"**{measured['bits_per_byte']:.2f}**" in text
    assert f"{measured['held_out']['tokens']:,} tokens" in text
    for package, version in measured["versions"].items():
        assert f"{package} {version.partition('+')[0]}" in text
