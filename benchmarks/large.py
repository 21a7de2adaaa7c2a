"""Large language models with random weights: time, peak memory and size of conversion, and decode speed.

    python benchmarks/large.py [--size 1.24B|3.2B] [--engine NAME] [--part convert|speed]

Converts with ``--profile small`` and round-to-nearest (random weights say nothing of quality): load, quantize and lower,
each engine in a process of its own whose peak resident memory the kernel reports (VmHWM). onnxruntime-genai's builder,
int4 in groups of 32, runs beside it. Speeds are taken in the engines' own loops, ours and the builder's in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from families import make_tokenizer
from results import RESULTS, write_page

SIZES = {"1.24B": (16, 2048, 8192, 32, 8), "3.2B": (28, 3072, 8192, 24, 8)}
VOCABULARY = 128256
WANTED = {
    ("1.24B", "genai"): 1.5, ("1.24B", "litert-lm"): 1.5, ("1.24B", "coreml-lm"): 4.0, ("1.24B", "coreai-lm"): 4.0,
    ("3.2B", "genai"): 2.5, ("3.2B", "litert-lm"): 2.5, ("3.2B", "coreml-lm"): 6.0,
}  # fmt: skip
KEPT = RESULTS / "llm-large.json"
PROMPT, NEW, RUNS, CONTEXT = 64, 48, 3, 2048
TARGET, TARGETS = "iphone15pro", {"qnn-lm": "galaxy-s24"}
ARTIFACT = "artifact.json"


def make_model(size: str, folder: Path) -> Path:
    """A random Llama in bfloat16, a shard a layer, written once."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    place = folder / f"llama-{size}"
    index = place / "model.safetensors.index.json"
    if index.is_file():
        return place
    layers, hidden, inner, heads, kv_heads = SIZES[size]
    width = hidden // heads
    place.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, max_position_embeddings=8192,
        rope_theta=500000.0, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(place)  # fmt: skip
    make_tokenizer(place)
    torch.manual_seed(0)
    names: dict[str, str] = {}

    def shard(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        file = f"model-{number:05d}.safetensors"
        tensors = {
            name: (torch.randn(shape) * 0.02 if len(shape) > 1 else torch.ones(shape)).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(tensors, place / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(shapes, file))

    shard(0, {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)})
    for layer in range(layers):
        head = f"model.layers.{layer}."
        shard(layer + 1, {
            f"{head}self_attn.q_proj.weight": (hidden, hidden), f"{head}self_attn.k_proj.weight": (kv_heads * width, hidden),
            f"{head}self_attn.v_proj.weight": (kv_heads * width, hidden), f"{head}self_attn.o_proj.weight": (hidden, hidden),
            f"{head}mlp.gate_proj.weight": (inner, hidden), f"{head}mlp.up_proj.weight": (inner, hidden),
            f"{head}mlp.down_proj.weight": (hidden, inner), f"{head}input_layernorm.weight": (hidden,),
            f"{head}post_attention_layernorm.weight": (hidden,),
        })  # fmt: skip
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return place


def convert(model: Path, engine: str, out: Path) -> dict[str, Any]:
    """In a process of its own: load, quantize, lower; what it took."""
    begin = time.perf_counter()
    from edgeship.api import BuildOrder, prepare
    from edgeship.core.artifact import total_bytes
    from edgeship.core.model import Artifact
    from edgeship.core.passes import Context
    from edgeship.core.plan import Plan
    from edgeship.core.records import to_plain
    from edgeship.engine.cache import Cache
    from edgeship.engine.chatter import Log
    from edgeship.engine.executor import Silence, execute

    target = TARGETS.get(engine, TARGET)
    order = BuildOrder(
        str(model), (target,), (engine,), profile="small", output=out / "bundle", context=CONTEXT,
        options={"compress/quantize": {"method": "nearest"}},
    )  # fmt: skip
    cache, log = Cache(out / "cache", True), Log(out / "log")
    prepared = prepare(order, cache, log, Silence())
    steps = tuple(step for step in prepared.plan.steps if step.name.split("/")[0] in ("load", "compress", "lower"))
    done = [(prepared.load_step.task, prepared.loaded)]
    execution = execute(Plan(steps, {}), prepared.requests[0].source, cache, log, Silence(), None, done)
    seconds = time.perf_counter() - begin
    artifact = execution.results[steps[-1].index]
    assert isinstance(artifact, Artifact)
    times = {step.step.partition(" ")[2]: step.seconds for step in execution.times}
    check = next(step for step in prepared.plan.steps if step.name == "check/size")
    verdict: Any = check.task.run(artifact, execution.results[check.inputs["reference"]], ctx=Context(out))
    # Beside the artifact and not in the results: it says where on this machine it lies.
    (out / ARTIFACT).write_text(json.dumps(to_plain(artifact)))
    return {
        "seconds": seconds, "peak_bytes": peak_bytes("self"), "bytes": total_bytes(artifact.path), "steps": times,
        "target": target, "fits": verdict.passed, "size": verdict.summary,
    }  # fmt: skip


def peak_bytes(process: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def builder(model: Path, out: Path) -> dict[str, Any]:
    """onnxruntime-genai's builder in its own process, its peak read while it runs."""
    place = out / "builder"
    shutil.rmtree(place, ignore_errors=True)
    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", model.name, "-i", str(model), "-o", str(place),
        "-p", "int4", "-e", "cpu", "-c", str(out / "builder-cache"), "--extra_options", "block_size=32",
    ]  # fmt: skip
    begin, peak = time.perf_counter(), 0
    with (out / "builder.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            # It may end between the two lines.
            with contextlib.suppress(OSError, StopIteration):
                peak = max(peak, peak_bytes(str(process.pid)))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the builder failed: {(out / 'builder.log').read_text()[-500:]}")
    size = sum(path.stat().st_size for path in place.glob("model.onnx*"))
    return {"seconds": time.perf_counter() - begin, "peak_bytes": peak, "bytes": size}


def speeds(folder: Path, size: str) -> dict[str, Any]:
    """Tokens a second of our two engines and the builder's artifact, in turn, in one process each turn."""
    found: dict[str, list[tuple[float, float]]] = {}
    subjects = [name for name in ("genai", "builder", "litert-lm") if (folder / f"{size}-{name}").is_dir()]
    for _ in range(RUNS):
        for name in subjects:
            order = [sys.executable, "-W", "ignore", __file__, "--time", str(folder / f"{size}-{name}")]
            done = subprocess.run(order, capture_output=True, text=True, check=True)
            found.setdefault(name, []).append(tuple(json.loads(done.stdout.splitlines()[-1])))
    return {name: {"prefill": [a for a, _ in rows], "decode": [b for _, b in rows]} for name, rows in found.items()}


def time_one(out: Path) -> tuple[float, float]:
    """In a process of its own: prefill and decode tokens a second of one artifact."""
    from edgeship.core.decoder import LanguageFacts
    from edgeship.core.model import GenaiModel, Signature
    from edgeship.core.records import from_plain
    from edgeship.core.registry import artifacts, runtimes

    if (out / ARTIFACT).is_file():
        known = json.loads((out / ARTIFACT).read_text())
        artifact: Any = from_plain(artifacts()[known["kind"]], known)
    else:
        artifact = GenaiModel(out / "builder", Signature((), ()), language=LanguageFacts(CONTEXT, "float32"))
    prompt = [17 * i % 251 for i in range(PROMPT)]
    with runtimes()[artifact.runtime].open_fast(artifact) as session:
        session.time_text(prompt, 4)
        times = session.time_text(prompt, NEW)
    return PROMPT / times.prefill_s, times.decoded / times.decode_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="1.24B")
    parser.add_argument("--engine", action="append")
    parser.add_argument("--part", choices=["convert", "speed"])
    parser.add_argument("--folder", type=Path, default=Path("build/large"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--time", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print("\n" + json.dumps(convert(Path(given.one[0]), given.one[1], Path(given.one[2]))))
        return
    if given.time:
        print("\n" + json.dumps(time_one(Path(given.time))))
        return
    model = make_model(given.size, given.folder)
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    known = kept.setdefault(given.size, {})
    for engine in given.engine or ["builder", "genai", "litert-lm", "coreml-lm", "coreai-lm"]:
        if given.part == "speed":
            break
        out = given.folder / f"{given.size}-{engine}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        if engine == "builder":
            known[engine] = builder(model, out)
        else:
            order = [sys.executable, "-W", "ignore", __file__, "--one", str(model), engine, str(out)]
            done = subprocess.run(order, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            known[engine] = json.loads(lines[-1]) if lines else {"error": last[:300]}
        print(given.size, engine, {k: v for k, v in known[engine].items() if k != "steps"}, flush=True)
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    if given.part != "convert":
        known["speeds"] = speeds(given.folder, given.size)
        decode = known["speeds"]
        known.setdefault("rounds", []).append({
            "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip(),
            "seconds": {name: known[name]["seconds"] for name in ("genai", "builder")},
            "decode": {name: sum(decode[name]["decode"]) / RUNS for name in ("genai", "builder")},
        })  # fmt: skip
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    write(kept)


def write(kept: dict[str, Any]) -> None:
    rows, after = [], []
    for size, known in kept.items():
        for engine, found in known.items():
            if engine in ("speeds", "rounds"):
                continue
            if "size" in found:
                fits = "fits" if found["fits"] else "does NOT fit"
                after.append(f"- {size}, {engine}, {CONTEXT} positions: {fits} {found['target']}: {found['size']}.")
            if "error" in found:
                rows.append([size, engine, "-", "-", "-", "-", "-", found["error"]])
                continue
            wanted = WANTED.get((size, engine))
            met = (
                ""
                if wanted is None
                else f"under {wanted:g} GB wanted: {'met' if found['peak_bytes'] < wanted * 1e9 else 'missed'}"
            )
            timed = known.get("speeds", {}).get(engine)
            rows.append([
                size, engine, f"{found['seconds']:.0f} s", f"{found['peak_bytes'] / 1e9:.2f} GB",
                f"{found['bytes'] / 1e6:.0f} MB", _mean(timed, "prefill"), _mean(timed, "decode"), met,
            ])  # fmt: skip
        for number, found in enumerate(known.get("rounds", []), start=1):
            ours, theirs = found["seconds"]["genai"], found["seconds"]["builder"]
            fast, known_fast = found["decode"]["genai"], found["decode"]["builder"]
            after.append(
                f"- {size}, round {number} ({found['commit']}): our ONNX took {ours:.1f} s and the builder {theirs:.1f} s, "
                f"{ours / theirs:.2f} (at most 1 wanted); it decodes {fast:.1f} tokens/s and the builder's {known_fast:.1f}, "
                f"{fast / known_fast:.2f} (at least 0.95 wanted)."
            )
    write_page(
        "llm-large", "Large language models: conversion and speed", "python benchmarks/large.py",
        ("edgeship", "torch", "onnxruntime-genai", "litert-lm-api", "coremltools", "coreai-core"),
        ("model", "engine", "conversion", "peak memory", "artifact", "prefill tok/s", "decode tok/s", "limit"), rows,
        before=f"Random weights, as the profile `small` has them: 4 bits in groups of 32 (genai, LiteRT-LM) or palettes of 16 "
        "(Core ML, Core AI), tables of tokens in 8 where it says so. Conversion is load, "
        f"quantize and lower; verification is not in it. Speeds: {PROMPT} tokens in, {NEW} out, {RUNS} runs each in turn, "
        "mean (smallest to largest), random weights.",
        after="\n".join(after),
    )  # fmt: skip


def _mean(timed: dict[str, Sequence[float]] | None, key: str) -> str:
    if timed is None:
        return "-"
    values = timed[key]
    return f"{sum(values) / len(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()
