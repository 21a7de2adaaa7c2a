"""Small networks of the kinds that people ship, with random weights, each a few milliseconds a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import models
import torch
from torch import nn
from torch.nn import functional


def _warmed(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Module:
    """A module whose batch norms have statistics of data, always the same."""
    torch.manual_seed(0)
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # The mean over all batches: with the usual share of a tenth, deep networks stop telling inputs apart.
            module.momentum = None
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn((4, *shape[1:])))
    return model.eval()


def _block(
    inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1, act: Callable[[], nn.Module] = nn.ReLU
):
    convolution = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outer), act())


class _Squeeze(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A gate for each channel."""
        y = functional.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))
        return x * functional.hardsigmoid(self.up(y))


class _Inverted(nn.Module):
    def __init__(
        self, inner: int, middle: int, outer: int, kernel: int, stride: int, squeeze: bool, hard: bool
    ) -> None:
        super().__init__()
        act = nn.Hardswish if hard else nn.ReLU
        self.expand = _block(inner, middle, 1, act=act)
        self.deep = _block(middle, middle, kernel, stride, middle, act)
        self.gate = _Squeeze(middle) if squeeze else nn.Identity()
        self.project = _block(middle, outer, 1, act=nn.Identity)
        self.adds = stride == 1 and inner == outer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An inverted bottleneck."""
        y = self.project(self.gate(self.deep(self.expand(x))))
        return x + y if self.adds else y


class _MobileNetV3(nn.Module):
    ROWS = (
        (16, 16, 3, 2, True, False), (72, 24, 3, 2, False, False), (88, 24, 3, 1, False, False),
        (96, 40, 5, 2, True, True), (240, 40, 5, 1, True, True), (120, 48, 5, 1, True, True),
        (288, 96, 5, 2, True, True), (576, 96, 5, 1, True, True),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        width, blocks = 16, [_block(3, 16, 3, 2, act=nn.Hardswish)]
        for middle, outer, kernel, stride, squeeze, hard in self.ROWS:
            blocks.append(_Inverted(width, middle, outer, kernel, stride, squeeze, hard))
            width = outer
        self.features = nn.Sequential(*blocks, _block(width, 576, 1, act=nn.Hardswish))
        self.head = nn.Sequential(nn.Linear(576, 512), nn.Hardswish(), nn.Linear(512, 1000))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(1, 3, 224, 224)`` to ``(1, 1000)``."""
        return self.head(functional.adaptive_avg_pool2d(self.features(image), 1).flatten(1))


def mobilenet_v3() -> nn.Module:
    """Like MobileNetV3-small: squeeze and excitation, hard swish, depthwise convolutions."""
    return _warmed(_MobileNetV3, (1, 3, 224, 224))


class _MobileNetV2(nn.Module):
    ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 3, 2), (6, 96, 2, 1), (6, 160, 2, 2))

    def __init__(self) -> None:
        super().__init__()
        width, blocks = 32, [_block(3, 32, 3, 2, act=nn.ReLU6)]
        for expand, outer, repeats, stride in self.ROWS:
            for number in range(repeats):
                step, middle = (1 if number else stride), width * expand
                layers = [_block(width, middle, 1, act=nn.ReLU6), _block(middle, middle, 3, step, middle, nn.ReLU6)]
                blocks.append(_Residual(nn.Sequential(*layers, _block(middle, outer, 1, act=nn.Identity)),
                                        step == 1 and width == outer))  # fmt: skip
                width = outer
        self.features, self.head = nn.Sequential(*blocks, _block(width, 640, 1, act=nn.ReLU6)), nn.Linear(640, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(1, 3, 160, 160)`` to ``(1, 1000)``."""
        return self.head(functional.adaptive_avg_pool2d(self.features(image), 1).flatten(1))


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module, adds: bool = True) -> None:
        super().__init__()
        self.inner, self.adds = inner, adds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` and what is made of it."""
        return x + self.inner(x) if self.adds else self.inner(x)


def mobilenet_v2() -> nn.Module:
    """Like MobileNetV2 at 160 px: inverted bottlenecks with ReLU6."""
    return _warmed(_MobileNetV2, (1, 3, 160, 160))


class _ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, 32, 7, 2), nn.MaxPool2d(3, 2, 1))
        layers, width = [], 32
        for outer in (32, 64, 128):
            layers.append(_block(width, outer, 3, 1 if outer == width else 2))
            for _ in range(2):
                inner = nn.Sequential(_block(outer, outer, 3), _block(outer, outer, 3, act=nn.Identity))
                layers += [_Residual(inner), nn.ReLU()]
            width = outer
        self.stages, self.head = nn.Sequential(*layers), nn.Linear(width, 100)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(1, 3, 160, 160)`` to ``(1, 100)``."""
        return self.head(self.stages(self.stem(image)).mean((2, 3)))


def resnet() -> nn.Module:
    """A residual network at 160 px."""
    return _warmed(_ResNet, (1, 3, 160, 160))


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 32, 3, 2)
        self.layers, self.steps, width = nn.ModuleList(), nn.ModuleList(), 32
        for _ in range(3):
            stage = nn.ModuleList()
            for _ in range(4):
                stage.append(nn.Sequential(_block(width, 48, 1), _block(48, 16, 3)))
                width += 16
            self.layers.append(stage)
            self.steps.append(nn.Sequential(_block(width, width // 2, 1), nn.AvgPool2d(2)))
            width //= 2
        self.head = nn.Linear(width, 100)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(1, 3, 128, 128)`` to ``(1, 100)``."""
        x = self.stem(image)
        for stage, step in zip(self.layers, self.steps, strict=True):
            for layer in stage:
                x = torch.cat([x, layer(x)], 1)
            x = step(x)
        return self.head(x.mean((2, 3)))


def densenet() -> nn.Module:
    """Like DenseNet: every layer reads all before it."""
    return _warmed(_Dense, (1, 3, 128, 128))


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = (16, 32, 64, 96)
        self.down = nn.ModuleList(
            nn.Sequential(_block(a, b, 3), _block(b, b, 3)) for a, b in zip((3, *sizes), sizes, strict=False)
        )
        self.up = nn.ModuleList(_block(a + b, b, 3) for a, b in ((96, 64), (64, 32), (32, 16)))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(1, 3, 96, 96)`` to ``(1, 4, 96, 96)``."""
        kept: list[torch.Tensor] = []
        x = image
        for number, stage in enumerate(self.down):
            x = stage(x if not number else functional.max_pool2d(x, 2))
            kept.append(x)
        for stage, beside in zip(self.up, kept[-2::-1], strict=True):
            x = stage(torch.cat([functional.interpolate(x, scale_factor=2.0), beside], 1))
        return self.head(x)


def unet() -> nn.Module:
    """A U-Net at 96 px."""
    return _warmed(_UNet, (1, 3, 96, 96))


class _Split(nn.Module):
    """YOLO's block: a part of the channels goes through bottlenecks, everything is joined."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.first, half = _block(inner, outer, 1, act=nn.SiLU), outer // 2
        self.deep = nn.Sequential(_block(half, half, 3, act=nn.SiLU), _block(half, half, 3, act=nn.SiLU))
        self.last = _block(outer + half, outer, 1, act=nn.SiLU)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels in two parts."""
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat([a, b, b + self.deep(b)], 1))


class _Yolo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        layers = [_block(3, 16, 3, 2, act=nn.SiLU)]
        for inner, outer in itertools.pairwise(widths):
            layers += [_block(inner, outer, 3, 2, act=nn.SiLU), _Split(outer, outer)]
        self.back = nn.Sequential(*layers)
        self.box, self.score = nn.Conv2d(128, 4, 1), nn.Conv2d(128, 20, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(1, 3, 256, 256)`` to boxes ``(1, 4, 256)`` and scores ``(1, 20, 256)``."""
        x = self.back(image)
        return self.box(x).flatten(2), self.score(x).sigmoid().flatten(2)


def yolo() -> nn.Module:
    """Like a small YOLO: SiLU, split and joined channels."""
    return _warmed(_Yolo, (1, 3, 256, 256))


class _ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths, layers, width = (40, 80, 160), [], 3
        for number, outer in enumerate(widths):
            layers.append(nn.Conv2d(width, outer, 2 if number else 4, 2 if number else 4))
            layers += [_NextBlock(outer) for _ in range(2)]
            width = outer
        self.stages, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(1, 3, 128, 128)`` to ``(1, 100)``."""
        return self.head(self.norm(self.stages(image).mean((2, 3))))


class _NextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.deep, self.norm = nn.Conv2d(width, width, 7, 1, 3, groups=width), nn.LayerNorm(width)
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A depthwise convolution, then two linear layers over channels last."""
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        return x + self.back(functional.gelu(self.wide(y))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """Like ConvNeXt at 128 px: depthwise 7x7, LayerNorm and linear layers over channels last."""
    return _warmed(_ConvNext, (1, 3, 128, 128))


def vit() -> nn.Module:
    """ViT with six layers of 192, 128 px."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768,
                       image_size=128, num_labels=100)  # fmt: skip
    return _Logits(ViTForImageClassification(config)).eval()


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(1, 3, 128, 128)`` to ``(1, 100)``."""
        return self.model(pixel_values=image).logits


class _Tcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Conv1d(40, 96, 5, padding=2), nn.ModuleList()
        for dilation in (1, 2, 4, 8):
            deep = nn.Conv1d(96, 96, 3, padding=dilation, dilation=dilation, groups=96)
            self.layers.append(nn.Sequential(deep, nn.BatchNorm1d(96), nn.ReLU(), nn.Conv1d(96, 96, 1)))
        self.head = nn.Linear(96, 12)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """``(1, 40, 100)`` to ``(1, 12)``."""
        x = functional.relu(self.stem(mel))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(2))


def tcn() -> nn.Module:
    """Keyword spotting: dilated depthwise convolutions over 100 frames."""
    return _warmed(_Tcn, (1, 40, 100))


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 at 224 px with its trained weights, or random ones where they are not there."""
    path = models.efficientnet_lite0_weights()
    if path is None:
        return _warmed(models.EfficientNetLite0, (1, 3, 224, 224))
    model = models.efficientnet_lite0()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model
