"""``--cut`` and suppression as a user meets them: one build, and bad input in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TARGET = ("--target", "linux-x86", "--runtime", "onnx", "--profile", "exact")
MODEL = """
import sys
import torch
from torch import nn

sys.path.insert(0, {tests!r})
from vision_operators import nms


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, boxes, scores):
        corner = self.head(boxes).abs()
        boxes = torch.cat([corner[:, :2], corner[:, :2] + corner[:, 2:]], 1)
        sure = scores > 0.4
        boxes, scores = boxes[sure], scores[sure]
        kept = nms(boxes, scores, 0.3)
        return {{"boxes": boxes[kept], "scores": scores[kept]}}


def model():
    torch.manual_seed(0)
    return Detector()


def open_ended():
    class Model(Detector):
        def forward(self, boxes, scores):
            return self.head(boxes)[scores > 0.4].unique()

    torch.manual_seed(0)
    return Model()
"""
INPUTS = ("--input", "raw:f32[12,4]", "--input", "sure:f32[12]")


@pytest.fixture
def source(tmp_path: Path) -> str:
    file = tmp_path / "detector.py"
    file.write_text(MODEL.format(tests=str(Path(__file__).resolve().parents[1])), encoding="utf-8")
    return str(file)


def test_a_detector_is_built_whole(cli: Callable[..., Any], source: str, tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    from vision_operators import nms

    from edgeship import open_bundle

    ran = cli("build", f"{source}:model", *INPUTS, *TARGET, "-o", str(tmp_path / "out"))
    assert ran.code == 0, ran.err
    assert "of 12 rows count count" in ran.out
    with open_bundle(tmp_path / "out")["onnx"].open() as session:
        generator = np.random.default_rng(5)
        for _ in range(5):
            feeds = {
                "raw": generator.random((12, 4), np.float32) * 9,
                "sure": generator.random(12, np.float32),
            }
            found = session.run(feeds)
            count = int(found["count"][0])
            scores = torch.from_numpy(feeds["sure"])
            assert 0 < count <= int((scores > 0.4).sum())
            boxes = torch.from_numpy(found["boxes"][:count])
            # What is kept suppresses nothing of itself.
            assert nms(boxes, torch.from_numpy(found["scores"][:count]), 0.3).tolist() == list(range(count))
            assert not found["boxes"][count:].any()


def test_an_end_in_a_manifest(cli: Callable[..., Any], source: str, tmp_path: Path) -> None:
    ran = cli("build", f"{source}:model", *INPUTS, *TARGET, "--cut", "head", "-o", str(tmp_path / "out"))
    assert ran.code == 0, ran.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    text = json.dumps(manifest)
    assert '"head"' in text
    assert '"count"' not in text


BAD = [
    (("--cut", "heed"), "did you mean head?", 2),
    (("--cut", ""), "no module", 2),
    (("--set", "load/torch.candidates=0"), "0 candidates are not 1 to", 2),
    (("--set", "load/torch.candidates=100000"), "100000 candidates", 2),
    (("--set", "load/torch.cut=head"), "change --cut instead", 2),
]


@pytest.mark.parametrize(("said", "told", "code"), BAD)
def test_bad_input(cli: Callable[..., Any], source: str, said: tuple[str, ...], told: str, code: int) -> None:
    ran = cli("plan", f"{source}:model", *INPUTS, *TARGET, *said)
    assert ran.code == code, ran.err
    assert len(ran.errors) == 1
    assert told in ran.errors[0]


def test_what_has_no_fixed_size_names_an_end(cli: Callable[..., Any], source: str) -> None:
    ran = cli("plan", f"{source}:open_ended", *INPUTS, *TARGET)
    assert ran.code == 3
    assert len(ran.errors) == 1
    assert "unique" in ran.errors[0]
    assert "--cut head" in ran.errors[0]


def test_language_models_are_not_cut(cli: Callable[..., Any], shared: Path) -> None:
    ran = cli("plan", str(shared / "data/models/tinystories-llama-5m"), "--cut", "model.norm", *TARGET)
    assert ran.code == 2
    assert "--cut is for networks" in ran.errors[0]
