"""Modules whose forward chooses rows by values: their programs have fixed sizes and answer as the modules do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.errors import OpenSizeError, SourceError, UsageError
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vision_operators import nms, roi_align

Tensor = torch.Tensor
QUICK = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


class Does(nn.Module):
    """A module that does what a function does."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        """Tensors as the function takes them."""
        return self.function(*tensors)


def program_of(function: Callable[..., Any], *examples: Tensor, **options: Any) -> TorchProgram:
    """A function as a program."""
    names = {torch.float32: "f32", torch.int64: "i64"}
    specs = [
        TensorSpec(f"in_{place}", names[value.dtype], tuple(value.shape))  # type: ignore[arg-type]
        for place, value in enumerate(examples)
    ]
    return make_program(Does(function), specs, examples, **options)


def assert_answers(program: TorchProgram, function: Callable[..., Any], *given_tensors: Tensor) -> None:
    """The rows that count are the function's, and the others hold zeros."""
    from edgeship.compat.torch import leaves_of

    with torch.no_grad():
        found = program.exported.module()(*given_tensors)
    names = [spec.name for spec in program.signature.outputs]
    by_name = dict(zip(names, found, strict=True))
    for name, want in zip(names, leaves_of(function(*given_tensors)), strict=False):
        have = by_name[name]
        if not want.dim():
            torch.testing.assert_close(have, want)
            continue
        count = by_name.get("count", by_name.get(f"{name}_count"))
        rows = int(count[0]) if count is not None and have.shape != want.shape else len(have)
        assert have[:rows].shape == want.shape
        torch.testing.assert_close(have[:rows], want)
        assert not have[rows:].any()


def detect(boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """What detectors do behind their heads."""
    best, kind = scores.max(1)
    sure = best > 0.3
    boxes, best, kind = boxes[sure], best[sure], kind[sure]
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:].clamp(min=0)], 1)
    kept = nms(boxes + kind[:, None].to(boxes.dtype) * 1000, best, 0.4)[:10]
    return {"boxes": boxes[kept], "scores": best[kept], "labels": kind[kept]}


def made_up(seed: int, count: int, classes: int) -> tuple[Tensor, Tensor]:
    """Boxes ``[count, 4]`` and scores ``[count, classes]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 4, generator=generator) * 20, torch.rand(count, classes, generator=generator)


def test_a_detector() -> None:
    program = program_of(detect, *made_up(0, 40, 3))
    assert [spec.name for spec in program.signature.outputs] == ["boxes", "scores", "labels", "count"]
    assert [spec.shape for spec in program.signature.outputs] == [(10, 4), (10,), (10,), (1,)]
    assert any("of 10 rows count count" in line for line in program.record.history)
    for seed in range(1, 20):
        boxes, scores = made_up(seed, 40, 3)
        # From nothing at all to more than ten boxes.
        assert_answers(program, detect, boxes * (1 + seed % 5), scores * min(seed / 8, 1))


CHAINS: dict[str, Callable[..., Any]] = {
    "mask": lambda x: x[x[:, 0] > 0],
    "mask of two axes": lambda x: x[x > 0.5],
    "mask twice": lambda x: x[x[:, 0] > 0][x[x[:, 0] > 0][:, 1] > 0],
    "places": lambda x: x[torch.where(x[:, 1] > 0)[0]],
    "places of two axes": lambda x: torch.stack(torch.where(x > 0), 1),
    "nonzero": lambda x: (x[:, 2] > 0).nonzero(),
    "pairs": lambda x: x[torch.where(x > 0.3)],
    "best of some": lambda x: x[x[:, 0] > -1][:, 0].topk(3).values,
    "best rows of some": lambda x: x[x[:, 0] > -1][x[x[:, 0] > -1][:, 0].topk(3).indices],
    "order of some": lambda x: x[x[:, 0] > 0][x[x[:, 0] > 0][:, 1].argsort(descending=True)],
    "largest of some": lambda x: (x[x[:, 0] > 0].sum(0), x[x[:, 0] > -9][:, 1].max()),
    "mean of some": lambda x: (x[x[:, 0] > -1].mean(0), x[x[:, 0] > -1].mean(), x[x[:, 0] > -1].mean(1)),
    "largest of some and its place": lambda x: (x[x[:, 0] > -1].max(0), x[x[:, 0] > -1].min(0)[0]),
    "place of the largest of some": lambda x: (lambda y: y[y[:, 1].argmax()])(x[x[:, 0] > -1]),
    "first of some": lambda x: x[x[:, 0] > 0][:2] * 2 + 1,
    "columns of some": lambda x: (lambda y: torch.cat([y[:, :2].exp(), y[:, 2:]], 1))(x[x[:, 0] > 0]),
    "rows of two choices": lambda x: torch.cat([x[x[:, 0] > 0], x[x[:, 1] > 0] - 1]),
    "joined axes": lambda x: x[x[:, 0] > 0].reshape(-1),
    "new axes": lambda x: x[x[:, 0] > 0][:, None].squeeze(1)[..., 1:],
    "filled up to a size that is asked for": lambda x: torch.nn.functional.pad(
        x[x[:, 0] > 0].reshape(-1), (0, (12 - x[x[:, 0] > 0].shape[0]) * 4)
    ).reshape(12, 4),
    "filled up": lambda x: torch.nn.functional.pad(x[x[:, 0] > 0], (0, 0, 0, len(x) - x[x[:, 0] > 0].shape[0])),
    "layer": lambda x: torch.nn.functional.linear(x[x[:, 0] > 0], torch.eye(x.shape[1]) * 2).relu(),
    "classes": lambda x: x[x[:, 0] > 0].softmax(1).argmax(1),
    "two counts": lambda x: (x[x[:, 0] > 0], x[x[:, 1] > 0]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_choices(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    function = CHAINS[name]
    program = program_of(function, torch.randn(9, 4, generator=generator))
    for _ in range(8):
        assert_answers(program, function, torch.randn(9, 4, generator=generator))
    if name in ("mask", "places", "joined axes"):
        assert_answers(program, function, torch.full((9, 4), -1.0))


def test_an_assignment_to_rows() -> None:
    def function(x: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        place = torch.where(x[:, 0] > 0)[0]
        made[place] = x[place] * 3
        made[x[:, 1] > 1] = -1.0
        return made

    generator = torch.Generator().manual_seed(1)
    program = program_of(function, torch.randn(9, 4, generator=generator))
    assert len(program.signature.outputs) == 1
    for _ in range(8):
        assert_answers(program, function, torch.randn(9, 4, generator=generator))


@pytest.mark.heavy
@QUICK
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 3))
def test_detectors_of_many_sizes(seed: int, count: int, classes: int) -> None:
    program = program_of(detect, *made_up(seed, count, classes))
    for other in range(4):
        assert_answers(program, detect, *made_up(seed + 7 * other + 1, count, classes))


@pytest.mark.parametrize(("aligned", "ratio", "size"), [(False, 2, 3), (True, 1, 2), (True, 3, 1)])
def test_regions(aligned: bool, ratio: int, size: int) -> None:
    """Regions inside and far outside of the map, of no size and with their corners the wrong way round."""

    def function(x: Tensor, rois: Tensor) -> Tensor:
        """[2, 3, 8, 10] and [R, 5]."""
        return roi_align(x, rois, size, 0.5, ratio, aligned)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 10, generator=generator)
    rois = torch.rand(9, 5, generator=generator) * 30 - 5
    rois[:, 0] = torch.arange(9) % 2
    rois[3, 3:] = rois[3, 1:3]
    program = program_of(function, x, rois)
    assert_answers(program, function, x, rois)
    assert not any("torchvision" in str(node.target) for node in program.exported.graph.nodes)


def test_regions_that_values_chose() -> None:
    """As a second stage has them: what a suppression kept, sampled, through a layer, and chosen from again."""

    def function(x: Tensor, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """[1, 3, 8, 10], [12, 4] and [12]."""
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        boxes = boxes[nms(boxes, scores, 0.5)[:8]]
        rois = torch.cat([torch.full_like(boxes[:, :1], 0), boxes], 1)
        parts = roi_align(x, rois, 2, 1.0, 2, False)
        best, kind = torch.nn.functional.linear(parts.flatten(1), torch.linspace(-1, 1, 48).reshape(4, 12)).max(1)
        sure = torch.where(best > 0.1)[0]
        return {"boxes": boxes[sure], "kind": kind[sure], "best": best[sure]}

    generator = torch.Generator().manual_seed(0)

    def some() -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of the function."""
        x = torch.randn(1, 3, 8, 10, generator=generator)
        return x, torch.rand(12, 4, generator=generator) * 6, torch.rand(12, generator=generator)

    program = program_of(function, *some())
    for _ in range(4):
        assert_answers(program, function, *some())


def test_regions_with_as_many_samples_as_they_are_large() -> None:
    with pytest.raises(SourceError, match="sampling_ratio"):
        program_of(lambda x, rois: roi_align(x, rois, 2, 1.0, -1, False), torch.randn(1, 3, 8, 8), torch.zeros(2, 5))


def test_two_counts_have_two_names() -> None:
    program = program_of(CHAINS["two counts"], torch.randn(9, 4))
    assert [spec.name for spec in program.signature.outputs] == ["output", "output_1", "output_count", "output_1_count"]


def test_names_may_be_given_for_counts_too() -> None:
    program = program_of(CHAINS["mask"], torch.randn(9, 4), output_names=["rows", "number"])
    assert [spec.name for spec in program.signature.outputs] == ["rows", "number"]
    with pytest.raises(UsageError, match="3 output names"):
        program_of(CHAINS["mask"], torch.randn(9, 4), output_names=["a", "b", "c"])


def test_too_few_candidates_keep_the_best() -> None:
    boxes, scores = made_up(3, 60, 2)
    program = program_of(detect, boxes * 30, scores, candidates=6)
    assert any("best 6 of 60 boxes" in line for line in program.record.history)
    with torch.no_grad():
        found = dict(
            zip(["boxes", "scores", "labels", "count"], program.exported.module()(boxes * 30, scores), strict=True)
        )
    count = int(found["count"][0])
    assert 0 < count <= 6
    torch.testing.assert_close(found["scores"][:count], detect(boxes * 30, scores)["scores"][:count])


REFUSED: dict[str, Callable[..., Any]] = {
    "unique": lambda x: x[x[:, 0] > 0].unique(),
    "spread": lambda x: x[x[:, 0] > 0].std(0),
    "place among all elements": lambda x: x[x[:, 0] > -9].argmax(),
    "rows apart": lambda x: x[x[:, 0] > -9] + x[x[:, 1] > -9],
    "branch": lambda x: x * 2 if x.sum() > 0 else x,
    "one row": lambda x: x[x[:, 0] > -9][0],
    "from the end": lambda x: x[x[:, 0] > -9][-2:],
    "count of rows": lambda x: x.sum() / int((x > 0).sum()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_fixed(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            """[9, 4]."""
            return REFUSED[name](self.head(x))

    with pytest.raises(OpenSizeError, match="--cut head") as found:
        make_program(Model(), [TensorSpec("x", "f32", (9, 4))], [torch.randn(9, 4)])
    assert "\n" not in str(found.value)


def test_a_count_that_is_not_the_modules_is_refused() -> None:
    """The rows are asked for their number, which only a run tells: all of them are not as many."""
    with pytest.raises(SourceError):
        program_of(lambda x: x[x[:, 0] > 0] / x[x[:, 0] > 0].shape[0], torch.randn(9, 4))
