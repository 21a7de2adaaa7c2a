from __future__ import annotations

from edgeship.lowering.litert.fold import _reshape, start
from edgeship.lowering.litert.opened import open_weights


def test_axes_of_size_one_come_and_go():
    layout = _reshape(start((8, 16, 3)), (8, 16, 1, 3))
    assert layout is not None
    assert layout.axes == (0, 1, None, 2)
    assert layout.permutation(3) == (0, 1, 2)
    pointwise = _reshape(start((64, 32, 1, 1)), (64, 1, 1, 32))
    assert pointwise is not None
    assert pointwise.permutation(4) == (0, 1, 2, 3)


def test_a_reshape_that_mixes_axes_is_not_followed():
    assert _reshape(start((8, 16)), (16, 8)) is None
    assert _reshape(start((8, 16)), (128,)) is None


def test_opened_weights_are_inputs_and_give_the_same_answer(layers_program):
    import torch

    opened = open_weights(layers_program, ["up.weight", "words.weight"])
    assert opened.weights == ("up.weight", "words.weight")
    inputs = layers_program.example_inputs()
    with torch.no_grad():
        want = layers_program.module()(*inputs)
        have = opened.module(*inputs, *(layers_program.weight(name) for name in opened.weights))
    assert all(torch.equal(a, b) for a, b in zip(want, have, strict=True))
    # Nothing as large as a weight is needed to trace it.
    assert all(example.untyped_storage().nbytes() == 4 for example in opened.examples[2:])


def test_weights_are_stored_in_the_kernels_layouts(layers_program, lower_to_tflite):
    placed = {placement.weight: placement for placement in lower_to_tflite(layers_program).placements}
    assert placed["stem.weight"].shape == (32, 3, 3, 3)
    assert placed["stem.weight"].permutation == (0, 2, 3, 1)
    assert placed["depthwise.weight"].shape == (1, 3, 3, 32)
    assert placed["pointwise.weight"].shape == (64, 1, 1, 32)
    assert placed["wave.weight"].shape == (32, 1, 3, 16)
    # The kernel of a transposed convolution is turned twice on the way, so it is stored unturned.
    assert placed["up.weight"].shape == (16, 2, 2, 64)
    assert placed["up.weight"].permutation == (1, 2, 3, 0)
