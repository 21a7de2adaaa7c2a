"""Where the windows of convolutions and pools lie: kernel, stride, dilation, padding on either side."""

from __future__ import annotations

from dataclasses import dataclass

from edgeship.frontends.onnx.call import OpCall


@dataclass(frozen=True)
class Windows:
    """One entry for each spatial axis; ``ends`` holds what ``ceil_mode`` adds at the far side as well."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    outputs: tuple[int, ...]
    declared_ends: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        """Whether both sides are padded alike, so that torch's own padding says it."""
        return self.begins == self.ends


def windows(call: OpCall, spatial: tuple[int, ...], kernel: tuple[int, ...], *, ceil: bool = False) -> Windows:
    """Settle ``auto_pad``, ``pads`` and ``ceil_mode`` for an input of ``spatial`` shape."""
    rank = len(spatial)
    strides = tuple(call.attr_ints("strides", (1,) * rank))
    dilations = tuple(call.attr_ints("dilations", (1,) * rank))
    pads = call.attr_ints("pads", (0,) * (2 * rank))
    auto = call.attr_text("auto_pad", "NOTSET")
    sizes_agree = len(strides) == len(dilations) == len(kernel) == rank and len(pads) == 2 * rank
    if not sizes_agree or min((*strides, *dilations, *kernel), default=1) < 1:
        raise call.broken(f"kernel {list(kernel)}, strides, dilations or pads do not fit {rank} spatial axes")
    begins, ends, declared, outputs = [], [], [], []
    for axis in range(rank):
        size, stride = spatial[axis], strides[axis]
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            count = -(-size // stride)
            total = max((count - 1) * stride + reach - size, 0)
            small, large = total // 2, total - total // 2
            begin, end = (small, large) if auto == "SAME_UPPER" else (large, small)
        else:
            begin, end = (0, 0) if auto == "VALID" else (pads[axis], pads[axis + rank])
            room = size + begin + end - reach
            if room < 0 or begin < 0 or end < 0:
                raise call.broken(f"a window of {reach} does not fit into {size} elements and their padding")
            count = (-(-room // stride) if ceil else room // stride) + 1
            if ceil and (count - 1) * stride >= size + begin:
                # A window that would start in the padding behind the data does not count.
                count -= 1
        begins.append(begin)
        declared.append(end)
        # Where ceil_mode moves the last window, the padding that it reads is spelled out.
        plain = (size + begin + end - reach) // stride + 1 == count
        ends.append(end if plain else (count - 1) * stride + reach - size - begin)
        outputs.append(count)
    return Windows(kernel, strides, dilations, tuple(begins), tuple(ends), tuple(outputs), tuple(declared))


def pads_list(begins: tuple[int, ...], ends: tuple[int, ...]) -> list[int]:
    """Padding in the order of ``F.pad``: last axis first, both sides together."""
    return [width for pair in reversed(list(zip(begins, ends, strict=True))) for width in pair]
