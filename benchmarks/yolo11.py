"""YOLO11n as a network of random weights: its blocks and widths, and boxes and scores at every place of three maps.

Written after the description of the architecture (docs.ultralytics.com/models/yolo11): 2.6 million weights, 6.5 billion
operations at 640 px. Boxes are left as distributions over distances; what follows them in an app is arithmetic.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

DISTANCES, CLASSES = 16, 80


def _conv(inner: int, outer: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    """Convolution, batch norm, SiLU."""
    convolution = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outer, eps=1e-3), nn.SiLU() if act else nn.Identity())


class _Bottleneck(nn.Module):
    def __init__(self, width: int, middle: int) -> None:
        super().__init__()
        self.down, self.up = _conv(width, middle, 3), _conv(middle, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two convolutions around a shortcut."""
        return x + self.up(self.down(x))


class _Cross(nn.Module):
    """Half of the channels through bottlenecks, half past them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.first, self.second, self.join = _conv(width, half), _conv(width, half), _conv(2 * half, width)
        self.inner = nn.Sequential(_Bottleneck(half, half), _Bottleneck(half, half))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, C, H, W]`` to the same shape."""
        return self.join(torch.cat([self.inner(self.first(x)), self.second(x)], 1))


class _Stage(nn.Module):
    """The block C3k2: channels are split, one half goes through, and all stages of it are joined."""

    def __init__(self, inner: int, outer: int, deep: bool, share: float = 0.5) -> None:
        super().__init__()
        self.half = int(outer * share)
        self.open, self.close = _conv(inner, 2 * self.half), _conv(3 * self.half, outer)
        self.body = _Cross(self.half) if deep else _Bottleneck(self.half, self.half // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, inner, H, W]`` to ``[1, outer, H, W]``."""
        one, two = self.open(x).chunk(2, 1)
        return self.close(torch.cat([one, two, self.body(two)], 1))


class _Pyramid(nn.Module):
    """The block SPPF: the same pool three times, all joined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.open, self.close = _conv(width, width // 2), _conv(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, C, H, W]`` to the same shape."""
        found = [self.open(x)]
        for _ in range(3):
            found.append(functional.max_pool2d(found[-1], 5, 1, 2))
        return self.close(torch.cat(found, 1))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.key = self.size // 2
        self.mix = _conv(width, heads * (2 * self.key + self.size), act=False)
        self.place, self.out = _conv(width, width, 3, groups=width, act=False), _conv(width, width, act=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention between the places of a map ``[1, C, H, W]``."""
        _, width, high, wide = x.shape
        # [1, heads * (2 K + S), H, W] -> [1, heads, 2 K + S, H * W]
        mixed = self.mix(x).reshape(len(x), self.heads, 2 * self.key + self.size, high * wide)
        query, key, value = mixed.split([self.key, self.key, self.size], 2)
        weights = (query.transpose(2, 3) @ key * self.key**-0.5).softmax(-1)
        seen = (value @ weights.transpose(2, 3)).reshape(len(x), width, high, wide)
        return self.out(seen + self.place(value.reshape(len(x), width, high, wide)))


class _Attended(nn.Module):
    """The block C2PSA: attention on half of the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.open, self.close = _conv(width, width), _conv(width, width)
        self.attention = _Attention(half, max(half // 64, 1))
        self.feed = nn.Sequential(_conv(half, width), _conv(width, half, act=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, C, H, W]`` to the same shape."""
        one, two = self.open(x).chunk(2, 1)
        two = two + self.attention(two)
        return self.close(torch.cat([one, two + self.feed(two)], 1))


class _Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        boxes, classes = 64, 80
        self.boxes = nn.Sequential(_conv(width, boxes, 3), _conv(boxes, boxes, 3), nn.Conv2d(boxes, 4 * DISTANCES, 1))
        self.scores = nn.Sequential(
            _conv(width, width, 3, groups=width), _conv(width, classes),
            _conv(classes, classes, 3, groups=classes), _conv(classes, classes), nn.Conv2d(classes, CLASSES, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, C, H, W]`` to ``[1, 4 * 16 + 80, H * W]``."""
        return torch.cat([self.boxes(x), self.scores(x)], 1).flatten(2)


class Yolo11n(nn.Module):
    """Backbone, neck and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Sequential(
            _conv(3, 16, 3, 2), _conv(16, 32, 3, 2), _Stage(32, 64, False, 0.25), _conv(64, 64, 3, 2),
            _Stage(64, 128, False, 0.25),
        )  # fmt: skip
        self.fourth = nn.Sequential(_conv(128, 128, 3, 2), _Stage(128, 128, True))
        self.fifth = nn.Sequential(_conv(128, 256, 3, 2), _Stage(256, 256, True), _Pyramid(256), _Attended(256))
        self.up_fourth, self.up_third = _Stage(384, 128, False), _Stage(256, 64, False)
        self.down_third, self.down_fourth = _conv(64, 64, 3, 2), _conv(128, 128, 3, 2)
        self.out_fourth, self.out_fifth = _Stage(192, 128, False), _Stage(384, 256, True)
        self.heads = nn.ModuleList([_Head(64), _Head(128), _Head(256)])

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(1, 3, 640, 640)`` to distributions of distances ``(1, 64, 8400)`` and scores ``(1, 80, 8400)``."""
        third = self.third(image)
        fourth = self.fourth(third)
        fifth = self.fifth(fourth)
        middle = self.up_fourth(torch.cat([functional.interpolate(fifth, scale_factor=2.0), fourth], 1))
        small = self.up_third(torch.cat([functional.interpolate(middle, scale_factor=2.0), third], 1))
        medium = self.out_fourth(torch.cat([self.down_third(small), middle], 1))
        large = self.out_fifth(torch.cat([self.down_fourth(medium), fifth], 1))
        found = torch.cat([head(x) for head, x in zip(self.heads, (small, medium, large), strict=True)], 2)
        boxes, scores = found.split([4 * DISTANCES, CLASSES], 1)
        return boxes, scores.sigmoid()


def yolo11n() -> nn.Module:
    """YOLO11n, 640 px; batch norms have seen noise, so that what comes out says something."""
    torch.manual_seed(0)
    model = Yolo11n().train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, 320, 320))
    return model.eval()
