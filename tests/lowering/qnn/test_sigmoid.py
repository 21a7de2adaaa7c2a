"""Sigmoids whose answers an output shows are spelled out for Hexagon; those within a network are not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgeship.core.model import TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.core.registry import runtimes
from edgeship.passes.lower.onnx_to_qnn import OnnxToQnn
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.program.export import make_program
from edgeship.runtimes.qnn.runtime import RUNTIME

pytest.importorskip("onnxruntime_qnn")


class Head(nn.Module):
    """Boxes of pixels beside rare scores, behind a SiLU.

    Args:
        bias: of the scores before their sigmoid.
    """

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.body, self.box, self.score, self.kind = (
            nn.Conv2d(*sizes, 1) for sizes in ((3, 8), (8, 4), (8, 1), (8, 3))
        )
        nn.init.constant_(self.score.bias, bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.body(image))
        sure = self.score(y).sigmoid()
        # [1, 4 + 1 + 3, H, W] -> [1, H * W, 8]
        return torch.cat([self.box(y) * 40, sure, sure * self.kind(y).sigmoid()], 1).flatten(2).transpose(1, 2)


def ratio_db(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(wanted).mean() / np.square(found - wanted).mean()))


@pytest.mark.parametrize("size", [1, 40], ids=["usual", "where the exponential overflows float16"])
def test_rare_scores_are_right_on_hexagon(tmp_path: Path, size: float) -> None:
    torch.manual_seed(0)
    head, image = Head(-4.0).eval(), size * torch.randn(1, 3, 8, 8)
    program = make_program(head, [TensorSpec("image", "f32", (1, 3, 8, 8))], [image])
    program.save(tmp_path / "program")
    for name in ("onnx", "qnn"):
        (tmp_path / name).mkdir()
    lowered = TorchToOnnx().run(TorchModel(tmp_path / "program", program.signature), Context(tmp_path / "onnx"))
    artifact = OnnxToQnn(soc_model=57, htp_arch=75).run(lowered, Context(tmp_path / "qnn"))
    written = onnx.load(tmp_path / "qnn" / "model_qnn" / "model.qdq.onnx")
    kinds = [node.op_type for node in written.graph.node]
    # The SiLU keeps its own.
    assert (kinds.count("Sigmoid"), kinds.count("Exp")) == (1, 2)
    with torch.no_grad():
        wanted = head(image).numpy()
    with RUNTIME.open(artifact) as session:
        (found,) = session.run({"image": image.numpy()}).values()
    assert min(ratio_db(wanted[..., place], found[..., place]) for place in range(8)) > 40


class Shown(nn.Module):
    """A rare share as an output shows it: its mean over time, as voice detectors do, or the one of two that is chosen.

    Args:
        how: ``mean`` or ``chosen``.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Conv1d(8, 1, 1)
        self.layer.bias.data.fill_(-5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(1, 8, T)`` to ``(1, 1)`` or ``(1, 1, T)``."""
        share = self.layer(x).sigmoid()
        return share.mean(-1) if self.how == "mean" else torch.where(share > 0.5, (share * share).clamp(max=0.9), share)


@pytest.mark.parametrize("how", ["mean", "chosen"])
def test_a_rare_score_is_right_on_hexagon_however_it_is_shown(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    x = 0.1 * torch.randn(1, 8, 6)
    program = make_program(Shown(how).eval(), [TensorSpec("x", "f32", (1, 8, 6))], [x])
    program.save(tmp_path / "program")
    for name in ("onnx", "qnn"):
        (tmp_path / name).mkdir()
    lowered = TorchToOnnx().run(TorchModel(tmp_path / "program", program.signature), Context(tmp_path / "onnx"))
    artifact = OnnxToQnn(soc_model=57, htp_arch=75).run(lowered, Context(tmp_path / "qnn"))
    with runtimes()["qnn"].open(artifact) as session:
        (found,) = session.run({"x": x.numpy()}).values()
    wanted = program.module()(x)[0].detach().numpy()
    assert abs(found / wanted - 1).max() < 0.02, "its own Sigmoid is half or all of 0.007 away"


class Deep(nn.Module):
    """Residual blocks of a SiLU, as many as a detector has."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.silu(3 * layer(x))
        return x


@pytest.mark.parametrize(("count", "spelled"), [(24, True), (4, False)])
def test_many_silus_do_not_add_up_their_errors(tmp_path: Path, count: int, spelled: bool) -> None:
    torch.manual_seed(0)
    deep, x = Deep(count).eval(), torch.randn(1, 8, 6, 6)
    program = make_program(deep, [TensorSpec("x", "f32", (1, 8, 6, 6))], [x])
    program.save(tmp_path / "program")
    for name in ("onnx", "qnn"):
        (tmp_path / name).mkdir()
    lowered = TorchToOnnx().run(TorchModel(tmp_path / "program", program.signature), Context(tmp_path / "onnx"))
    artifact = OnnxToQnn(soc_model=57, htp_arch=75).run(lowered, Context(tmp_path / "qnn"))
    written = onnx.load(tmp_path / "qnn" / "model_qnn" / "model.qdq.onnx")
    assert [node.op_type for node in written.graph.node].count("Exp") == (count if spelled else 0)
    with RUNTIME.open(artifact) as session:
        (found,) = session.run({"x": x.numpy()}).values()
    wanted = program.module()(x)[0].detach().numpy()
    assert ratio_db(wanted, found) > (36 if spelled else 25)
