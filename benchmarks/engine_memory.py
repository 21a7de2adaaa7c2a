"""What language engines take of an app's memory, each alone in a process of its own, beside the estimate of check/size.

python benchmarks/engine_memory.py FOLDER [FOLDER...] --made DIR [--weights float16,int8,int4] [--contexts 512,2048]

Lowers each FOLDER without checks, keeps what it made in DIR, starts a process for each artifact that loads it with the
engine alone, and lets it read 200 tokens and write 16. The peak is the process's resident memory (VmHWM) less what Python
had before the engine was imported. Writes docs/results/engine-memory.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PLANS = {
    "float16": ("float", "float16"),
    "int8": ("float", "int8"),
    "int8-dynamic": ("dynamic", "int8"),
    "int4": ("dynamic", "int4-g32"),
}
PROMPT, NEW = 200, 16


def megabytes(field: str) -> int:
    """A line of this process's status."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) // 1000


def measure(kind: str, path: str, context: int, folder: str) -> dict[str, int]:
    """In the process of the engine alone: megabytes when it is loaded, and at the most."""
    before = megabytes("VmRSS")
    new, length = min(NEW, context // 4), min(PROMPT, context // 2)
    if kind == "genai":
        import numpy as np
        import onnxruntime_genai as genai

        model = genai.Model(path)
        tokenizer = genai.Tokenizer(model)
        loaded = megabytes("VmRSS")
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=context)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.full((1, length), 300, np.int32))
        for _ in range(new):
            generator.generate_next_token()
        del generator, tokenizer
    else:
        import litert_lm

        litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
        engine = litert_lm.Engine(path, backend=litert_lm.Backend.CPU(thread_count=2), cache_dir=folder)
        loaded = megabytes("VmRSS")
        text = " the" * length
        with engine.create_session(apply_prompt_template=False, max_output_tokens=new) as session:
            session.run_prefill([text])
            session.run_decode()
    return {"loaded": loaded - before, "peak": megabytes("VmHWM") - before}


def lowered(folder: Path, made: Path, plan: str, context: int, kind: str) -> tuple[Any, Any]:
    """An artifact, and the record of its program."""
    from edgeship.compression.encode import Encoder
    from edgeship.core.encodings import encoding_named, fitted
    from edgeship.core.model import TorchModel
    from edgeship.core.passes import Context
    from edgeship.frontends.decoder import load_decoder
    from edgeship.passes.lower.decoder_to_genai import DecoderToGenai
    from edgeship.passes.lower.decoder_to_litert_lm import DecoderToLiteRTLM
    from edgeship.program.program import TorchProgram, read_record

    made.mkdir(parents=True, exist_ok=True)
    base, signature = made / "base", made / "sig"
    if not signature.exists():
        program = load_decoder(folder, 128).program
        program.save(base)
        signature.write_bytes(pickle.dumps(program.signature))
    model = TorchModel(base, pickle.loads(signature.read_bytes()))
    activations, name = PLANS[plan]
    stored = TorchModel(made / f"p-{plan}", model.signature)
    if not stored.path.exists():
        program = TorchProgram.open(model)
        uses = [use for use in program.record.inventory.weights if use.op in ("linear", "embedding")]
        wanted = {use.name: fitted(encoding_named(name), use) for use in uses}
        encoded, _ = Encoder(program, wanted).encode()
        record = dataclasses.replace(program.record, encodings=wanted)
        dataclasses.replace(program, encoded=encoded, record=record).save(stored.path)
    place = made / f"{kind}-{plan}-{context}"
    if not (place / "artifact").exists():
        place.mkdir(exist_ok=True)
        step = (
            DecoderToGenai(context, activations)
            if kind == "genai"
            else DecoderToLiteRTLM(context, activations=activations)
        )
        (place / "artifact").write_bytes(pickle.dumps(step.run(stored, Context(place))))
    return pickle.loads((place / "artifact").read_bytes()), read_record(stored)


def called(folder: Path) -> str:
    """A model's name from where it lies."""
    return folder.resolve().parent.name if folder.name in ("hf", "model") else folder.name


def estimated(artifact: Any, record: Any, plan: str) -> Any:
    """As check/size has it."""
    from edgeship.core.memory import footprint
    from edgeship.core.registry import runtimes

    runtime = runtimes()[type(artifact).runtime]
    needs = footprint(record.inventory, runtime, record.encodings, PLANS[plan][0], halves=False, tied=record.aliases)
    kept = record.decoder.cache_bytes(artifact.spoken().context, "float32")
    return dataclasses.replace(needs, cache=runtime.engine.cache_copies * kept)


def main() -> None:
    if sys.argv[1] == "--child":
        print(json.dumps(measure(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--made", type=Path, required=True)
    parser.add_argument("--weights", default="float16,int8,int8-dynamic,int4")
    parser.add_argument("--contexts", default="512,2048")
    parser.add_argument("--engines", default="genai,litert-lm")
    parser.add_argument("--only-made", action="store_true", help="Measure what lies in --made, and make nothing.")
    args = parser.parse_args()
    rows = []
    for folder in args.folders:
        name = called(folder)
        for kind in args.engines.split(","):
            for plan in args.weights.split(","):
                for context in map(int, args.contexts.split(",")):
                    place = args.made / name / f"{kind}-{plan}-{context}"
                    if args.only_made and not (place / "artifact").exists():
                        continue
                    artifact, record = lowered(folder, args.made / name, plan, context, kind)
                    cache = place / "cache"
                    cache.mkdir(exist_ok=True)
                    # The first start of LiteRT-LM packs the weights into a file; an app's later starts are measured.
                    for _ in range(2 if kind == "litert-lm" else 1):
                        command = [
                            sys.executable,
                            __file__,
                            "--child",
                            kind,
                            str(artifact.path),
                            str(context),
                            str(cache),
                        ]
                        found = json.loads(
                            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                        )
                    needs = estimated(artifact, record, plan)
                    ratio = needs.memory / 1e6 / found["peak"]
                    rows.append([
                        name, kind, plan, str(context), f"{found['loaded']} MB", f"{found['peak']} MB",
                        f"{needs.memory / 1e6:.0f} MB", f"{ratio - 1:+.0%}",
                    ])  # fmt: skip
                    print(
                        rows[-1],
                        f"weights {needs.weights / 1e6:.0f} cache {needs.cache / 1e6:.0f} activations {needs.activations / 1e6:.0f} runtime {needs.runtime / 1e6:.0f}",
                        flush=True,
                    )
    from results import write_page

    columns = ["model", "engine", "weights", "context", "loaded", "peak", "estimated", "estimate to peak"]
    off = max(abs(float(row[-1].rstrip("%"))) for row in rows)
    write_page(
        "engine-memory", "Memory of language engines", "python benchmarks/engine_memory.py", ["onnxruntime-genai", "litert-lm-api"],
        columns, rows,
        "Each engine alone in its process, without what Python takes: loaded, and at the most while it reads 200 tokens and writes "
        "16 (half and a quarter of the context where that is less). Float activations but for `int8-dynamic` and `int4`, which let "
        "kernels round them. LiteRT-LM with its weight cache, as an app's second start has it. The estimate is check/size's.",
        f"The estimate that is furthest off is {off:.0f} % off.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
