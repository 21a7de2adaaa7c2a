"""Read a local Hugging Face folder: architecture, weights, and what its inputs look like. Nothing is fetched or run
from the folder: ``trust_remote_code`` is off."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeship.core.model import TensorSpec
from edgeship.core.records import suggest
from edgeship.errors import SourceError, UnsafeSourceError, UsageError, WeightsError

TEXT = ("input_ids", "attention_mask", "token_type_ids")
VISION = ("pixel_values",)
AUDIO = ("input_features", "input_values")
DEFAULT_TOKENS = 128


@dataclass(frozen=True)
class LoadedFolder:
    """A model in memory with its inputs. ``task`` is optimum's name, empty when it knows none."""

    model: Any
    inputs: tuple[TensorSpec, ...]
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
        raise SourceError(f"{folder}: transformers has no class {name}", fix="mend architectures in config.json")
    _check_weights(folder)
    torch.manual_seed(0)
    try:
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
    return LoadedFolder(model.eval(), _inputs(model, folder, given), _task(model))


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


def _inputs(model: Any, folder: Path, given: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    import inspect

    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    if main in VISION:
        wanted = [_image_spec(model.config, folder)]
    elif main in AUDIO:
        wanted = [_audio_spec(model.config, main)]
    elif main == "input_ids":
        tokens = min(DEFAULT_TOKENS, int(getattr(model.config, "max_position_embeddings", 0) or DEFAULT_TOKENS))
        rows: Any = model.get_input_embeddings().num_embeddings
        vocabulary = int(getattr(model.config, "vocab_size", 0) or rows)
        types = int(getattr(model.config, "type_vocab_size", 0) or 0)
        wanted = [TensorSpec("input_ids", "i64", (1, tokens), "NT", 0, vocabulary - 1)]
        if "attention_mask" in accepted:
            wanted.append(TensorSpec("attention_mask", "i64", (1, tokens), "NT"))
        if "token_type_ids" in accepted and types > 1 and (folder / "tokenizer_config.json").is_file():
            names = _read_json(folder / "tokenizer_config.json").get("model_input_names", [])
            if "token_type_ids" in names:
                wanted.append(TensorSpec("token_type_ids", "i64", (1, tokens), "NT", 0, types - 1))
    else:
        wanted = []
    by_name = {spec.name: spec for spec in given}
    for name in by_name:
        if name not in accepted:
            raise UsageError(f"{type(model).__name__} has no input {name}", fix=suggest(name, accepted))
    sized = [_resize(spec, by_name.pop(spec.name, None)) for spec in wanted] + list(by_name.values())
    lengths = {spec.shape[-1] for spec in sized if spec.name in TEXT}
    if len(lengths) > 1:
        first = next(spec.shape for spec in given if spec.name in TEXT)
        sized = [
            _resize(spec, TensorSpec(spec.name, spec.dtype, first)) if spec.name in TEXT else spec for spec in sized
        ]
    if not sized:
        raise SourceError(f"the inputs of {type(model).__name__} are not known", fix="give them with --input")
    return tuple(sized)


def _resize(spec: TensorSpec, given: TensorSpec | None) -> TensorSpec:
    from dataclasses import replace

    if given is None:
        return spec
    if given.dtype != spec.dtype and not {given.dtype, spec.dtype} <= {"i64", "i32"}:
        raise UsageError(
            f"input {spec.name} is {spec.dtype}, not {given.dtype}", fix=f"write {spec.name}:{spec.dtype}[..]"
        )
    return replace(spec, shape=given.shape)


def _image_spec(config: Any, folder: Path) -> TensorSpec:
    path = folder / "preprocessor_config.json"
    processor = _read_json(path) if path.is_file() else {}
    size: Any = processor.get("crop_size") or processor.get("size") or getattr(config, "image_size", None) or 224
    if isinstance(size, dict):
        edge = size.get("shortest_edge", 224)
        size = (size.get("height", edge), size.get("width", edge))
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    channels = int(getattr(config, "num_channels", 3))
    mean, std = processor.get("image_mean"), processor.get("image_std")
    return TensorSpec(
        "pixel_values", "f32", (1, channels, height, width), "NCHW",
        mean=tuple(mean) if mean else None, std=tuple(std) if std else None,
    )  # fmt: skip


def _audio_spec(config: Any, name: str) -> TensorSpec:
    if name == "input_features":
        frames = 2 * int(getattr(config, "max_source_positions", 1500))
        return TensorSpec(name, "f32", (1, int(getattr(config, "num_mel_bins", 80)), frames), "NCT")
    return TensorSpec(name, "f32", (1, 16000), "NT")


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


def _check_weights(folder: Path) -> None:
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
