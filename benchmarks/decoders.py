"""Every family of decoders in every engine for language models: greedy tokens beside transformers' own.

    python benchmarks/decoders.py [--family NAME] [--engine NAME] [--again]

Each family is a small random model (see families.py), in float. A prompt of 20 tokens goes in by chunks of 8, and 32
tokens come out, past the sliding window of 12 where the family has one. A cell says how many of the 32 are the tokens
that transformers writes with its own attention and cache; where the engine computes in float16 and a token differs, how
close transformers' two best were there. What is known already is kept in llm-coverage.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from families import FAMILIES, make_family
from results import RESULTS, write_page

from edgeship.core.registry import passes, runtimes

CONTEXT, CHUNK, PROMPT, NEW = 64, 8, 20, 32
KEPT = RESULTS / "llm-coverage.json"
# Galaxy S24's: Qualcomm's number of the chip, and the version of its Hexagon.
CHIP = (57, 75)


def columns() -> dict[str, str]:
    """Column -> its engine: those that can compute in either width once for each."""
    found: dict[str, str] = {}
    for name, runtime in runtimes().items():
        if not runtime.engine.for_language:
            continue
        if runtime.format.float_bits == 16:
            found |= {f"{name} {width}": name for width in ("float32", "float16")}
        elif "int16" in runtime.engine.computes:
            # Hexagon has no float language model: the steps before their grids, and as they run.
            found |= {f"{name} {form}": name for form in ("steps", "W8A16")}
        else:
            found[name] = name
    return found


def lower(column: str, model: Any, folder: Path) -> Any:
    """The artifact of a loaded program, by the pass that makes that engine's."""
    from edgeship.core.passes import Context

    engine, _, width = column.partition(" ")
    cls = next(cls for cls in passes().values() if cls.edges()[1] is runtimes()[engine].artifact)
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    wanted = {"context": CONTEXT, "chunk": CHUNK, **({"compute": width} if width else {})}
    if engine == "qnn-lm":
        wanted |= {"soc_model": CHIP[0], "htp_arch": CHIP[1], "samples": 64}
    given: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    return cls(**given).run(model, ctx=Context(folder))


def in_eight_bits(model: Any, folder: Path) -> Any:
    """The same program with its linear layers and tables in 8 bits."""
    from edgeship.compression.encode import Encoder
    from edgeship.core.model import TorchModel
    from edgeship.core.weights import Affine
    from edgeship.program.program import TorchProgram

    program = TorchProgram.open(model)
    uses = [use for use in program.record.inventory.weights if use.op in ("linear", "embedding")]
    encodings = {use.name: Affine(8) for use in uses}
    encoded, _ = Encoder(program, encodings).encode()
    record = dataclasses.replace(program.record, encodings=encodings)
    dataclasses.replace(program, encoded=encoded, record=record).save(folder)
    return TorchModel(folder, program.signature)


def steps(program: Any) -> Any:
    """A stepper over the steps that Hexagon's graphs are made from, in float32 in torch, with their host."""
    from edgeship.llm.hosted import Host, HostedStepper
    from edgeship.lowering.qnn.decoder import angle_tables, step_program

    host = Host.of(program.record.decoder, CONTEXT, angle_tables(program, CONTEXT))
    runners = {
        name: step_program(program, host, tokens, logits=tokens == 1).runner()
        for name, tokens in (("prefill", CHUNK), ("decode", 1))
    }
    return HostedStepper(host, CHUNK, lambda name, inputs: runners[name](inputs))


def measure(family: str, column: str) -> dict[str, Any]:
    """In a process of its own: load, lower, generate, compare."""
    import torch
    import transformers

    from edgeship.compat import openelm
    from edgeship.core.model import TorchModel
    from edgeship.frontends.decoder import load_decoder
    from edgeship.llm.generation import generate
    from edgeship.program.program import TorchProgram

    with tempfile.TemporaryDirectory() as temporary:
        folder = make_family(family, Path(temporary) / "model")
        program = load_decoder(folder, 32).program
        program.save(Path(temporary) / "program")
        made = Path(temporary) / "made"
        made.mkdir()
        given = TorchModel(Path(temporary) / "program", program.signature)
        if column.endswith(" W8A16"):
            given = in_eight_bits(given, Path(temporary) / "encoded")
        if column.endswith(" steps"):
            artifact, session = None, contextlib.nullcontext(SimpleNamespace(stepper=steps(program)))
        else:
            artifact = lower(column, given, made)
            session = runtimes()[columns()[column]].open(artifact)
        openelm.register()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        prompt = torch.randint(2, 256, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            answer = model.generate(
                prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        wanted = answer.sequences[0, PROMPT:].tolist()
        with session as opened:
            if artifact and hasattr(opened.stepper, "chunk") and artifact.spoken().chunk is None:
                opened.stepper.chunk = CHUNK
            found = list(generate(opened.stepper, prompt[0].tolist(), NEW))
        measured = {
            **compared(found, wanted, [logits[0] for logits in answer.logits]),
            "compute": artifact.compute if artifact else "f32",
            "distinct": len(set(wanted)),
        }
        if column.endswith(" W8A16"):
            stepper, logits = steps(TorchProgram.open(given)), []
            plain = stepper.decode
            stepper.decode = lambda token: logits.append(plain(token)) or logits[-1]
            wanted = list(generate(stepper, prompt[0].tolist(), NEW))
            measured["encoded"] = compared(found, wanted, [torch.from_numpy(row) for row in logits[-NEW:]])
        return measured


def compared(found: list[int], wanted: list[int], logits: list[Any]) -> dict[str, Any]:
    """How many are the same, and how close the two best were at the first that is not."""
    same = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), NEW)
    if same == NEW:
        return {"same": same, "margin": None}
    assert int(logits[same].argmax()) == wanted[same]
    best = logits[same].topk(2).values
    return {"same": same, "margin": float((best[0] - best[1]) / logits[same].abs().max())}


def cell(known: dict[str, Any] | None) -> str:
    if known is None:
        return "not run"
    if "error" in known:
        return known["error"]
    text = f"{known['same']} of {NEW}"
    if known["same"] < NEW:
        text += f"; there transformers' two best are {known['margin']:.1%} of the largest logit apart"
    if "encoded" in known:
        same, margin = known["encoded"]["same"], known["encoded"]["margin"]
        text += f". Of the same 8-bit weights in torch: {same} of {NEW}"
        text += "" if margin is None else f", {margin:.1%} apart"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=list(FAMILIES))
    parser.add_argument("--engine", choices=sorted(set(columns().values())))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--page", action="store_true", help="write the page of what is known, run nothing")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print("\n" + json.dumps(measure(*given.one)))
        return
    known: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for family in FAMILIES:
        for column, engine in columns().items():
            name = f"{family} {column}"
            if given.family not in (None, family) or given.engine not in (None, engine):
                continue
            if given.page or (name in known and not given.again):
                continue
            order = [sys.executable, "-W", "ignore", __file__, "--one", family, column]
            done = subprocess.run(order, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            known[name] = json.loads(lines[-1]) if lines else {"error": last[:200]}
            print(name, known[name], flush=True)
            KEPT.write_text(json.dumps(known, indent=1) + "\n")
    write_page(
        "llm-coverage",
        "Families of language models in each engine",
        "python benchmarks/decoders.py",
        ("edgeship", "torch", "transformers", "onnxruntime-genai", "ai-edge-litert", "coremltools", "coreai-core"),
        ("family", *columns()),
        [[family, *(cell(known.get(f"{family} {column}")) for column in columns())] for family in FAMILIES],
        before=f"Greedy tokens equal to transformers' own, of {NEW}, after a prompt of {PROMPT} in chunks of {CHUNK}; "
        "float weights and arithmetic; where a column says float16 every operator is rounded to it, as the Neural Engine "
        "does. Small random models, whose best tokens lie close together: 8-bit weights choose another one soon (see "
        "benchmarks/families.py), so W8A16 is also held against the same 8-bit weights in torch. coreml-lm runs in the evaluator, qnn-lm in Hexagon's emulator; "
        "*steps* are the graphs of qnn-lm before anything is quantized, in torch, with the host that keeps their cache.",
    )


if __name__ == "__main__":
    main()
