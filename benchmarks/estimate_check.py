"""Compare the latency estimate with published measurements, and write docs/results/estimate-check.md.

The measurements are Qualcomm AI Hub Models v0.47 (BSD-3) as a CSV, and Apple's ResNet-50 (Core ML Tools guide,
quantization performance). The networks are rebuilt from their configurations with random weights.

    python benchmarks/estimate_check.py ../shared/data/perf/aihub_perf.csv
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from edgeship.core.choice import Choice
from edgeship.core.inventory import Inventory
from edgeship.core.model import TensorSpec
from edgeship.core.registry import targets
from edgeship.devices.estimate import BAND, estimate
from edgeship.program.export import make_program

RESULT = Path(__file__).parents[1] / "docs" / "results" / "estimate-check.md"
DEVICES = {
    "QCS8550 (Proxy)": "galaxy-s23",
    "Samsung Galaxy S24": "galaxy-s24",
    "Samsung Galaxy S25": "galaxy-s25",
    "Snapdragon 8 Elite Gen 5 QRD": "snapdragon-8-elite-gen5",
    "Dragonwing IQ-9075 EVK": "dragonwing-iq9075",
}
PRECISIONS = {
    "float": Choice("float16", "float"),
    "w8a8": Choice("int8", "int8"),
    "w8a16": Choice("int8", "int16"),
}
APPLE_RESNET50_MS = {
    "float16": (Choice("float16", "float"), 1.38),
    "W8": (Choice("int8", "float"), 1.50),
    "W8A8": (Choice("int8", "int8"), 0.77),
}
Row = tuple[str, str, str, float, float]


def resnet(depths: list[int], layer: str, sizes: list[int]) -> hf.PreTrainedModel:
    config = hf.ResNetConfig(depths=depths, layer_type=layer, hidden_sizes=sizes, num_labels=1000)
    return hf.ResNetForImageClassification(config)


def convnext_base() -> hf.PreTrainedModel:
    config = hf.ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024], num_labels=1000)
    return hf.ConvNextForImageClassification(config)


def electra_base() -> hf.PreTrainedModel:
    config = hf.ElectraConfig(embedding_size=768, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
    return hf.ElectraForPreTraining(config)


# By the name that AI Hub gives them.
MODELS: dict[str, Callable[[], Any]] = {
    "resnet18": lambda: resnet([2, 2, 2, 2], "basic", [64, 128, 256, 512]),
    "resnet50": lambda: resnet([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
    "resnet101": lambda: resnet([3, 4, 23, 3], "bottleneck", [256, 512, 1024, 2048]),
    "convnext_base": convnext_base,
    "bert_base_uncased_hf": lambda: hf.BertForMaskedLM(hf.BertConfig()),
    "electra_bert_base_discrim_google": electra_base,
}


def take_inventory(model: Any) -> Inventory:
    """The inventory of a network on AI Hub's input: 224 x 224 pixels, or 384 tokens."""
    if "bert" in model.config.model_type or "electra" in model.config.model_type:
        specs = [TensorSpec("input_ids", "i64", (1, 384)), TensorSpec("attention_mask", "i64", (1, 384))]
        examples = [torch.ones(1, 384, dtype=torch.long)] * 2
        return make_program(
            model.eval(), specs, examples, call=lambda module, ids, mask: module(input_ids=ids, attention_mask=mask)[0]
        ).record.inventory
    image = TensorSpec("image", "f32", (1, 3, 224, 224))
    program = make_program(
        model.eval(), [image], [torch.randn(1, 3, 224, 224)], call=lambda module, pixels: module(pixels)[0]
    )
    return program.record.inventory


def compare(published: list[dict[str, str]]) -> list[Row]:
    rows: list[Row] = []
    for name, make in MODELS.items():
        inventory = take_inventory(make())
        for device, target in DEVICES.items():
            for precision, choice in PRECISIONS.items():
                found = [
                    float(row["latency_ms"])
                    for row in published
                    if (row["model"], row["device"], row["precision"], row["primary_unit"])
                    == (name, device, precision, "NPU")
                ]
                if found:
                    ours = estimate(inventory, targets()[target], "qnn", choice).value
                    rows.append((name, target, precision, statistics.median(found), ours or 0.0))
        if name == "resnet50":
            for label, (choice, published_ms) in APPLE_RESNET50_MS.items():
                ours = estimate(inventory, targets()["iphone15pro"], "coreml", choice).value
                rows.append((name, "iphone15pro", label, published_ms, ours or 0.0))
    return rows


def report(rows: list[Row]) -> str:
    ratios = [estimated / published for *_, published, estimated in rows]
    inside = sum(1 / BAND <= ratio <= BAND for ratio in ratios)
    summary = (
        f"{len(rows)} rows; estimate over measurement: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} "
        f"to {max(ratios):.2f}; {inside} of {len(rows)} inside the band of {BAND:g}."
    )
    lines = [
        "# The latency estimate beside published measurements",
        "",
        summary,
        "",
        "Nothing was fitted to these figures beyond the round efficiencies named in `edgeship/devices/estimate.py`.",
        "All are large, regular networks, which suit a roofline; small and irregular ones will fare worse.",
        "",
        "Measurements: median over runtimes on the NPU, Qualcomm AI Hub Models v0.47; Core ML Tools guide (Apple).",
        "Made by `benchmarks/estimate_check.py`.",
        "",
        "| model | target | precision | published ms | estimated ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {model} | {target} | {precision} | {published:.2f} | {estimated:.2f} | {estimated / published:.2f} |"
        for model, target, precision, published, estimated in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("give the CSV of published measurements: python benchmarks/estimate_check.py aihub_perf.csv")
    with open(sys.argv[1], newline="", encoding="utf-8") as file:
        text = report(compare(list(csv.DictReader(file))))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
