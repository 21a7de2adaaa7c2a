"""torchvision's operators where it is not installed, written as their papers have them, for models that call them."""

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
    _LIBRARY.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    _LIBRARY.impl("roi_align", _align, "CPU")
    torch.library.register_fake("torchvision::roi_align", _fake_align, lib=_LIBRARY)


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


def roi_align(x: torch.Tensor, rois: torch.Tensor, size: int, scale: float, ratio: int, aligned: bool) -> torch.Tensor:
    """``torch.ops.torchvision.roi_align``; ``[N, C, H, W]`` and ``[R, 5]`` -> ``[R, C, size, size]``."""
    _register()
    return torch.ops.torchvision.roi_align(x, rois, scale, size, size, ratio, aligned)


def _fake_align(x, rois, scale, rows, columns, ratio, aligned):  # type: ignore[no-untyped-def]
    return x.new_empty((rois.shape[0], x.shape[1], rows, columns))


def _align(x, rois, scale, rows, columns, ratio, aligned):  # type: ignore[no-untyped-def]
    """Sample by sample, as the paper has it."""
    made = torch.zeros(rois.shape[0], x.shape[1], rows, columns)
    for region, (image, *corners) in enumerate(rois.tolist()):
        left, top, right, bottom = (corner * scale - (0.5 if aligned else 0.0) for corner in corners)
        high, wide = bottom - top, right - left
        if not aligned:
            high, wide = max(high, 1.0), max(wide, 1.0)
        for row in range(rows):
            for column in range(columns):
                total = torch.zeros(x.shape[1])
                for a in range(ratio):
                    for b in range(ratio):
                        y = top + (row + (a + 0.5) / ratio) * high / rows
                        z = left + (column + (b + 0.5) / ratio) * wide / columns
                        total += _sample(x[int(image)], y, z)
                made[region, :, row, column] = total / ratio**2
    return made


def _sample(picture: torch.Tensor, y: float, z: float) -> torch.Tensor:
    """[C, H, W] -> [C]."""
    height, width = picture.shape[1:]
    if y < -1 or y > height or z < -1 or z > width:
        return torch.zeros(picture.shape[0])
    y, z = min(max(y, 0.0), height - 1), min(max(z, 0.0), width - 1)
    found = torch.zeros(picture.shape[0])
    for row in (int(y), int(y) + 1):
        for column in (int(z), int(z) + 1):
            part = (1 - abs(y - row)) * (1 - abs(z - column))
            if part > 0:
                found += part * picture[:, row, column]
    return found
