"""What comes of one row of the zoo: a small model made, built for each runtime, and compared with its own library."""

from __future__ import annotations

import dataclasses
import random
import tempfile
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

from families import make_tokenizer
from zoo_configs import small_configuration

CONTEXT, CHUNK, PROMPT, NEW = 64, 8, 20, 32
LEAST_DB = 40.0
MOST_PARAMETERS = 40_000_000
# Kinds of rows, with the mappings of transformers that name them.
KINDS: dict[str, tuple[str, ...]] = {
    "decoder": ("MODEL_FOR_CAUSAL_LM_MAPPING",),
    "encoder": ("MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_TEXT_ENCODING_MAPPING"),
    "vision": (
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_FOR_OBJECT_DETECTION_MAPPING",
        "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING", "MODEL_FOR_DEPTH_ESTIMATION_MAPPING",
        "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING", "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING",
        "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING", "MODEL_FOR_IMAGE_MAPPING",
    ),
    "audio": (
        "MODEL_FOR_CTC_MAPPING", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING", "MODEL_FOR_AUDIO_XVECTOR_MAPPING",
        "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING",
    ),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING"),
}  # fmt: skip
# Runtimes of a kind, with the share of rows that go there.
LANGUAGE = {"genai": 1.0, "litert-lm": 1.0, "coreml-lm": 1 / 3, "coreai-lm": 1 / 3, "qnn-lm": 1 / 10}
NETWORK = {"onnx": 1.0, "tflite": 1.0, "coreml": 1 / 3, "coreai": 1 / 3, "qnn": 1 / 10}

Row = dict[str, dict[str, Any]]


class NotMadeError(Exception):
    """The library itself makes no small model of this name; its words are the message."""


def runtimes_of(kind: str, name: str) -> list[str]:
    """Where a row goes, the same in every run."""
    shares = LANGUAGE if kind == "decoder" else NETWORK
    drawn = random.Random(f"{kind}/{name}")
    chances = {runtime: drawn.random() for runtime in shares}
    return [runtime for runtime, share in shares.items() if chances[runtime] < share]


def rehearse(kinds: Collection[str], runtimes: Collection[str] | None) -> None:
    """Import what all rows need, and let libraries make their tables: half of a row's time. Starts no threads, so that
    processes may be forked afterwards.

    Args:
        runtimes: None for all.
    """
    import torch
    import transformers  # noqa: F401

    import edgeship.frontends.huggingface
    import edgeship.lowering.onnx.export

    torch.set_num_threads(1)
    if set(kinds) - {"decoder"} and (runtimes is None or "onnx" in runtimes):
        with tempfile.TemporaryDirectory() as place:
            prepare("onnx", Path(place))
    if "decoder" not in kinds:
        return
    from edgeship.frontends.decoder import load_decoder

    with tempfile.TemporaryDirectory() as place:
        make_decoder("llama", Path(place))
        program = load_decoder(Path(place), 32).program
        if runtimes is None or "genai" in runtimes:
            from edgeship.lowering.onnx.decoder import export_decoder

            export_decoder(program)
    if runtimes is None or "litert-lm" in runtimes:
        import litert_torch  # noqa: F401

        import edgeship.lowering.litert.decoder  # noqa: F401


def measure(kind: str, name: str, runtimes: list[str], folder: Path) -> Row:
    """One row: the state of each runtime, with the line that a user reads."""
    from edgeship.errors import EdgeshipError

    work = {"decoder": _decoder, "seq2seq": _seq2seq, "timm": _timm}.get(kind, _network)
    try:
        return without_places(work(kind, name, runtimes, folder), folder)
    except NotMadeError as error:
        found = {"state": "not made", "line": line_of(error)}
    except EdgeshipError as error:
        found = {"state": "refused", "line": line_of(error)}
    except Exception as error:
        found = {"state": "failed", "line": f"load: {line_of(error)}", "trace": trace()}
    return without_places({runtime: dict(found) for runtime in runtimes}, folder)


def prepare(runtime: str, folder: Path) -> None:
    """Lower one small network: the tables that the libraries make for their first one are in every later process."""
    import torch

    from edgeship.core.model import TorchModel
    from edgeship.frontends.module import program_of_module

    torch.manual_seed(0)
    layers = (torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
    program = program_of_module(torch.nn.Sequential(*layers), "x:f32[1,8]", ("y",), {}, note="prepare")
    program.save(folder / "program")
    lower(runtime, TorchModel(folder / "program", program.signature), folder)


def without_places(row: Row, folder: Path) -> Row:
    """A row whose texts say nothing of where it was made."""
    places = {str(folder): "FOLDER", str(Path(__file__).resolve().parents[1]): "."}
    for cell in row.values():
        for place, word in places.items():
            cell["line"] = str(cell.get("line", "")).replace(place, word)
            cell["trace"] = [line.replace(place, word) for line in cell.get("trace", [])]
        for key in ("line", "trace"):
            if not cell[key]:
                del cell[key]
    return row


def line_of(error: Exception) -> str:
    """A message on one line; of errors that are not edgeship's own with their kind."""
    own = isinstance(error, NotMadeError) or type(error).__module__.startswith("edgeship")
    return f"{'' if own else f'{type(error).__name__}: '}{' '.join(str(error).split())[:400]}"


def trace() -> list[str]:
    """The end of the traceback."""
    return traceback.format_exc().strip().splitlines()[-14:]


def in_turn(runtimes: list[str], one: Any) -> Row:
    """Each runtime by itself: ``one(runtime)`` answers its cell or raises."""
    from edgeship.errors import EdgeshipError

    found: Row = {}
    for runtime in runtimes:
        try:
            found[runtime] = one(runtime)
        except EdgeshipError as error:
            found[runtime] = {"state": "refused", "line": line_of(error)}
        except Exception as error:
            found[runtime] = {"state": "failed", "line": line_of(error), "trace": trace()}
    return found


def lower(runtime: str, model: Any, folder: Path) -> Any:
    """The artifact of a loaded program, by the passes that make that runtime's."""
    from edgeship.core.model import OnnxModel, TorchModel
    from edgeship.core.passes import Context
    from edgeship.core.registry import passes, runtimes

    def made(wanted: Any, taken: Any, given: Any, place: Path) -> Any:
        place.mkdir()
        cls = next(cls for cls in passes().values() if cls.edges()[1] is wanted and taken in cls.edges()[0].values())
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        options = {"context": CONTEXT, "chunk": CHUNK, "compute": "float32"}
        return cls(**{key: value for key, value in options.items() if key in known}).run(given, ctx=Context(place))

    artifact = runtimes()[runtime].artifact
    if runtime == "qnn":
        model = made(OnnxModel, TorchModel, model, folder / "qnn-onnx")
        return made(artifact, OnnxModel, model, folder / runtime)
    return made(artifact, TorchModel, model, folder / runtime)


def decibels(found: Any, wanted: Any) -> float:
    """Signal to noise of two arrays of any shape."""
    import numpy as np

    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape:
        raise ValueError(f"shape {found.shape} instead of {wanted.shape}")
    noise = float(((found - wanted) ** 2).mean())
    return float(10 * np.log10(max(float((wanted**2).mean()), 1e-30) / max(noise, 1e-30)))


def draw_weights(model: Any) -> None:
    """Random weights that are wide enough for greedy tokens to be far from ties."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05 if "embed" in name or "shared" in name else 0.15)
            elif "A_log" not in name and "dt" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def _decoder(kind: str, name: str, runtimes: list[str], folder: Path) -> Row:
    from edgeship.core.model import TorchModel
    from edgeship.core.registry import runtimes as known
    from edgeship.frontends.decoder import load_decoder
    from edgeship.llm.generation import generate

    try:
        model = make_decoder(name, folder / "model")
        prompt, wanted, text, logits = wanted_of(model)
    except Exception as error:
        raise NotMadeError(line_of(error)) from error
    del model
    program = load_decoder(folder / "model", 32).program
    program.save(folder / "program")
    given = TorchModel(folder / "program", program.signature)

    def one(runtime: str) -> dict[str, Any]:
        artifact = lower(runtime, given, folder)
        with known()[runtime].open(artifact) as session:
            written = list(generate(session.stepper, prompt, NEW))
            snr = decibels(session.run({"input_ids": text.numpy()})["logits"], logits.numpy())
        pairs = enumerate(zip(written, wanted, strict=True))
        same = next((i for i, (own, theirs) in pairs if own != theirs), NEW)
        least = LEAST_DB if artifact.compute in ("f32", "int") else 25.0
        if same == NEW and snr >= least:
            return {"state": "passed", "snr": round(snr, 1)}
        # Narrower arithmetic may choose otherwise where two tokens are close.
        if artifact.compute not in ("f32", "int") and snr >= least:
            return {"state": "passed", "snr": round(snr, 1), "line": f"{same} of {NEW} tokens"}
        return {"state": "failed", "line": f"wrong: {same} of {NEW} tokens, {snr:.1f} dB"}

    return in_turn(runtimes, one)


def make_decoder(name: str, folder: Path) -> Any:
    """Write the folder of a small decoder; the model."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = small_configuration(name, decoder=True)
    config._attn_implementation = "eager"
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    _refuse_large(model)
    draw_weights(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return model


def _refuse_large(model: Any) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        raise NotMadeError(f"{count / 1e6:.0f} million parameters even so")


def wanted_of(model: Any) -> tuple[list[int], list[int], Any, Any]:
    """Prompt and greedy tokens of transformers' own, a text, and its logits."""
    import torch

    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, 256, (1, PROMPT), generator=generator)
    text = torch.randint(2, 256, (1, 28), generator=generator)
    with torch.no_grad():
        ids = prompt
        for _ in range(NEW):
            # Without a cache: caches of some models are wrong when they are small.
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        logits = model(input_ids=text, use_cache=False).logits
    return prompt[0].tolist(), ids[0, PROMPT:].tolist(), text, logits


def _network(kind: str, name: str, runtimes: list[str], folder: Path) -> Row:
    import torch

    from edgeship.core.model import Source
    from edgeship.core.passes import Context
    from edgeship.passes.load.huggingface import LoadHuggingFace

    torch.manual_seed(0)
    try:
        model = make_network(kind, name)
        _refuse_large(model)
        draw_weights(model)
        model.save_pretrained(folder / "model")
    except Exception as error:
        raise NotMadeError(line_of(error)) from error
    config = model.config
    (folder / "load").mkdir()
    given = LoadHuggingFace(sizes_of(kind, model)).run(
        Source(folder / "model", "huggingface", str(folder)), ctx=Context(folder / "load")
    )

    def eager(inputs: Any) -> dict[str, Any]:
        extra = {"use_cache": False} if getattr(config, "use_cache", None) else {}
        answers = model(**{key: torch.from_numpy(value) for key, value in inputs.items()}, **extra)
        return {key: value.numpy() for key, value in answers.items() if isinstance(value, torch.Tensor)}

    return in_turn(runtimes, lambda runtime: compared(runtime, given, folder, eager))


def make_network(kind: str, name: str) -> Any:
    """A small model of the class that transformers names for this kind. Of a configuration with parts, that class's."""
    import transformers

    config = small_configuration(name)
    mapping = next(m for m in KINDS[kind] if type(config) in getattr(transformers, m))
    cls: Any = getattr(transformers, mapping)[type(config)]
    cls = cls[0] if isinstance(cls, tuple) else cls
    if not isinstance(config, cls.config_class):
        config = next(part for part in vars(config).values() if isinstance(part, cls.config_class))
    return cls(config).eval()


def sizes_of(kind: str, model: Any) -> tuple[str, ...]:
    """What a user has to say with ``--input``: sizes that no field of the configuration tells, videos, features."""
    config, name = model.config, model.main_input_name
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    edge = size if isinstance(size, int) else 256 if "scaled_images_ratios" in vars(config) else 64
    if kind == "vision" and name in ("pixel_values", "pixel_values_videos"):
        if frames:
            return (f"{name}:f32[1,{frames},3,{edge},{edge}]",)
        return () if size else (f"{name}:f32[1,3,{edge},{edge}]",)
    if name == "input_features" and not hasattr(config, "max_source_positions"):
        # [1, frames, features], as all but Whisper take them.
        told = getattr(config, "encoder_config", config)
        width = getattr(told, "feature_projection_input_dim", None) or getattr(told, "num_mel_bins", 80)
        return (f"{name}:f32[1,64,{width}]",)
    if name == "inputs":
        return (f"inputs:f32[1,3,{edge},{edge}]",) if kind == "vision" else ("inputs:i64[1,64]",)
    return ()


def compared(runtime: str, given: Any, folder: Path, eager: Any) -> dict[str, Any]:
    """A cell: check/verify's verdict, and the answers beside the library's own model, ``eager(inputs) -> by name``."""
    import torch

    from edgeship.core.passes import Context
    from edgeship.core.registry import runtimes
    from edgeship.data.batches import generate_batches
    from edgeship.passes.check.verify import VerifyArtifact

    artifact = lower(runtime, given, folder)
    inputs = generate_batches(given.signature, 1, seed=5)[0]
    with torch.no_grad():
        wanted = eager(inputs)
    with runtimes()[runtime].open(artifact) as session:
        found = session.run(inputs)
    snr = min(decibels(found[key], wanted[key]) for key in found)
    if snr < (LEAST_DB if artifact.compute == "f32" else 25.0):
        return {"state": "failed", "line": f"wrong: {snr:.1f} dB beside the library's own model"}
    place = folder / f"verify-{runtime}"
    place.mkdir()
    check = VerifyArtifact(runtime, 4)
    verdict = check.run(artifact, given, given, Context(place))
    if not verdict.passed:
        return {"state": "failed", "line": f"check/verify: {' '.join(str(verdict.summary).split())[:300]}"}
    return {"state": "passed", "snr": round(snr, 1)}


def _timm(kind: str, name: str, runtimes: list[str], folder: Path) -> Row:
    import timm
    import torch

    from edgeship.frontends.module import program_of_module

    torch.manual_seed(0)
    try:
        model = timm.create_model(name, pretrained=False).eval()
        _refuse_large(model)
        size = tuple(model.pretrained_cfg.get("input_size") or (3, 224, 224))
    except Exception as error:
        raise NotMadeError(line_of(error)) from error
    shape = ",".join(map(str, (1, *size)))
    program = program_of_module(model, f"image:f32[{shape}]", ("logits",), {}, note=name)
    program.save(folder / "program")
    from edgeship.core.model import TorchModel

    given = TorchModel(folder / "program", program.signature)

    def eager(inputs: Any) -> dict[str, Any]:
        return {"logits": model(torch.from_numpy(inputs["image"])).numpy()}

    return in_turn(runtimes, lambda runtime: compared(runtime, given, folder, eager))


def _seq2seq(kind: str, name: str, runtimes: list[str], folder: Path) -> Row:
    from encoder_decoders import load, transformers_writes

    from edgeship.core.model import TorchModel
    from edgeship.core.registry import runtimes as known
    from edgeship.llm.encoder_decoder import EncoderDecoder
    from edgeship.llm.generation import generate

    try:
        spoken = _make_seq2seq(name, folder / "model")
    except Exception as error:
        raise NotMadeError(line_of(error)) from error
    programs, inputs = load(folder / "model", "whisper" if spoken else "")
    try:
        first, wanted, _ = transformers_writes(folder / "model", inputs)
    except Exception as error:
        raise NotMadeError(f"its own model does not write: {line_of(error)}") from error
    given = []
    for place, program in enumerate(programs):
        program.save(folder / f"program{place}")
        given.append(TorchModel(folder / f"program{place}", program.signature))

    def one(runtime: str) -> dict[str, Any]:
        made = []
        for place, model in enumerate(given):
            (folder / f"part{place}").mkdir(exist_ok=True)
            made.append(lower(runtime, model, folder / f"part{place}"))
        engine = known()[runtime]
        with engine.open(made[0]) as reading, engine.open(made[1]) as writing:
            host = EncoderDecoder(reading, writing, made[1].signature.inputs)
            host.take(inputs)
            written = list(generate(host, [first], NEW))
        pairs = enumerate(zip(written, wanted, strict=True))
        same = next((i for i, (own, theirs) in pairs if own != theirs), NEW)
        if same == NEW:
            return {"state": "passed", "line": f"{len(set(wanted))} different tokens"}
        return {"state": "failed", "line": f"wrong: {same} of {NEW} tokens"}

    return in_turn(runtimes, one)


def _make_seq2seq(name: str, folder: Path) -> bool:
    """Write the folder; whether the model hears instead of reading."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = small_configuration(name)
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 3
    mapping = next(m for m in KINDS["seq2seq"] if type(config) in getattr(transformers, m))
    cls: Any = getattr(transformers, mapping)[type(config)]
    model = (cls[0] if isinstance(cls, tuple) else cls)(config).eval()
    _refuse_large(model)
    draw_weights(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return bool(model.main_input_name != "input_ids")
