"""Two charts of a report, as SVG: how far nbdthin is ahead in each row, and what each server makes of each work.

They bring their own background, and a dark one where the reader's page is dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from nbdthin.units import format_size

from .report import Result, best_of, standing_title, title, who
from .rounds import Plan
from .standings import Cell, Standing, peers_of, standings
from .works import Work

_STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.head { font-size: 15px; font-weight: 600 }
.small { font-size: 11px; fill: #59636e }
.right { text-anchor: end }
.ground { fill: #ffffff }
.line { stroke: #d1d9e0 }
.one { stroke: #59636e; stroke-width: 1.5 }
.bar { stroke: #1f2328; stroke-width: 2 }
.ours { fill: #1a7f37 }
.behind { fill: #bc4c00 }
.other { fill: #8c959f }
.sure { fill: #1f2328 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .small { fill: #9198a1 }
  .ground { fill: #0d1117 }
  .line { stroke: #3d444d }
  .one { stroke: #9198a1 }
  .bar { stroke: #f0f6fc }
  .ours { fill: #3fb950 }
  .behind { fill: #f0883e }
  .other { fill: #656c76 }
  .sure { fill: #f0f6fc }
}"""
_WIDTH = 900
_MARGIN = 20
_HEAD = 64  # height of a chart's heading
_ROW = 22
_BAR = 14

# The first chart, whose scale is logarithmic: half as fast is as far from the line of 1 as twice as fast.
_NAMES = 385  # width of the rows' names
_LEAST, _MOST = 1 / 8, 16  # ratios at its ends; what is beyond them ends there, and says how much it is

# The second, in columns of panels.
_COLUMNS = 2
_PEERS = 2  # at least, in a panel
_SERVER = 130  # width of a server's name
_FIGURE = 70  # of its rate


def write(directory: Path, result: Result) -> None:
    """`bench-ratios.svg` and `bench-rates.svg`; what was not measured is not in them."""
    directory.mkdir(parents=True, exist_ok=True)
    if found := standings(result.cells):
        (directory / "bench-ratios.svg").write_text(_ratios(found, result.plan))
    works = [work for work in dict.fromkeys(cell.work for cell in result.cells) if _panel_cells(work, result.cells)]
    if works:
        (directory / "bench-rates.svg").write_text(_rates(works, result))


def _svg(height: int, heading: str, below: str, parts: Iterator[str]) -> str:
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    ground = f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="6"/>'
    words = [_text(_MARGIN, 28, heading, "head"), _text(_MARGIN, 47, below, "small")]
    return "\n".join([head, f"<style>{_STYLE}</style>", ground, *words, *parts, "</svg>", ""])


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def _line(x: float, top: float, bottom: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'


def _rect(x: float, y: float, width: float, kind: str, height: float = _BAR) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height}" rx="2"/>'


def _how(plan: Plan) -> str:
    return f"{plan.rounds} to {plan.most} rounds of {plan.seconds:g} s in turn, images of {format_size(plan.size)}"


def _ratios(found: Sequence[Standing], plan: Plan) -> str:
    height = _HEAD + _ROW * (len(found) + 1) + _MARGIN
    below = f"Rate over the best peer's, and where it surely lies; the mark is the least it shall be; {_how(plan)}."
    return _svg(height, "nbdthin and the best peer of each work", below, _ratio_parts(found, plan))


def _ratio_parts(found: Sequence[Standing], plan: Plan) -> Iterator[str]:
    bottom = _HEAD + _ROW * len(found)
    for power in range(round(math.log2(_LEAST)), round(math.log2(_MOST)) + 1):
        ratio = 2.0**power
        yield _line(_place(ratio), _HEAD, bottom, "one" if ratio == 1 else "line")
        yield _text(_place(ratio) - 8, bottom + 16, f"{ratio:g}" if ratio >= 1 else f"1/{1 / ratio:g}", "small")
    for number, each in enumerate(found):
        top = _HEAD + _ROW * number + (_ROW - _BAR) / 2
        base, end = sorted((_place(1), _place(each.ratio.median)))
        low, high = _place(each.ratio.low), _place(each.ratio.high)
        yield _text(_MARGIN + _NAMES - 10, top + 11, standing_title(each, plan), "right")
        yield _rect(base, top, end - base, "ours" if each.is_held else "behind")
        yield _rect(low, top + _BAR / 2 - 1, high - low, "sure", height=2)
        yield _line(_place(each.bar.least), top - 3, top + _BAR + 3, "bar")
        beside = max(end, high, _place(each.bar.least)) + 6
        yield _text(beside, top + 11, f"{each.ratio.median:.2f}, {best_of(each)}", "small")


def _place(ratio: float) -> float:
    """Across. Words stand right of the bars, so the scale ends before the picture does."""
    left, right = _MARGIN + _NAMES, _WIDTH - _MARGIN - 160
    share = math.log(min(max(ratio, _LEAST), _MOST) / _LEAST) / math.log(_MOST / _LEAST)
    return left + share * (right - left)


def _panel_cells(work: Work, cells: Sequence[Cell]) -> list[Cell]:
    """nbdthin first, then its peers, best first. Of several images the one with a bar, or the first.

    None where there is but one peer: the other chart says all.
    """
    ours = [cell for cell in cells if cell.work is work and cell.is_ours and cell.samples]
    barred = [cell for cell in ours if any(bar.state is cell.state and bar.own is None for bar in work.bars)]
    chosen = (barred or ours)[:1]
    peers = peers_of(chosen[0], cells) if chosen else []
    return [*chosen, *peers] if len(peers) >= _PEERS else []


def _rates(works: Sequence[Work], result: Result) -> str:
    panels = [(work, _panel_cells(work, result.cells)) for work in works]
    parts: list[str] = []
    height = _HEAD
    for first in range(0, len(panels), _COLUMNS):
        row = panels[first : first + _COLUMNS]
        for column, (work, cells) in enumerate(row):
            parts += _panel(_MARGIN + column * _panel_width(), height, title(work, result.plan), cells)
        height += _ROW * (max(len(cells) for _, cells in row) + 1) + 14
    below = f"Each panel has its own scale, from 0; {_how(result.plan)}."
    return _svg(height, "What each server makes of each work, per second", below, iter(parts))


def _panel_width() -> float:
    return (_WIDTH - 2 * _MARGIN) / _COLUMNS


def _panel(left: float, top: float, words: str, cells: Sequence[Cell]) -> Iterator[str]:
    yield _text(left, top + 14, words)
    room = _panel_width() - _SERVER - _FIGURE
    most = max(cell.rate for cell in cells)
    for number, cell in enumerate(cells):
        y = top + _ROW * (number + 1)
        yield _text(left + _SERVER - 8, y + 11, who(cell), "small right")
        yield _rect(left + _SERVER, y, room * cell.rate / most, "ours" if cell.is_ours else "other")
        yield _text(left + _SERVER + room * cell.rate / most + 5, y + 11, f"{cell.rate:,.0f}", "small")
