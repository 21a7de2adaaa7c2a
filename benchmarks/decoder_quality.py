"""Perplexity of language models through their engines: float beside torch, and 4 bits beside onnxruntime-genai's builder.

    python benchmarks/decoder_quality.py [--model NAME] [--row LABEL] [--again]

Every figure is taken on the saved artifact, through the engine's own prefill, decode and cache, over the windows of
language.py. The builder's artifacts are made from the same folder, int4 in groups of 32, and scored by its own engine.
What is known is kept in llm-quality.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import language
import numpy as np
from builds import build, sets
from language import GROUPED, TOKENS
from models import SHARED
from results import RESULTS, write_page

KEPT = RESULTS / "llm-quality.json"
FLOAT = ["--profile", "exact", "--set", "compress/quantize.form=float32"]
HALF = ["--profile", "exact"]
# (label, engine, options, windows at most): evaluators take a few.
FLOATS = [
    ("float32", "genai", FLOAT, 60),
    ("float32", "litert-lm", FLOAT, 60),
    ("float16", "coreml-lm", HALF, 6),
    ("float16", "coreai-lm", HALF, 6),
]
GPTQ = {**GROUPED, "method": "gptq"}
ASYMMETRIC = sets(**GPTQ, symmetric="false")
# Small rounds activations while running, for speed; the builder's artifacts are measured with float activations.
FLOAT_PROFILE = """name = "float-activations"
summary = "4 bits with float activations."
[default]
weights = "int4-g32"
activations = "float"
"""
FOURS = [
    ("int4 groups of 32, GPTQ, float activations", "genai", ["--profile", "FLOAT", *sets(**GPTQ)], 60),
    ("int4 groups of 32, asymmetric, GPTQ, float activations", "genai", ["--profile", "FLOAT", *ASYMMETRIC], 60),
    ("int4 groups of 32, asymmetric, GPTQ, 8-bit activations", "genai", ["--profile", "small", *ASYMMETRIC], 60),
    ("int4 groups of 32, GPTQ, table in 8", "litert-lm", ["--profile", "small", *sets(**GPTQ)], 60),
    ("palettes of 16 for 8 channels, table in 8", "coreml-lm", ["--profile", "small"], 6),
]
BUILDER = ("rtn", "k_quant")
TARGET = {"genai": "linux-x86", "litert-lm": "linux-x86", "coreml-lm": "iphone15pro", "coreai-lm": "iphone17pro"}


def sources(folder: Path) -> Iterator[tuple[str, list[str], Path]]:
    """(name, the source with its data as arguments, the folder that the builder takes)."""
    for name, make, source in (
        ("tinystories-llama-5m", language.tinystories, SHARED / "models" / "tinystories-llama-5m"),
        ("stories260k", language.stories, SHARED / "models" / "stories260k" / "stories260K.bin"),
    ):
        place = folder / name
        place.mkdir()
        _, model = make(place)
        for file in ("calibration.npz", "eval.npz"):
            # Engines make their own masks.
            np.savez(place / file, input_ids=np.load(place / file)["input_ids"])
        loader = "load/llama2c" if source.suffix == ".bin" else "load/decoder"
        arguments = [
            str(source), "--set", f"{loader}.tokens={TOKENS}", "--context", "512", "--calibration",
            str(place / "calibration.npz"), "--eval", str(place / "eval.npz"), "--max-drop", "100%",
        ]  # fmt: skip
        yield name, arguments, model


def figures(
    name: str, arguments: list[str], model: Path, known: dict[str, Any], only: str | None
) -> Iterator[tuple[str, Any]]:
    for label, engine, options, windows in [*FLOATS, *FOURS]:
        key = f"{label} | {engine}"
        if key in known or (only and only not in key):
            continue
        limits = ["--set", f"check/accuracy.limit={windows}"]
        with tempfile.TemporaryDirectory() as temporary:
            profile = Path(temporary) / "float-activations.toml"
            profile.write_text(FLOAT_PROFILE)
            given = [str(profile) if option == "FLOAT" else option for option in options]
            built = build(arguments, engine, ["--target", TARGET[engine], *given, *limits])
        if "perplexity" not in built.figures:
            yield key, {"error": built.error}
            continue
        found = {key: built.figures[key] for key in ("perplexity", "perplexity_original")}
        yield key, {**found, "bytes": built.bytes, "windows": windows, "error": built.error}
    windows = np.load(arguments[arguments.index("--eval") + 1])["input_ids"]
    with tempfile.TemporaryDirectory() as temporary:
        for method in BUILDER:
            key = f"int4 groups of 32, {method} | the genai builder's"
            if key in known or (only and only not in key):
                continue
            if language._head_size(model) % 16:
                yield key, {"error": "its engine refuses the builder's attention on heads 8 wide"}
                continue
            value, size = language.genai(model, Path(temporary), method, windows)
            yield key, {"perplexity": value, "bytes": size, "windows": len(windows), "error": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["tinystories-llama-5m", "stories260k"])
    parser.add_argument("--row", help="only rows whose label or engine holds this")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, arguments, model in sources(Path(temporary)):
            if given.model not in (None, name):
                continue
            known = kept.setdefault(name, {})
            if given.again:
                known.clear()
            for key, value in figures(name, arguments, model, dict(known), given.row):
                known[key] = value
                print(name, key, value, flush=True)
                KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    rows, after = [], []
    for name, known in kept.items():
        originals = {
            item["windows"]: item["perplexity_original"] for item in known.values() if "perplexity_original" in item
        }
        for key, item in known.items():
            label, engine = key.split(" | ")
            if "perplexity" not in item:
                rows.append([name, engine, label, "-", "-", "-", "-", item["error"]])
                continue
            base = item.get("perplexity_original") or originals.get(item["windows"])
            growth = f"{item['perplexity'] / base - 1:+.3%}" if base else "-"
            size = f"{item['bytes'] / 1e6:.2f} MB"
            rows.append(
                [name, engine, label, f"{item['perplexity']:.4f}", growth, size, str(item["windows"]), item["error"]]
            )
        after += judged(name, known, originals)
    write_page(
        "llm-quality",
        "Language models through their engines",
        "python benchmarks/decoder_quality.py",
        ("edgeship", "torch", "onnxruntime-genai", "litert-lm-api", "coremltools", "coreai-core"),
        ("model", "engine", "weights", "perplexity", "over torch", "artifact", "windows", "checks that fell short"),
        rows,
        before=f"Windows of {TOKENS} tokens that neither training nor calibration saw. The artifact's bytes are all that the "
        "engine opens, tokenizer included; of the builder's the model alone.",
        after="\n".join(after),
    )


def judged(name: str, known: dict[str, Any], originals: dict[int, float]) -> list[str]:
    """What was asked for, met or not."""
    lines = []
    for key, item in known.items():
        if key.startswith("float32") and "perplexity" in item:
            off = abs(item["perplexity"] / item["perplexity_original"] - 1)
            lines.append(f"- {name}, {key.split(' | ')[1]}: float is {off:.4%} from torch (within 0.1 % wanted).")
    ours = [item for key, item in known.items() if key.startswith("int4") and "| genai" in key and "perplexity" in item]
    theirs = [item for key, item in known.items() if "builder" in key and "perplexity" in item]
    for item in ours:
        for other in theirs:
            lower, smaller = item["perplexity"] < other["perplexity"], item["bytes"] <= other["bytes"]
            lines.append(
                f"- {name}: ours {item['perplexity']:.4f} in {item['bytes'] / 1e6:.2f} MB, the builder's "
                f"{other['perplexity']:.4f} in {other['bytes'] / 1e6:.2f} MB: "
                f"{'lower' if lower else 'not lower'}, {'at no more bytes' if smaller else 'at more bytes'}."
            )
    return lines


if __name__ == "__main__":
    main()
