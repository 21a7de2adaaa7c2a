"""``--cut``: models that end at modules or nodes of the user's choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.errors import SourceError, UsageError
from edgeship.frontends.exported import program_of_exported
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram

Tensor = torch.Tensor


class Head(nn.Module):
    """Two results, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Linear(8, 3)
        self.box = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[N, 8] -> [N, 3] and [N, 4]."""
        return {"cls": self.cls(x), "box": self.box(x)}


class Detector(nn.Module):
    """What comes behind the head depends on values, in a way that nothing makes fixed."""

    def __init__(self, *, fixed: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.head = Head()
        self.unused = nn.Linear(2, 2)
        self.table = nn.Embedding(4, 8)
        self.fixed = fixed

    def forward(self, x: Tensor) -> Any:
        """[N, 6]."""
        table = self.table(torch.arange(2))
        y = self.stem(x) + self.stem(x * 0.5)
        found = self.head(y + table.sum())
        if self.fixed:
            return found["cls"].softmax(1) * 2
        return found["box"][found["cls"].argmax(1).unique()]


@pytest.fixture
def model() -> Detector:
    torch.manual_seed(0)
    return Detector().eval()


def ended(model: nn.Module, *cut: str, **options: Any) -> TorchProgram:
    """The model's program that ends there."""
    return make_program(model, [TensorSpec("x", "f32", (5, 6))], [torch.randn(5, 6)], cut=cut, **options)


def answers(program: TorchProgram, x: Tensor) -> dict[str, Tensor]:
    """By the names of the outputs."""
    with torch.no_grad():
        found = program.exported.module()(x)
    return dict(zip([spec.name for spec in program.signature.outputs], found, strict=True))


def test_modules(model: Detector) -> None:
    program = ended(model, "head.cls", "head.box")
    assert [spec.name for spec in program.signature.outputs] == ["head_cls", "head_box"]
    x = torch.randn(5, 6)
    with torch.no_grad():
        want = model.head(model.stem(x) + model.stem(x * 0.5) + model.table(torch.arange(2)).sum())
    found = answers(program, x)
    torch.testing.assert_close(found["head_cls"], want["cls"])
    torch.testing.assert_close(found["head_box"], want["box"])


def test_a_module_with_several_results(model: Detector) -> None:
    assert [spec.name for spec in ended(model, "head").signature.outputs] == ["head_cls", "head_box"]
    assert [spec.name for spec in ended(model, "head", output_names=["a", "b"]).signature.outputs] == ["a", "b"]


def test_a_module_that_runs_twice(model: Detector) -> None:
    program = ended(model, "stem")
    assert [spec.name for spec in program.signature.outputs] == ["stem_0", "stem_1"]
    assert not any("head" in name for name in program.weights)
    x = torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(answers(program, x)["stem_1"], model.stem(x * 0.5))


def test_a_node() -> None:
    torch.manual_seed(0)
    model = Detector(fixed=True).eval()
    program = ended(model, "softmax", "head.box")
    x = torch.randn(5, 6)
    with torch.no_grad():
        want = model(x) / 2
    torch.testing.assert_close(answers(program, x)["softmax"], want)
    assert [spec.shape for spec in program.signature.outputs] == [(5, 3), (5, 4)]


def test_a_node_of_an_archive() -> None:
    torch.manual_seed(0)
    model = Detector(fixed=True).eval()
    exported = torch.export.export(model, (torch.randn(5, 6),), strict=False)
    for name in ("softmax", "head.cls"):
        program = program_of_exported(exported, "m.pt2", (), {}, note="", cut=[name])
        assert len(program.signature.outputs) == 1
    x = torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(answers(program, x)["head_cls"].softmax(1) * 2, model(x))


BAD = [
    ("head.clss", "did you mean head.cls"),
    ("relu_7", "no module and no node of the graph has that name"),
    ("unused", "does not run"),
    ("table", "uses no input"),
]


@pytest.mark.parametrize(("name", "said"), BAD)
def test_ends_that_are_not_there(model: Detector, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"--cut {name}") as found:
        ended(model, name)
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_nodes_that_are_not_there() -> None:
    with pytest.raises(UsageError, match="did you mean softmax") as found:
        ended(Detector(fixed=True).eval(), "softmx")
    assert "no module and no node" in str(found.value)


def test_without_an_end_the_refusal_names_one(model: Detector) -> None:
    with pytest.raises(SourceError, match="--cut head") as found:
        ended(model)
    assert "\n" not in str(found.value)
