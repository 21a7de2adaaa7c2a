"""Train the language identifier and write the Hugging Face folder, eval.npz and calibration.npz beside this file.

The data are the interface strings that Django ships in its message catalogues, one language a catalogue.
Needs Django and transformers: pip install "edgeship[train,huggingface]". About five minutes on one CPU core.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import struct
from collections import Counter
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import django
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
SEED = 20261122
# Catalogue -> label. Near twins (es_MX beside es, sr_Latn beside hr) are left out: interface text cannot part them.
LANGUAGES = {
    "ar": "ar", "bg": "bg", "cs": "cs", "da": "da", "de": "de", "el": "el", "es": "es", "et": "et", "fi": "fi",
    "fr": "fr", "he": "he", "hi": "hi", "hu": "hu", "id": "id", "it": "it", "ja": "ja", "ko": "ko", "lt": "lt",
    "lv": "lv", "nl": "nl", "pl": "pl", "pt": "pt", "ro": "ro", "ru": "ru", "sl": "sl", "sv": "sv", "tr": "tr",
    "uk": "uk", "vi": "vi", "zh_Hans": "zh",
}  # fmt: skip
LABELS = sorted({"en", *LANGUAGES.values()})
VOCABULARY = 4096
TOKENS = 64
STEPS = 1500
BATCH = 64
TEST_PERCENT = 20
EVAL_ROWS_PER_LANGUAGE = 20
MIN_LETTERS = 10


def main() -> None:
    """Train, print the test accuracy, write the files."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    train, test = split(collect())
    tokenizer = make_tokenizer([text for text, _ in train])
    model = DistilBertForSequenceClassification(configuration())
    fit(model, tokenizer, train)
    model = model.half().float()
    ids, mask = encode(tokenizer, [text for text, _ in test])
    labels = np.array([LABELS.index(language) for _, language in test])
    print(f"{len(train)} strings to train on, {len(test)} held out, {len(LABELS)} languages")
    print(f"test accuracy {accuracy(model, ids, mask, labels):.4f} over all held-out strings")
    write(model, tokenizer, train, (ids, mask, labels))


def collect() -> dict[str, dict[str, set[str]]]:
    """Message id -> language -> cleaned texts. English is the message ids themselves."""
    messages: dict[str, dict[str, set[str]]] = {}
    for path in sorted(Path(django.__file__).parent.rglob("LC_MESSAGES/*.mo")):
        language = LANGUAGES.get(path.parts[-3])
        if language is None:
            continue
        for key, value in read_catalogue(path).items():
            source = key.split("\4")[-1].split("\0")
            if not source[0]:
                continue
            entry = messages.setdefault(source[0], {"en": {clean(text) for text in source}})
            entry.setdefault(language, set()).update(clean(text) for text in value.split("\0"))
    return messages


def read_catalogue(path: Path) -> dict[str, str]:
    """A GNU .mo file as a dict; plural forms stay joined by NUL (format: GNU gettext manual, "MO files")."""
    data = path.read_bytes()
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, originals, translations = struct.unpack_from(order + "3I", data, 8)

    def text(table: int, row: int) -> str:
        length, offset = struct.unpack_from(order + "2I", data, table + 8 * row)
        return data[offset : offset + length].decode()

    return {text(originals, row): text(translations, row) for row in range(count)}


def clean(text: str) -> str:
    """Without placeholders, markup and marks of the interface, in one line."""
    text = re.sub(r"%\([^)]*\)[a-z]|%[a-z]|\{[^}]*\}|<[^>]*>|&[a-z]+;", " ", text)
    return " ".join(re.sub(r"[`“”\"“„«»*_|#<>]", " ", text).split())


def split(messages: dict[str, dict[str, set[str]]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Strings to train on and to test on. A message id is on one side for all languages, and so is every text."""
    owners: dict[str, set[str]] = {}
    for entry in messages.values():
        for language, texts in entry.items():
            for text in texts:
                owners.setdefault(text.casefold(), set()).add(language)
    sides: tuple[dict[str, tuple[str, str]], dict[str, tuple[str, str]]] = ({}, {})
    for key, entry in sorted(messages.items()):
        held_out = hashlib.sha256(key.encode()).digest()[0] * 100 < TEST_PERCENT * 256
        for language, texts in sorted(entry.items()):
            for text in sorted(texts):
                # Ideographs carry a syllable or more each, so fewer of them make a sentence.
                letters = sum(3 if ord(letter) >= 0x3040 else 1 for letter in text if letter.isalpha())
                if letters >= MIN_LETTERS and owners[text.casefold()] == {language}:
                    sides[held_out].setdefault(text.casefold(), (text, language))
    train = list(sides[0].values())
    test = [row for key, row in sides[1].items() if key not in sides[0]]
    return train, test


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens, lower-casing first: any text in any script has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        model_max_length=TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def configuration() -> DistilBertConfig:
    """Three layers, 128 wide."""
    return DistilBertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        dim=128,
        hidden_dim=384,
        n_layers=3,
        n_heads=4,
        dropout=0.1,
        attention_dropout=0.0,
        seq_classif_dropout=0.1,
        pad_token_id=0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, both (N, length) int64."""
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return batch["input_ids"].astype(np.int64), batch["attention_mask"].astype(np.int64)


def excerpt(text: str) -> str:
    """A run of words of a text, or of letters where a script has no spaces: people type less than a sentence."""
    parts = text.split(" ")
    joiner = " "
    if len(parts) < 4 and len(text) > 8 and ord(max(text)) >= 0x3040:
        parts, joiner = list(text), ""
    if len(parts) < 4 or random.random() < 0.3:
        return text
    size = random.randint(3, min(len(parts), 12 if joiner else 20))
    start = random.randint(0, len(parts) - size)
    return joiner.join(parts[start : start + size])


def fit(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]) -> None:
    """AdamW with a one-cycle rate over batches in which each language is as likely as another."""
    count = Counter(language for _, language in rows)
    weights = [count[language] ** -0.5 for _, language in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.15)
    model.train()
    for step in range(STEPS):
        chosen = random.choices(rows, weights, k=BATCH)
        ids, mask = encode(tokenizer, [excerpt(text) for text, _ in chosen], 40)
        used = int(mask.sum(1).max())
        labels = torch.tensor([LABELS.index(language) for _, language in chosen])
        logits = model(
            input_ids=torch.from_numpy(ids[:, :used]), attention_mask=torch.from_numpy(mask[:, :used])
        ).logits
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f}", flush=True)
    model.eval()


def accuracy(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose largest logit is the label."""
    right = 0
    with torch.no_grad():
        for rows in np.array_split(np.arange(len(labels)), max(1, len(labels) // 128)):
            logits = model(input_ids=torch.from_numpy(ids[rows]), attention_mask=torch.from_numpy(mask[rows])).logits
            right += int((logits.argmax(1).numpy() == labels[rows]).sum())
    return right / len(labels)


def write(
    model: DistilBertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    train: list[tuple[str, str]],
    test: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """The model in float16, the tokenizer, an even sample of the held-out strings, and calibration rows."""
    rng = np.random.default_rng(SEED)
    ids, mask, labels = test
    chosen = np.sort(
        np.concatenate(
            [rng.permutation(np.flatnonzero(labels == label))[:EVAL_ROWS_PER_LANGUAGE] for label in range(len(LABELS))]
        )
    )
    share = accuracy(model, ids[chosen], mask[chosen], labels[chosen])
    print(f"test accuracy {share:.4f} on {len(chosen)} rows of eval.npz")
    np.savez_compressed(FOLDER / "eval.npz", input_ids=ids[chosen], attention_mask=mask[chosen], label=labels[chosen])
    texts = [train[index][0] for index in rng.permutation(len(train))[:128]]
    calibration_ids, calibration_mask = encode(tokenizer, texts)
    np.savez_compressed(FOLDER / "calibration.npz", input_ids=calibration_ids, attention_mask=calibration_mask)
    model.half().save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
