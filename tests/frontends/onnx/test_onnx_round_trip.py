"""torch to ONNX and back: the imported module answers as the original does, and exports again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx_files import SHARED
from torch import nn

from edgeship.frontends.onnx.importer import ImportedOnnx, import_onnx

ULTRAFACE = SHARED / "data" / "models" / "ultraface" / "version-slim-320.onnx"


class SqueezeExcite(nn.Module):
    """A picture network with a gate, an upsampling and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.wide = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.hardswish(self.norm(self.stem(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(h.mean((2, 3))))))
        h = h * gate[:, :, None, None]
        h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
        return F.interpolate(self.wide(h), size=(20, 28), mode="nearest") + F.pad(x[:, :, :4, :4], (0, 24, 0, 16))


class Tagger(nn.Module):
    """Embedding, two-way LSTM, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.table(ids))[0]).log_softmax(-1)


def _bert() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config), (torch.randint(0, 60, (1, 12)), torch.ones(1, 12, dtype=torch.int64))


def _vit() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return ViTModel(config), (torch.randn(1, 3, 32, 32),)


def _resnet() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return ResNetModel(config), (torch.randn(1, 3, 32, 32),)


def _squeeze_excite() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return SqueezeExcite(), (torch.randn(1, 3, 20, 28),)


def _tagger() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Tagger(), (torch.randint(0, 30, (2, 7)),)


def _flat(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [tensor for value in values for tensor in _flat(value)]  # type: ignore[attr-defined]


def _weights(imported: ImportedOnnx) -> set[str]:
    return {name for name, _ in imported.module.named_parameters()}


@pytest.mark.parametrize(
    "make",
    [
        _squeeze_excite,
        pytest.param(_tagger, marks=pytest.mark.heavy),
        pytest.param(_bert, marks=pytest.mark.heavy),
        pytest.param(_vit, marks=pytest.mark.heavy),
        pytest.param(_resnet, marks=pytest.mark.heavy),
    ],
    ids=lambda make: make.__name__.strip("_"),
)
def test_round_trip(tmp_path: Path, make: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]) -> None:
    torch.manual_seed(0)
    model, arguments = make()
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path / "m.onnx"
    torch.onnx.export(model, arguments, path, dynamo=True, verbose=False)
    imported = import_onnx(path)
    program = torch.export.export(imported.module, arguments, strict=False)
    with torch.no_grad():
        expected = _flat(model(*arguments))
        for results in (imported.module(*arguments), program.module()(*arguments)):
            assert len(results) == len(expected)
            for got, want in zip(results, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    targets = {str(node.target) for node in program.graph.nodes}
    layers = {type(module).__name__ for module in model.modules()}
    if "Linear" in layers:
        assert "aten.linear.default" in targets
    if "LayerNorm" in layers:
        assert "aten.layer_norm.default" in targets
    if "Embedding" in layers:
        assert "aten.embedding.default" in targets
    # Every matrix of the original is a weight of the copy, under its own name where the exporter kept it.
    theirs = sorted(tuple(p.shape) for p in model.parameters() if p.dim() == 2)
    ours = [tuple(p.shape) for p in imported.module.parameters()]
    if "LSTM" not in layers and "BertPooler" not in layers:
        assert all(shape in ours for shape in theirs)


@pytest.mark.skipif(not ULTRAFACE.is_file(), reason=f"no {ULTRAFACE}; set EDGESHIP_SHARED")
def test_ultraface(tmp_path: Path) -> None:
    imported = import_onnx(ULTRAFACE)
    assert [(info.name, info.dtype, info.shape) for info in imported.inputs] == [("input", "float32", (1, 3, 240, 320))]
    assert [(info.name, info.shape) for info in imported.outputs] == [("scores", (1, 4420, 2)), ("boxes", (1, 4420, 4))]
    assert "base_net.0.0.weight" in _weights(imported)
    image = torch.rand(1, 3, 240, 320, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(ULTRAFACE), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"input": image.numpy()})
    program = torch.export.export(imported.module, (image,), strict=False)
    with torch.no_grad():
        for results in (imported.module(image), program.module()(image)):
            for got, want in zip(results, expected, strict=True):
                torch.testing.assert_close(got, torch.from_numpy(want), rtol=0, atol=1e-4)
