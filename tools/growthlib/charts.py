"""A curve as SVG: lines over a logarithmic x, both axes with their units, readable on light and on dark pages."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from .model import Curve
from .report import number

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 200, 40, 48  # margins; the right one has the names of the lines
_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d")
_TICKS = 4


def write(directory: Path, curve: Curve) -> Path:
    path = directory / f"growth-{curve.key}.svg"
    path.write_text(draw(curve))
    return path


def draw(curve: Curve) -> str:
    points = [point for series in curve.series.values() for point in series]
    lowest, highest = (edge(x for x, _ in points) for edge in (min, max))
    top = _round_up(max(y for _, y in points))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def across(x: float) -> float:
        span = math.log10(highest / lowest) or 1.0
        return _LEFT + width * math.log10(x / lowest) / span

    def down(y: float) -> float:
        return _TOP + height * (1 - y / top)

    parts = [_text(_LEFT, 20, curve.title, size=15), _text(_LEFT, _TOP - 6, curve.y, size=11)]
    for tick in range(_TICKS + 1):
        y = top * tick / _TICKS
        parts.append(_line(_LEFT, down(y), _WIDTH - _RIGHT, down(y)))
        parts.append(_text(_LEFT - 6, down(y) + 4, number(y), anchor="end", size=11))
    for x in sorted({x for x, _ in points}):
        parts.append(_text(across(x), _HEIGHT - _BOTTOM + 18, f"{x:,.0f}", anchor="middle", size=11))
    parts.append(_text(_LEFT + width / 2, _HEIGHT - 10, curve.x, anchor="middle", size=11))
    labels = _apart({name: down(series[-1][1]) for name, series in curve.series.items()})
    for (name, series), colour in zip(curve.series.items(), _COLOURS * len(curve.series), strict=False):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in series)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>' for x, y in series]
        parts.append(_text(_WIDTH - _RIGHT + 10, labels[name] + 4, name, size=11, colour=colour))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f"<title>{escape(curve.title)}</title>", *parts, "</svg>", ""])


def _round_up(value: float) -> float:
    """1, 2 or 5 times a power of ten, or more of it than `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)


def _apart(places: dict[str, float], least: float = 14.0) -> dict[str, float]:
    """Where labels go that would otherwise lie on each other."""
    result: dict[str, float] = {}
    free = _TOP - least
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        free = result[name] = max(place, free + least)
    return result


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#8884" stroke-width="1"/>'


def _text(x: float, y: float, text: str, *, size: int, anchor: str = "start", colour: str = "#888") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{escape(text)}</text>'
