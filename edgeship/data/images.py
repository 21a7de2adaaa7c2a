"""Read one image into a model's input: resize, scale to 0..1, normalise as the input says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.model import TensorSpec
from edgeship.errors import DataError, MissingToolError

if TYPE_CHECKING:
    import numpy.typing as npt


def read_image(path: Path, spec: TensorSpec) -> npt.NDArray[Any]:
    """One image as ``spec`` wants it, without the batch axis: (C, H, W), or (H, W, C) for layout NHWC, float32.

    Pixels become ``(value / 255 - mean) / std`` per channel; resizing is bilinear.
    """
    import numpy as np

    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingToolError("reading images needs pillow", fix='pip install "edgeship[images]"') from None
    last = spec.layout == "NHWC"
    channels, height, width = (spec.shape[3], spec.shape[1], spec.shape[2]) if last else spec.shape[1:]
    try:
        with Image.open(path) as image:
            image = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(image, np.float32) / 255
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} is not a readable image: {error}", fix="remove or replace it") from None
    pixels = pixels.reshape(height, width, channels)
    mean = np.asarray(spec.mean or (0.0,), np.float32)
    std = np.asarray(spec.std or (1.0,), np.float32)
    pixels = (pixels - mean) / std
    return pixels if last else np.ascontiguousarray(pixels.transpose(2, 0, 1))
