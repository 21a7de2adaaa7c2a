"""Torch modules through ct.convert, compared with eager torch: exact in float32, to float16's rounding in float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.runtimes.coreml.evaluator import Evaluator


class Residual(nn.Module):
    """A block with an option-A shortcut: every other pixel, channels padded with zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.second(torch.relu(self.norm(self.first(x))))
        return torch.relu(y + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class Detector(nn.Module):
    """Boxes from a feature map, as face detectors make them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.Hardswish(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.PReLU(8)
        )
        self.head = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        features = self.head(nn.functional.interpolate(self.body(x), scale_factor=2.0, mode="bilinear"))
        flat = features.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 6)
        centre, size = torch.sigmoid(flat[..., :2]), torch.exp(flat[..., 2:4] * 0.1)
        return torch.cat([centre - size / 2, centre + size / 2], -1), torch.softmax(flat[..., 4:], -1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(6, 5, bidirectional=True), nn.GRU(10, 4)

    def forward(self, x):
        return self.gru(self.lstm(x)[0])[0]


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 5)

    def forward(self, ids):
        mask = (ids != 0).unsqueeze(-1)
        pooled = (self.table(ids) * mask).sum(1) / mask.sum(1)
        return self.head(nn.functional.gelu(pooled))


MODULES = {
    "residual": (Residual, lambda: torch.randn(2, 4, 8, 8)),
    "attention": (Attention, lambda: torch.randn(1, 6, 16)),
    "detector": (Detector, lambda: torch.randn(1, 3, 16, 12)),
    "recurrent": (Recurrent, lambda: torch.randn(7, 1, 6)),
    "embedded": (Embedded, lambda: torch.randint(0, 30, (1, 9))),
    "upsample": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.ELU(), nn.Upsample(scale_factor=2), nn.GroupNorm(2, 4)
        ),
        lambda: torch.randn(1, 3, 5, 5),
    ),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("precision", ["FLOAT32", "FLOAT16"])
@pytest.mark.parametrize("name", MODULES)
def test_converted_modules(ct, tmp_path, name, precision):
    torch.manual_seed(0)
    make, example = MODULES[name]
    module, x = make().eval(), example()
    integer = not x.dtype.is_floating_point
    model = ct.convert(
        torch.jit.trace(module, x),
        inputs=[ct.TensorType(name="x", shape=x.shape, dtype=np.int32 if integer else np.float32)],
        convert_to="mlprogram",
        compute_precision=getattr(ct.precision, precision),
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
    )
    path = tmp_path / "model.mlpackage"
    model.save(str(path))
    got = list(Evaluator(path).run({"x": x.numpy()}).values())
    with torch.no_grad():
        want = module(x)
    for g, w in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        error = np.linalg.norm(g - w.numpy()) / np.linalg.norm(w.numpy())
        assert g.shape == tuple(w.shape)
        assert error < (2e-6 if precision == "FLOAT32" else 2e-3)
        assert precision == "FLOAT32" or error > 0  # it did round
