"""The committed language identifier loads as any Hugging Face folder does, and is as accurate as its README says."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "samples" / "language_id"
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    found = transformers.AutoModelForSequenceClassification.from_pretrained(FOLDER, local_files_only=True)
    return found.float().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_accuracy_on_held_out_strings(model):
    data = np.load(FOLDER / "eval.npz")
    ids, mask = torch.from_numpy(data["input_ids"]), torch.from_numpy(data["attention_mask"])
    with torch.no_grad():
        answers = torch.cat(
            [model(input_ids=ids[rows], attention_mask=mask[rows]).logits for rows in torch.arange(620).split(124)]
        ).argmax(1)
    accuracy = float((answers.numpy() == data["label"]).mean())
    stated = float(re.search(r"\*\*(\d+\.\d) %\*\*", (FOLDER / "README.md").read_text())[1]) / 100
    assert stated > 0.9
    assert accuracy == pytest.approx(stated, abs=0.005)


def test_evaluation_has_every_language_and_none_of_the_calibration(model):
    data = np.load(FOLDER / "eval.npz")
    assert data["input_ids"].shape == (620, 64)
    assert np.bincount(data["label"]).tolist() == [20] * model.config.num_labels
    calibration = {row.tobytes() for row in np.load(FOLDER / "calibration.npz")["input_ids"]}
    assert len(calibration) > 100
    assert not any(row.tobytes() in calibration for row in data["input_ids"])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Please enter a valid email address.", "en"),
        ("Bitte geben Sie eine gültige Adresse ein.", "de"),
        ("Veuillez saisir une adresse valide.", "fr"),
        ("このフィールドは必須です。", "ja"),
        ("Пожалуйста, исправьте ошибки ниже.", "ru"),
    ],
)
def test_answers_for_text_that_people_type(model, tokenizer, text, language):
    encoded = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded["input_ids"].shape == (1, 64)
    with torch.no_grad():
        logits = model(**encoded).logits
    assert model.config.id2label[int(logits.argmax())] == language


def test_sample_file_describes_the_data(tokenizer):
    sample = tomllib.loads((FOLDER / "sample.toml").read_text())
    data = np.load(FOLDER / sample["evaluation"])
    assert {text.split(":")[0] for text in sample["inputs"]} | {"label"} == set(data.files)
    assert sample["input"]["input_ids"]["high"] == len(tokenizer) - 1
    assert data["input_ids"].max() <= sample["input"]["input_ids"]["high"]


def test_folder_is_small():
    assert (FOLDER / "model.safetensors").stat().st_size < 3_000_000
