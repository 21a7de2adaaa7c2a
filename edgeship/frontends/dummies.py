"""Example inputs of a Hugging Face model, by optimum's input generators.

optimum's core has generators and normalised configurations, but not the table of which architecture takes which
inputs: that is in optimum-onnx, which needs an older transformers. So the names come from the model, sizes that the
folder or the user states are handed to the generator, and what it cannot make is drawn here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgeship.core.model import Signature, TensorSpec
from edgeship.data.batches import generate_batches
from edgeship.program.export import dtype_of

if TYPE_CHECKING:
    import torch

# In this order; the first that knows a name makes it.
GENERATORS = (
    "DummyTextInputGenerator", "DummyDecoderTextInputGenerator", "DummyVisionInputGenerator",
    "DummyAudioInputGenerator", "DummyBboxInputGenerator", "DummyPatchTSTInputGenerator",
)  # fmt: skip
# By ``config.model_type``: generators of one architecture only.
OF_ONE_MODEL = {
    "audio-spectrogram-transformer": "ASTDummyAudioInputGenerator",
    "longformer": "LongformerDummyTextInputGenerator",
}
LAYOUTS = {"pixel_values": "NCHW", "input_features": "NCT", "input_values": "NT", "past_values": "NTC"}
# Attributes that no configuration has, so that a generator takes the size that it is given.
UNSET = "edgeship_unset"


def example_input(model: Any, task: str, name: str, sizes: Mapping[str, int]) -> tuple[TensorSpec, torch.Tensor]:
    """One input by its name in ``forward``: what it looks like, and a tensor to trace with, the same in every run.

    The tensor has the shape that ``sizes`` and the input's layout say.

    Args:
        task: optimum's name, or empty. sizes: in optimum's words (``sequence_length``, ``height``, ``width`` ...).
    """
    import torch

    made = _generated(model, task, name, sizes)
    low, high = _range(model, name)
    if made is not None:
        shape, dtype = tuple(made.shape), dtype_of(made)
    else:
        shape, dtype = _shape(name, sizes), "f32" if name in LAYOUTS else "i64"
    usual = LAYOUTS.get(name, "NT")
    layout = usual if len(shape) == len(usual) else None
    spec = TensorSpec(name, dtype, shape, layout, low, high)
    if made is None:
        made = torch.from_numpy(generate_batches(Signature((spec,), ()), 1)[0][name].copy())
    return spec, made


def _generated(model: Any, task: str, name: str, sizes: Mapping[str, int]) -> torch.Tensor | None:
    """The tensor that optimum makes, or None where it has no generator, or one that does not fit the configuration.

    The shape that ``sizes`` say.
    """
    import torch

    try:
        from optimum import utils
    except ImportError:
        return None
    kind = str(getattr(model.config, "model_type", ""))
    for generator in filter(None, (OF_ONE_MODEL.get(kind), *GENERATORS)):
        cls = getattr(utils, generator, None)
        if cls is None or not any(name == known for known in cls.SUPPORTED_INPUT_NAMES):
            continue
        try:
            with _seeded():
                made = cls(task or "feature-extraction", _normalised(model.config, sizes), **sizes).generate(name)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            continue
        if isinstance(made, torch.Tensor):
            return made
    return None


def _normalised(config: Any, sizes: Mapping[str, int]) -> Any:
    """Optimum's view of a configuration; a general one for architectures that it does not list."""
    from optimum.utils import normalized_config as known

    try:
        cls = known.NormalizedConfigManager.get_normalized_config_class(config.model_type)
    except KeyError:
        if hasattr(config, "text_config") and hasattr(config, "vision_config"):
            return known.NormalizedTextAndVisionConfig(config, text_config="text_config", vision_config="vision_config")
        cls = known.NormalizedVisionConfig if hasattr(config, "num_channels") else known.NormalizedTextConfig
    # Height and width are in ``sizes``: the processor's word counts more than the configuration's.
    if isinstance(cls, type) and issubclass(cls, known.NormalizedVisionConfig):
        return cls(config, image_size=UNSET, input_size=UNSET)
    return cls(config)


def _shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    keys: tuple[str, ...] = ("batch_size", "sequence_length")
    if name == "pixel_values":
        keys = ("batch_size", "num_channels", "height", "width")
    elif name == "input_features":
        keys = ("batch_size", "feature_size", "nb_max_frames")
    elif name == "input_values":
        keys = ("batch_size", "audio_sequence_length")
    return tuple(sizes.get(key, 224) for key in keys)


def _range(model: Any, name: str) -> tuple[float | None, float | None]:
    """What integers mean something; None for masks, which are ones when drawn, and for floats."""
    if name in ("input_ids", "decoder_input_ids"):
        known = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
        return 0, (known or int(model.get_input_embeddings().num_embeddings)) - 1
    if name == "token_type_ids":
        return 0, int(getattr(model.config, "type_vocab_size", 0) or 1) - 1
    # Boxes drawn by number alone would have negative widths.
    return (0, 0) if name == "bbox" else (None, None)


@contextmanager
def _seeded() -> Iterator[None]:
    """Optimum draws from Python's and torch's own generators, which must give the same tensors in every run."""
    from edgeship.compat.torch import seeded

    state = random.getstate()
    random.seed(0)
    try:
        with seeded(0):
            yield
    finally:
        random.setstate(state)
