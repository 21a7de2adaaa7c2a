"""Operators that the normal form or a converter's table writes otherwise, through each runtime, against torch."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeship.core.registry import runtimes

PLANE, ROOM = (1, 4, 8, 9), (1, 4, 5, 8, 9)
SOUND = (1, 200)


class Layer(nn.Module):
    """A convolution with seeded weights that no program calls a weight of its own."""

    def __init__(self, kind, *args, **kwargs):
        super().__init__()
        torch.manual_seed(3)
        self.layer = kind(*args, **kwargs)

    def forward(self, x):
        return self.layer(x)


def there_and_back(x):
    window = torch.hann_window(32)
    found = torch.stft(x, 32, 8, window=window, return_complex=True)
    return torch.istft(found * 0.5, 32, 8, window=window, length=200)


CASES = {
    "adaptive_largest": (lambda x: functional.adaptive_max_pool2d(x, (3, 4)), [PLANE], None),
    "adaptive_room": (lambda x: functional.adaptive_avg_pool3d(x, (3, 2, 4)), [ROOM], None),
    "holes": (lambda x: functional.max_pool2d(x, 2, 1, 0, dilation=2), [PLANE], None),
    "holes_in_room": (lambda x: functional.max_pool3d(x, 2, 1, 0, dilation=2), [ROOM], None),
    "past_the_end": (lambda x: functional.max_pool2d(x, 3, 2, 0, ceil_mode=True), [PLANE], None),
    "places": (lambda x: functional.max_pool2d(x, 2, return_indices=True), [PLANE], None),
    "room_counted": (lambda x: functional.avg_pool3d(x, 3, 2, 1, True, False), [ROOM], None),
    "divisor": (lambda x: functional.avg_pool2d(x, 3, 2, 1, True, divisor_override=4), [PLANE], None),
    "round": (lambda x: functional.pad(x, (1, 2, 0, 1), mode="circular"), [PLANE], None),
    "room_groups": (Layer(nn.Conv3d, 4, 6, 3, (1, 2, 2), (1, 0, 2), (1, 1, 2), 2), [ROOM], None),
    "room_deep": (Layer(nn.Conv3d, 4, 4, (3, 1, 1), padding=(1, 0, 0), groups=4, bias=False), [ROOM], None),
    "room_back": (Layer(nn.ConvTranspose3d, 4, 6, 3, 2, 1, 1), [ROOM], None),
    "room_back_groups": (Layer(nn.ConvTranspose3d, 4, 6, 4, 2, 1, groups=2), [ROOM], None),
    "averaged": (lambda x: functional.interpolate(x, (4, 5), mode="bilinear", antialias=True), [PLANE], None),
    "added": (lambda x, ids: torch.zeros(10, 4).scatter_add(0, ids, x), [(6, 4)], (6, 4)),
    "named": (
        lambda x: torch.multiply(x, 2.0) + torch.divide(x, 3.0) - torch.subtract(x, x.abs().true_divide(2.0)),
        [(2, 6)], None,
    ),
    "spectrum": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * 2, s=(8, 9), norm="ortho"), [PLANE], None),
    "back_and_forth": (there_and_back, [SOUND], None),
}  # fmt: skip
# Runtime -> (its folder of runtimes, the pass, what the pass takes, the least ratio in dB).
LOWERED = {
    "onnx": ("torch_to_onnx", "TorchToOnnx", (), 90),
    "tflite": ("torch_to_tflite", "TorchToTFLite", (), 90),
    "coreml": ("torch_to_coreml", "TorchToCoreML", ("iOS17", "float32"), 90),
    "coreai": ("torch_to_coreai", "TorchToCoreAI", ("float32",), 90),
}


@pytest.mark.heavy
@pytest.mark.parametrize("runtime", LOWERED)
def test_computes_what_torch_computes(runtime, lower, apple) -> None:
    module, name, said, least = LOWERED[runtime]
    step = getattr(importlib.import_module(f"edgeship.passes.lower.{module}"), name)(*said)
    program = apple.program_of_all(CASES)
    found = apple.decibels_by_output(runtimes()[runtime], lower(program, step), program)
    assert {output: ratio for output, ratio in found.items() if ratio < least} == {}
