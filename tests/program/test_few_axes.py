"""Tensors of many axes: every rule against torch's own operator, and no operator that sees more than five axes."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgeship.program.few_axes import MOST_AXES, _rules, permuted, permutes
from edgeship.program.normalize import export_normalised

aten = torch.ops.aten
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.clone.default}
SIZES = st.lists(st.integers(1, 3), min_size=5, max_size=8)


class Watched(TorchDispatchMode):
    """Fails where an operator that is more than a reshape sees a tensor of too many axes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        tensors = [item for item in (*args, found) if isinstance(item, torch.Tensor)]
        if function not in VIEWS:
            assert all(item.dim() <= MOST_AXES for item in tensors), function
        return found


def check(target: Any, *args: Any, **kwargs: Any) -> None:
    """The rule of an operator answers as the operator does, on few axes."""
    wanted = target(*args, **kwargs)
    with Watched():
        found = _rules({target})[target](*args, **kwargs)
    if found is NotImplemented:
        tensors = [item for item in torch.utils._pytree.tree_leaves(args) if isinstance(item, torch.Tensor)]
        assert all(item.dim() <= MOST_AXES for item in tensors)
        return
    found, wanted = (list(item) if isinstance(item, (tuple, list)) else [item] for item in (found, wanted))
    torch.testing.assert_close(found, wanted)


@given(st.data(), st.integers(2, 8), st.integers(3, 5))
@settings(max_examples=25, deadline=None)
def test_permutes(data: st.DataObject, rank: int, most: int) -> None:
    goal = data.draw(st.permutations(range(rank)))
    axes = list(range(rank))
    for blocks, order in permutes(axes, goal, most):
        assert len(blocks) <= most
        assert [axis for block in blocks for axis in block] == axes
        axes = [axis for number in order for axis in blocks[number]]
    assert axes == goal
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    x = torch.arange(math.prod(sizes)).reshape(sizes)
    assert torch.equal(permuted(x, goal, most), x.permute(goal))


@given(st.data(), SIZES)
@settings(max_examples=12, deadline=None)
def test_rules(data: st.DataObject, sizes: list[int]) -> None:
    x = torch.rand(sizes)
    axis, other = data.draw(st.integers(-len(sizes), len(sizes) - 1)), data.draw(st.integers(0, len(sizes) - 1))
    check(aten.permute.default, x, data.draw(st.permutations(range(len(sizes)))))
    check(aten.transpose.int, x, axis, other)
    # What broadcasts: each axis whole or repeated, in any number of axes.
    part = [data.draw(st.sampled_from((1, size))) for size in sizes]
    check(aten.add.Tensor, x, torch.rand(part[data.draw(st.integers(0, 3)) :]))
    check(aten.where.self, torch.rand(part) > 0.5, x, torch.rand(sizes[-1:]))
    check(aten.expand.default, torch.rand(part[1:]), [2, *sizes[1:]])
    check(aten.repeat.default, x, [data.draw(st.integers(1, 2)) for _ in sizes])
    for target in (aten.softmax.int, aten.cumsum.default, aten.unbind.int, aten.argmax.default, aten.max.dim):
        check(target, x, axis)
    check(aten.slice.Tensor, x, axis, 1)
    check(aten.flip.default, x, [axis])
    check(aten.roll.default, x, [1], [axis])
    check(aten.cat.default, [x, x, x], axis)
    check(aten.stack.default, [x, x], axis)
    check(aten.unsqueeze.default, x, axis)
    check(aten.squeeze.dim, x, axis)
    check(aten.index.Tensor, x, [*[None] * other, torch.tensor([0, sizes[other] - 1, 0])])
    check(aten.linear.default, x, torch.rand(4, sizes[-1]))
    check(aten.layer_norm.default, x, sizes[-2:])
    check(aten.matmul.default, x, torch.rand(*part[1:-2], sizes[-1], 4))
    check(aten.matmul.default, torch.rand(sizes[-1]), x.transpose(-1, -2))
    check(aten.matmul.default, x, torch.rand(sizes[-1]))


@given(st.data(), SIZES, st.booleans())
@settings(max_examples=12, deadline=None)
def test_sums(data: st.DataObject, sizes: list[int], keep: bool) -> None:
    x = torch.rand(sizes)
    first, count = data.draw(st.integers(0, len(sizes) - 1)), data.draw(st.integers(1, 3))
    axes = list(range(first, min(first + count, len(sizes))))
    check(aten.mean.dim, x, axes, keep)
    check(aten.amax.default, x, axes, keep)
    check(aten.sum.dim_IntList, x, None, keep)


class Many(nn.Module):
    """Windows in three axes of space, a flow raised as RAFT does, and products with many axes in front."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``x`` [1, 4, 6, 4, 5], ``y`` [1, 144, 3, 3]."""
        windows = x.reshape(1, 2, 2, 3, 2, 2, 2, 5).permute(0, 1, 3, 5, 2, 4, 6, 7)
        scores = windows @ windows.transpose(-1, -2)
        summed = windows @ x[0, 0, 0, 0]
        flow = y.reshape(1, 1, 9, 4, 4, 3, 3).softmax(2) * y[:, :18].reshape(1, 2, 9, 1, 1, 3, 3)
        raised = flow.sum(2).permute(0, 1, 4, 2, 5, 3).reshape(1, 2, 12, 12)
        return windows.reshape(-1, 8, 5), (scores / 3).reshape(-1, 2, 2), summed.flatten(1), raised


def test_normal_form_has_few_axes() -> None:
    inputs = (torch.rand(1, 4, 6, 4, 5), torch.rand(1, 144, 3, 3))
    program = export_normalised(Many(), inputs, ("x", "y"))
    made = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert max(value.dim() for value in made) <= MOST_AXES
    for found, wanted in zip(program.module()(*inputs), Many()(*inputs), strict=True):
        torch.testing.assert_close(found, wanted)


def test_few_axes_are_left_alone() -> None:
    x = torch.rand(2, 3, 1, 2, 2)
    rules = _rules({aten.mul.Tensor})
    for target, args in ((aten.mul.Tensor, (x, x)), (aten.permute.default, (x, [4, 3, 2, 1, 0]))):
        assert rules[target](*args) is NotImplemented


def test_windows_of_video_take_two_permutes() -> None:
    steps = permutes(range(8), [0, 1, 3, 5, 2, 4, 6, 7], MOST_AXES)
    assert len(steps) <= 2
    assert all(len(blocks) <= MOST_AXES for blocks, _ in steps)
