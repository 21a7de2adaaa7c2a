"""all-MiniLM-L6-v2 in 8 and 4 bits: cosine of sentence embeddings to the float model's, on the saved artifacts.

python benchmarks/encoder.py [--sentences 500]
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import numpy as np
from builds import build, sets
from models import SHARED, minilm_folder
from results import write_page

TOKENS, CALIBRATION = 48, 128
HERE = Path(__file__).resolve().parent
GROUPED = {"bits": 4, "granularity": "group", "group_size": 32}
# (encoding, wanted cosine, runtime, options)
CELLS = [
    ("int8 per channel", 0.995, "onnx", ["--profile", "balanced"]),
    ("int8 per channel", 0.995, "tflite", ["--profile", "balanced"]),
    ("int8 per channel", 0.995, "coreml", ["--profile", "balanced"]),
    ("int8 per channel", 0.995, "coreai", ["--profile", "balanced"]),
    ("4 bits, groups of 32, nearest", 0.0, "onnx", ["--profile", "balanced", *sets(**GROUPED, method="nearest")]),
    ("4 bits, groups of 32, GPTQ", 0.97, "onnx", ["--profile", "balanced", *sets(**GROUPED, method="gptq")]),
    ("4 bits, groups of 32, GPTQ, dynamic activations", 0.97, "tflite", ["--profile", "small"]),
    ("4 bits, groups of 32, GPTQ", 0.97, "coreml", ["--profile", "balanced", *sets(**GROUPED, method="gptq")]),
    ("palette of 4 bits per 8 channels, GPTQ", 0.97, "coreml", ["--profile", "small"]),
    ("palette of 4 bits per 8 channels, GPTQ", 0.97, "coreai", ["--profile", "small"]),
]  # fmt: skip
# Core ML's evaluator and Core AI's reference runtime take a second a sentence.
LIMITS = {"onnx": 100_000, "tflite": 100_000, "coreml": 250, "coreai": 100}


def source(folder: Path, sentences: int) -> list[str]:
    """The model with its data, as arguments of ``edgeship build``: sentences of WikiText-2."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    paths = []
    for name, file, count in (
        ("calibration", "wikitext2.valid.txt", CALIBRATION),
        ("eval", "wikitext2.test.txt", sentences),
    ):
        text = (SHARED / "text" / file).read_text(encoding="utf-8")
        found = [part.strip() for part in re.split(r"(?<= \.) |\n", text)]
        found = [part for part in found if 30 <= len(part) <= 300 and not part.startswith("=")]
        chosen = [found[i * len(found) // count] for i in range(count)]
        encoded = tokenizer.encode_batch(chosen)
        path = folder / f"{name}.npz"
        np.savez(
            path,
            input_ids=np.array([item.ids for item in encoded], np.int64),
            attention_mask=np.array([item.attention_mask for item in encoded], np.int64),
        )
        paths.append(str(path))
    shape = f"[1,{TOKENS}]"
    return [
        f"{HERE / 'models.py'}:minilm", "--input", f"input_ids:i64{shape}", "--input", f"attention_mask:i64{shape}",
        "--calibration", paths[0], "--eval", paths[1], "--metric", "cosine", "--max-drop", "100%",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=500)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        arguments = source(Path(temporary), given.sentences)
        for label, wanted, runtime, options in CELLS:
            count = min(LIMITS[runtime], given.sentences)
            built = build(arguments, runtime, [*options, "--set", f"check/accuracy.limit={count}"])
            if "cosine" not in built.figures:
                raise SystemExit(f"{label} {runtime}: {built.error}")
            cosine = built.figures["cosine"]
            met = "" if not wanted else ("met" if cosine >= wanted else "missed")
            bits = f"{built.bits_per_weight:.2f}"
            rows.append([label, runtime, f"{cosine:.4f}", f"{wanted or ''}", met, f"{built.bytes / 1e6:.2f} MB", bits])
            print(rows[-1], flush=True)
            _write(rows, given.sentences)


def _write(rows: list[list[str]], sentences: int) -> None:
    write_page(
        "encoder", "Sentence embeddings in 8 and 4 bits", "python benchmarks/encoder.py",
        ("edgeship", "torch", "transformers", "onnxruntime", "ai-edge-litert", "coremltools", "coreai-core"),
        ("weights", "runtime", "mean cosine", "wanted", "", "file", "bits per weight"), rows,
        before=f"all-MiniLM-L6-v2 (22.7M parameters) with its mean pooling; {sentences} sentences of WikiText-2's "
        f"test text (Core ML {LIMITS['coreml']}, Core AI {LIMITS['coreai']} of them: their engines here are slow), {CALIBRATION} calibration sentences of its validation text, {TOKENS} tokens.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
