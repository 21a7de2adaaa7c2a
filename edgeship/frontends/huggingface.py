"""Read a local Hugging Face folder: architecture, weights, and what its inputs look like. Nothing is fetched or run
from the folder: ``trust_remote_code`` is off."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.model import TensorSpec
from edgeship.core.records import suggest
from edgeship.errors import SourceError, UnsafeSourceError, UsageError, WeightsError

if TYPE_CHECKING:
    import torch

# What a model may be about; other models say with --input what they take.
MAIN = ("input_ids", "pixel_values", "input_features", "input_values", "past_values")
TOKENS = ("batch_size", "sequence_length")
AXES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "bbox"), TOKENS),
    "pixel_values": ("batch_size", "num_channels", "height", "width"),
    "input_features": ("batch_size", "feature_size", "nb_max_frames"),
    "input_values": ("batch_size", "audio_sequence_length"),
}
DEFAULT_TOKENS = 128
# Positions of a decoder whose model has no table of them.
DEFAULT_WRITTEN = 512
# A second at 16 kHz.
DEFAULT_SAMPLES = 16000


@dataclass(frozen=True)
class LoadedFolder:
    """A model in memory with its inputs.

    Args:
        examples: one tensor an input, to trace with. task: optimum's name, empty when it knows none.
    """

    model: Any
    inputs: tuple[TensorSpec, ...]
    examples: tuple[torch.Tensor, ...]
    task: str


def load_folder(folder: Path, given: Sequence[TensorSpec] = ()) -> LoadedFolder:
    """Load the model that ``config.json`` names, in float32, on the CPU.

    Args:
        given: inputs that the user sized (``--input``); the others get the model's own sizes (image size from the
            processor or config, 128 tokens for text).

    Raises:
        SourceError: unreadable config, unknown architecture. UnsafeSourceError: the folder brings its own code.
        WeightsError: weights missing, truncated, or of another shape.
    """
    import torch
    import transformers

    from edgeship.compat.torch import seeded

    config_data = _read_json(folder / "config.json")
    if "auto_map" in config_data and config_data.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UnsafeSourceError(
            f"{folder} brings its own model code", fix="edgeship runs no code from a folder; write a factory that does"
        )
    if config_data.get("model_type") not in transformers.CONFIG_MAPPING:
        raise SourceError(
            f"{folder}: transformers {transformers.__version__} knows no model type {config_data.get('model_type')!r}",
            fix=suggest(str(config_data.get("model_type")), transformers.CONFIG_MAPPING.keys()),
        )
    name = (config_data.get("architectures") or ["AutoModel"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None and "auto_map" in config_data:
        raise UnsafeSourceError(
            f"{folder} brings its own model code", fix="edgeship runs no code from a folder; write a factory that does"
        )
    if model_class is None:
        raise SourceError(f"{folder}: transformers has no class {name}", fix="correct architectures in config.json")
    check_shards(folder)
    try:
        with seeded(0):
            model, loading = model_class.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # safetensors, JSON, shape and config errors of many types
        raise WeightsError(
            f"{folder} cannot be loaded: {' '.join(str(error).split())[:240]}", fix="download the folder again"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise WeightsError(f"{folder} lacks the weight {missing[0]}", fix="download the folder again")
    model, task = model.eval(), _task(model)
    specs, examples = zip(*_inputs(model, folder, task, given), strict=True)
    return LoadedFolder(model, specs, examples, task)


def part_of(
    loaded: LoadedFolder, part: str, context: int | None = None, given: Sequence[TensorSpec] = ()
) -> tuple[torch.nn.Module, tuple[TensorSpec, ...], list[str]]:
    """The ``encoder`` of an encoder-decoder or a step of its ``decoder``: network, inputs, and names of its outputs.

    Args:
        context: positions of the step's cache; the model's own when None. given: inputs that the user sized.

    Raises:
        UsageError: it is not an encoder-decoder that writes text, or has fewer positions than ``context``.
        SourceError: it does not run on inputs of these sizes.
    """
    from edgeship.core.decoder import DEFAULT_CONTEXT
    from edgeship.llm.encoder_decoder import decoder_of, encoder_of, positions_of

    config = loaded.model.config
    if not getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{type(loaded.model).__name__} is not an encoder-decoder", fix="leave --part out")
    if loaded.model.get_output_embeddings() is None:
        raise UsageError(f"{type(loaded.model).__name__} writes no text", fix="leave --part out")
    if sized := [spec.name for spec in given if spec.name.startswith("decoder_")]:
        raise UsageError(f"{sized[0]} has no size: a step takes one token", fix="size the encoder's inputs only")
    specs = tuple(spec for spec in loaded.inputs if not spec.name.startswith("decoder_"))
    if part == "encoder":
        network, names = encoder_of(loaded.model, specs)
        return network, specs, names
    positions = positions_of(config) or max(context or 2, DEFAULT_WRITTEN)
    if context is not None and not 1 < context <= positions:
        raise UsageError(
            f"--context {context} is not among the {positions} positions of the decoder", fix=f"give 2 to {positions}"
        )
    step, inputs, names = decoder_of(loaded.model, specs, context or min(positions, DEFAULT_CONTEXT))
    return step, tuple(inputs), names


def call_by_name(names: Sequence[str]) -> Any:
    """How the exporter calls a transformers model: by keyword, caches off, tensors out in the model's own order."""

    def call(model: Any, *tensors: Any) -> tuple[Any, ...]:
        return tuple(outputs_of(model, dict(zip(names, tensors, strict=True))).values())

    return call


def outputs_of(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that a model returns, by its own names. Caches, hidden states and attentions are left out."""
    import torch

    extra = {"use_cache": False} if getattr(model.config, "use_cache", None) else {}
    result = model(**inputs, **extra)
    return {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}


def _inputs(model: Any, folder: Path, task: str, given: Sequence[TensorSpec]) -> list[tuple[TensorSpec, torch.Tensor]]:
    """Each input's specification and a tensor of its shape: those given, else those that optimum knows."""
    import inspect

    from edgeship.data.specs import example_tensors
    from edgeship.frontends.dummies import example_input

    accepted = inspect.signature(model.forward).parameters
    by_name = {spec.name: spec for spec in given}
    for name in by_name:
        if name not in accepted:
            raise UsageError(f"{type(model).__name__} has no input {name}", fix=suggest(name, accepted))
    processor = folder / "preprocessor_config.json"
    notes = _read_json(processor) if processor.is_file() else {}
    sizes = _sizes(model.config, notes, by_name)
    made = []
    for name in dict.fromkeys([*_names(model, folder, accepted), *by_name]):
        spec, example = example_input(model, task, name, sizes)
        if name == "pixel_values" and notes.get("image_mean") and notes.get("image_std"):
            spec = replace(spec, mean=tuple(notes["image_mean"]), std=tuple(notes["image_std"]))
        sized = _resize(spec, by_name.get(name))
        made.append((sized, example if sized.shape == spec.shape else example_tensors([sized])[0]))
    if not made:
        raise SourceError(f"the inputs of {type(model).__name__} are not known", fix="give them with --input")
    return made


def _names(model: Any, folder: Path, accepted: Collection[str]) -> list[str]:
    """The inputs that a model is run with, of the many that its ``forward`` accepts."""
    config = model.config
    names = [model.main_input_name] if model.main_input_name in MAIN else []
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        names = ["input_ids", "pixel_values"]
    if "input_ids" in names:
        names.append("attention_mask")
        tokenizer = folder / "tokenizer_config.json"
        told = _read_json(tokenizer).get("model_input_names", []) if tokenizer.is_file() else []
        if int(getattr(config, "type_vocab_size", 0) or 0) > 1 and "token_type_ids" in told:
            names.append("token_type_ids")
        names.append("bbox")
    if getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    return [name for name in names if name in accepted]


def _sizes(config: Any, processor: Mapping[str, Any], given: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Sizes in the words of optimum's generators: the user's, else the processor's, the configuration's, or ours."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", 0) or getattr(text, "max_target_positions", 0)
    height, width = _image_size(config, processor)
    sizes = {
        "batch_size": 1,
        "sequence_length": min(DEFAULT_TOKENS, int(positions or DEFAULT_TOKENS)),
        "num_channels": int(getattr(config, "num_channels", 3)),
        "height": height,
        "width": width,
        "feature_size": int(getattr(config, "num_mel_bins", 80)),
        "nb_max_frames": 2 * int(getattr(config, "max_source_positions", 1500)),
        "audio_sequence_length": DEFAULT_SAMPLES,
    }
    # A size that is given for one input holds for its neighbours: a mask is as long as its ids.
    for name, spec in reversed(list(given.items())):
        sizes |= dict(zip(AXES.get(name, ()), spec.shape, strict=False))
    return sizes


def _image_size(config: Any, processor: Mapping[str, Any]) -> tuple[int, int]:
    size: Any = processor.get("crop_size") or processor.get("size")
    size = size or getattr(getattr(config, "vision_config", config), "image_size", None) or 224
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge", 224)
        size = (size.get("height", edge), size.get("width", edge))
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _resize(spec: TensorSpec, given: TensorSpec | None) -> TensorSpec:
    if given is None:
        return spec
    if given.dtype != spec.dtype and not {given.dtype, spec.dtype} <= {"i64", "i32"}:
        raise UsageError(
            f"input {spec.name} is {spec.dtype}, not {given.dtype}", fix=f"write {spec.name}:{spec.dtype}[..]"
        )
    return replace(spec, shape=given.shape)


def _task(model: Any) -> str:
    """The task by optimum's name; empty when it does not know the class."""
    try:
        from optimum.exporters.tasks import TasksManager
    except ImportError:
        return ""
    try:
        return str(TasksManager.infer_task_from_model(model))
    except (ValueError, KeyError):
        return ""


def check_shards(folder: Path) -> None:
    """Every shard is there, before anything expensive starts."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise UnsafeSourceError(f"{index} names {shard}, outside the folder", fix="download the folder again")
            if not (folder / shard).is_file():
                raise WeightsError(f"{folder} lacks {shard}", fix="download the folder again")
        return
    if not any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        raise WeightsError(f"{folder} holds no model.safetensors", fix="save the model with save_pretrained")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}", fix="download the folder again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path} does not hold a JSON object", fix="download the folder again")
    return data
