"""``torchvision::nms`` where torchvision is not installed: the operator that models call, with a greedy loop inside."""

from __future__ import annotations

import importlib.util

import torch

_LIBRARY = None


def nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Places of what is kept, best first; ``[N, 4]`` and ``[N]`` -> ``[kept]``."""
    _register()
    return torch.ops.torchvision.nms(boxes, scores, threshold)


def _register() -> None:
    global _LIBRARY
    if importlib.util.find_spec("torchvision") is not None:
        import torchvision  # noqa: F401  it registers its own

        return
    if _LIBRARY is not None:
        return
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.impl("nms", _greedy, "CPU")
    torch.library.register_fake("torchvision::nms", _fake, lib=_LIBRARY)


def _fake(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    return dets.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _greedy(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    left, top, right, bottom = dets.unbind(1)
    area = (right - left) * (bottom - top)
    kept: list[int] = []
    for place in scores.argsort(descending=True, stable=True).tolist():
        width = (torch.minimum(right[place], right[kept]) - torch.maximum(left[place], left[kept])).clamp(min=0)
        height = (torch.minimum(bottom[place], bottom[kept]) - torch.maximum(top[place], top[kept])).clamp(min=0)
        shared = width * height
        share = shared / (area[kept] + area[place] - shared)
        if not bool((share.double() > iou_threshold).any()):
            kept.append(place)
    return torch.tensor(kept, dtype=torch.int64)
