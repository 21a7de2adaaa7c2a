"""Name the language of a text with the ONNX model of a bundle and the tokenizer beside this file.

python samples/language_id/run.py bundles/language_id "Bitte geben Sie eine Adresse ein."
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

FOLDER = Path(__file__).parent


def main(bundle: Path, text: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    artifact = next(item for item in manifest["artifacts"] if item["runtime"] == "onnx")
    specs = {spec["name"]: spec for spec in artifact["signature"]["inputs"]}
    length = specs["input_ids"]["shape"][1]
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_token="[PAD]")
    encoded = tokenizer.encode(text)
    feeds = {
        "input_ids": np.array([encoded.ids], np.int64),
        "attention_mask": np.array([encoded.attention_mask], np.int64),
    }
    logits = onnxruntime.InferenceSession(bundle / artifact["main"]).run(["logits"], feeds)[0][0]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    names = json.loads((FOLDER / "config.json").read_text())["id2label"]
    for index in np.argsort(-shares)[:3]:
        print(f"{names[str(index)]}  {shares[index]:.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
