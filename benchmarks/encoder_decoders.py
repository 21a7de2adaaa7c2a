"""Encoder-decoders as two networks in every runtime: greedy tokens beside transformers' own.

    python benchmarks/encoder_decoders.py

Each model is a small random one (see families.py), in float32. The encoder reads a text of 17 tokens in a tensor of 24, or
a sound; the decoder then writes 32 tokens, one at a time. A cell says how many are the tokens that transformers writes
with its own attention and cache.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from decoders import NEW, compared
from families import ENCODER_DECODERS, make_encoder_decoder
from results import write_page

from edgeship.core.registry import passes, runtimes

RUNTIMES = ("onnx", "tflite", "coreml", "coreai")
READ, PADDED, CONTEXT = 24, 7, 40
# Of inputs that make every model write many different tokens.
SEED = 9


def load(folder: Path, name: str) -> tuple[list[Any], dict[str, Any]]:
    """Both programs, and inputs for the encoder: a text shorter than its tensor where it has a mask."""
    from edgeship.data.batches import generate_batches
    from edgeship.data.specs import example_tensors, parse_inputs
    from edgeship.frontends.huggingface import load_folder, part_of
    from edgeship.program.export import make_program

    loaded = load_folder(folder, () if name == "whisper" else parse_inputs((f"input_ids:i64[1,{READ}]",)))
    programs = []
    for part, context in (("encoder", None), ("decoder", CONTEXT)):
        module, specs, names = part_of(loaded, part, context)
        programs.append(make_program(module, specs, example_tensors(specs), output_names=names))
    inputs = generate_batches(programs[0].signature, 1, seed=SEED)[0]
    if "attention_mask" in inputs:
        inputs["attention_mask"][:] = 1
        inputs["attention_mask"][:, READ - PADDED :] = 0
    return programs, inputs


def transformers_writes(folder: Path, inputs: dict[str, Any]) -> tuple[int, list[int], list[Any]]:
    """The first token, those that follow, and the logits that they were chosen from."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model = cls.from_pretrained(folder, dtype=torch.float32).eval()
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    mask = {name: value for name, value in given.items() if name == "attention_mask"}
    cache, tokens, logits = None, [int(config.decoder_start_token_id)], []
    with torch.no_grad():
        read = model.get_encoder()(**given)
        for _ in range(NEW):
            last = torch.tensor([tokens[-1:]])
            answer = model(encoder_outputs=read, decoder_input_ids=last, past_key_values=cache, use_cache=True, **mask)
            cache = answer.past_key_values
            logits.append(answer.logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
    return tokens[0], tokens[1:], logits


def lower(runtime: str, program: Any, folder: Path) -> Any:
    """The artifact of a program, by the pass that makes that runtime's."""
    from edgeship.core.model import TorchModel
    from edgeship.core.passes import Context

    cls = next(cls for cls in passes().values() if cls.edges()[1] is runtimes()[runtime].artifact)
    wide = {"compute": "float32"} if "compute" in {field.name for field in dataclasses.fields(cls)} else {}  # type: ignore[arg-type]
    folder.mkdir()
    program.save(folder / "program")
    return cls(**wide).run(TorchModel(folder / "program", program.signature), ctx=Context(folder))


def measure(name: str) -> list[str]:
    """One row."""
    from edgeship.llm.encoder_decoder import EncoderDecoder
    from edgeship.llm.generation import generate

    cells = [name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_encoder_decoder(name, Path(temporary) / "model")
        (encoder, decoder), inputs = load(folder, name)
        first, wanted, logits = transformers_writes(folder, inputs)
        for runtime in RUNTIMES:
            engine = runtimes()[runtime]
            made = [
                lower(runtime, program, Path(temporary) / f"{runtime}{place}")
                for place, program in enumerate((encoder, decoder))
            ]
            with engine.open(made[0]) as reading, engine.open(made[1]) as writing:
                host = EncoderDecoder(reading, writing, made[1].signature.inputs)
                host.take(inputs)
                found = compared(list(generate(host, [first], NEW)), wanted, logits)
            apart = "" if found["margin"] is None else f"; there the two best are {found['margin']:.1%} apart"
            cells.append(f"{found['same']} of {NEW}{apart}")
            print(name, runtime, cells[-1], flush=True)
    return [*cells, str(len(set(wanted)))]


def main() -> None:
    rows = [measure(name) for name in ENCODER_DECODERS]
    write_page(
        "encoder-decoders",
        "Encoder-decoders as two networks in each runtime",
        "python benchmarks/encoder_decoders.py",
        ("edgeship", "torch", "transformers", "onnxruntime", "ai-edge-litert", "coremltools", "coreai-core"),
        ("model", *RUNTIMES, "different tokens among them"),
        rows,
        before=f"Greedy tokens equal to transformers' own, of {NEW}: the encoder runs once, the decoder for every token "
        "over caches that the host keeps. Float32; small random models; Core ML in the evaluator.",
    )


if __name__ == "__main__":
    main()
