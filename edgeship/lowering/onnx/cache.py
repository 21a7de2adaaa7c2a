"""Caches of int8 in a written graph for onnxruntime-genai: GroupQueryAttention rounds the keys and values it keeps.

Each channel of each head has a scale. The graph itself, with the weights as they were stored, says how large its
keys and values are: it is run with its float32 caches before they are narrowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.errors import LoweringError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

OPERATOR = "GroupQueryAttention"
# Where its optional inputs of scales stand.
SCALES = 12
LARGEST_INT8 = 127
# Texts to come hold larger numbers than those that were looked at.
MARGIN = 1.1
# A channel that no text has used would have a scale of zero; as a share of its layer's largest number.
LEAST = 1e-3
# Rotated keys change with their position, so texts are put at no fewer places of the context than this.
PLACES = 16


def largest_numbers(path: Path, texts: Sequence[Sequence[int]], context: int) -> dict[str, Array]:
    """The largest size of each channel of each cache, ``[1, kv_heads, 1, head_dim]``, by the output's name.

    Args:
        path: a graph with float32 caches. texts: tokens. context: positions, over which the texts are spread.
    """
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path.as_posix(), options, providers=["CPUExecutionProvider"])
    empty = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    names = [value.name for value in session.get_outputs() if value.name.startswith("present.")]
    count = max(len(texts), PLACES)
    found: dict[str, Array] = {}
    for place in range(count):
        tokens = np.array([texts[place % len(texts)][:context]], np.int64)
        length = tokens.shape[1]
        start = (context - length) * place // max(1, count - 1)
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(start, start + length, dtype=np.int64)[None],
        }
        for name, cache in zip(names, session.run(names, {**inputs, **empty}), strict=True):
            # A first token is unlike all others, and no text starts but at position 0.
            kept = cache[:, :, 1:] if start and length > 1 else cache
            largest = np.abs(kept).max(axis=(0, 2), keepdims=True)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found


def narrow_caches(path: Path, largest: Mapping[str, Array]) -> None:
    """Give the caches of a graph the type int8 and scales. Its weights, in a file beside it, stay as they are.

    Raises `LoweringError` when a number is not finite.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    for node in model.graph.node:
        if node.op_type != OPERATOR:
            continue
        node.input.extend([""] * (SCALES - len(node.input)))
        for name in node.output[1:3]:
            top = float(largest[name].max())
            if not np.isfinite(top):
                raise LoweringError(f"{name} is not finite", fix="--kv-cache float32")
            scale = np.maximum(largest[name], LEAST * top or 1.0) * (MARGIN / LARGEST_INT8)
            model.graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"))
            node.input.append(f"{name}.scale")
        for kind in ("k", "v"):
            node.attribute.append(helper.make_attribute(f"{kind}_quant_type", "PER_CHANNEL"))
        node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
    onnx.save(model, path)
