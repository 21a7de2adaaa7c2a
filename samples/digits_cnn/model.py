"""A small convolutional network for 8 x 8 handwritten digits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(self.first(x)))


class DigitsCNN(nn.Module):
    """``image`` (N, 1, 8, 8), normalised as `sample.toml` says -> ``logits`` (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 32)
        self.separable = nn.Sequential(conv(32, 32, groups=32), conv(32, 48, size=1))
        self.shrink = nn.MaxPool2d(2)
        self.residual = Residual(48)
        self.widen = conv(48, 96)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classify = nn.Linear(96, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.shrink(self.separable(self.stem(image)))
        x = self.pool(self.widen(self.residual(x)))
        return self.classify(self.dropout(torch.flatten(x, 1)))


def conv(channels_in: int, channels_out: int, size: int = 3, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU; spatial size kept."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def model() -> nn.Module:
    """The trained network."""
    network = DigitsCNN()
    network.load_state_dict(load_file(Path(__file__).parent / "weights.safetensors"))
    return network.eval()
