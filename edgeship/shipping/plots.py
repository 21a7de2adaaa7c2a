"""Plots of a report as SVG text: the error of each layer, and the trade-off of bytes against loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from edgeship.core.units import human_bytes

WIDTH, ROW, LEFT, RIGHT, TOP = 760, 18, 300, 90, 40
STYLE = "font-family='sans-serif' font-size='12' fill='#222'"


def layer_bars(title: str, layers: Sequence[tuple[str, float, str]]) -> str:
    """One bar a layer, in the order given.

    Args:
        layers: (name, value, what to write behind the bar); values are not negative.
    """
    longest = max((value for _, value, _ in layers), default=1.0) or 1.0
    parts = []
    for place, (name, value, text) in enumerate(layers):
        y = TOP + place * ROW
        length = (WIDTH - LEFT - RIGHT) * value / longest
        shown = name if len(name) <= 46 else f"...{name[-43:]}"
        parts.append(f"<text x='{LEFT - 6}' y='{y + 12}' text-anchor='end' {STYLE}>{escape(shown)}</text>")
        parts.append(f"<rect x='{LEFT}' y='{y + 2}' width='{length:.1f}' height='{ROW - 5}' fill='#4878a8'/>")
        parts.append(f"<text x='{LEFT + length + 5:.1f}' y='{y + 12}' {STYLE}>{escape(text)}</text>")
    return _page(title, TOP + ROW * len(layers) + 10, parts)


def trade_off_curve(title: str, points: Sequence[tuple[int, float]], chosen: tuple[int, float] | None) -> str:
    """Loss, on a logarithmic axis, over bytes; the choice is the filled dot.

    Args:
        points: (bytes, loss), smallest first.
    """
    height, bottom, left = 320, 280, 80
    sizes = [size for size, _ in points] or [1]
    losses = [math.log10(max(loss, 1e-12)) for _, loss in points] or [0.0]
    low, high = min(losses), max(losses)
    first, last = min(sizes), max(sizes)

    def at(size: int, loss: float) -> tuple[float, float]:
        x = left + (WIDTH - left - 40) * (size - first) / max(last - first, 1)
        y = TOP + (bottom - TOP) * (high - math.log10(max(loss, 1e-12))) / max(high - low, 1e-9)
        return x, y

    corners = [at(*point) for point in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    parts = [f"<polyline points='{line}' fill='none' stroke='#4878a8' stroke-width='2'/>"]
    for point in points:
        x, y = at(*point)
        mark = "#c44" if point == chosen else "white"
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='{mark}' stroke='#4878a8'/>")
    for size in (first, last):
        x, _ = at(size, 1.0)
        parts.append(f"<text x='{x:.1f}' y='{bottom + 22}' text-anchor='middle' {STYLE}>{human_bytes(size)}</text>")
    for value in (low, high):
        y = TOP + (bottom - TOP) * (high - value) / max(high - low, 1e-9)
        parts.append(f"<text x='{left - 10}' y='{y + 4:.1f}' text-anchor='end' {STYLE}>{10**value:.1e}</text>")
    return _page(title, height, parts)


def _page(title: str, height: int, parts: Sequence[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}'>"
    frame = f"<rect width='{WIDTH}' height='{height}' fill='white'/><text x='10' y='22' {STYLE}>{escape(title)}</text>"
    return "\n".join([head, frame, *parts, "</svg>"]) + "\n"
