from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from edgeship.core.weights import expand_blocks
from edgeship.errors import EncodingError
from edgeship.lowering.onnx.weights import block_layout


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        ((4, 6), (1, 1)),
        ((4, 6), (4, 1)),
        ((4, 6), (1, 6)),
        ((4, 6), (4, 2)),
        ((4, 6), (2, 6)),
        ((4, 6, 3, 3), (4, 1, 1, 1)),
        ((4, 6, 3, 3), (4, 2, 3, 3)),
        ((1, 6), (1, 1)),
        ((1, 6), (1, 3)),
        ((5,), (5,)),
    ],
)
def test_dequantize_linear_means_the_same_as_our_scales(shape, scale):
    generator = np.random.default_rng(0)
    values = generator.integers(-127, 128, shape, dtype=np.int8)
    numbers = generator.random(scale, dtype=np.float32)
    attributes, squeezed = block_layout(shape, scale)
    node = onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["y"], **attributes)
    # ONNX's own evaluator, with the scales as the layout wants them.
    made = ReferenceEvaluator(node).run(None, {"q": values, "s": numbers.reshape(squeezed)})[0]
    assert np.array_equal(made, values * expand_blocks(numbers, shape))


@pytest.mark.parametrize("scale", [(2, 2), (4, 2, 1, 1)])
def test_blocks_over_two_axes_are_refused(scale):
    with pytest.raises(EncodingError, match="per-channel"):
        block_layout((4, 6, 3, 3)[: len(scale)], scale)
