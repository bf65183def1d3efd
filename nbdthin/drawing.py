"""A closer look, for people: the way of one byte in words, and maps as pictures, on a terminal, as text and as SVG."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from itertools import groupby

from nbdthin.control.codec import printable
from nbdthin.display import show_table
from nbdthin.pool.views import DATA, NOTHING, UNWRITTEN, Cell, Explanation, Look, Map, Owner, WritePlan
from nbdthin.units import format_size

LOOKS = 12  # layers of a long chain that are told one by one
ROWS = 16  # of a map on a terminal, at most
TEXT_WIDTH = 64  # cells in a line where there is no terminal
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OTHER = "+"  # all owners beyond the letters
SHADES = "░▒▓█"
# Okabe and Ito's, told apart by almost all eyes; readable on white and on black.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#b8a800")
OTHER_COLOUR = "#8a8a8a"

_OWNERS = ("", "OWNER", "DATA", "SHARE", "RUNS", "AVERAGE RUN")


def layer_name(name: str | None, layer: int) -> str:
    return name if name is not None else f"a layer without a name ({layer})"


# -- one byte


def show_explanation(seen: Explanation) -> None:
    for name, value in _explained(seen):
        print(f"{name}: {printable(value)}")


def _explained(seen: Explanation) -> Iterator[tuple[str, str]]:
    where = "zeroes"
    if seen.physical is not None:
        assert seen.layer is not None
        where = f"{layer_name(seen.owner, seen.layer)}, block {seen.physical:#x}"
    yield "Read", f"{seen.name} {seen.offset:#x} -> {where}"
    yield "Logical", f"block {seen.block}, subblock {seen.subblock} of 16"
    yield "State", _state(seen)
    yield "Way", _way(seen.layers)
    yield "Look-up", _LOOKUPS[seen.lookup]
    if seen.position is not None:
        yield "Physical", f"block {seen.physical}, byte {seen.position} of {seen.data_path}"
        yield "Checksum", "known" if seen.checksum else "none yet: only sealed data has one"
    yield "Write", _write(seen.write)
    if seen.write.why is None and seen.state == DATA and seen.depth and not seen.write.read:
        yield "Write of less", "the rest of the subblock is read from there first, and written with it"


_LOOKUPS = {
    "own leaf": "one, in the volume's own leaf of the mapping",
    "shared leaf": "one, in a leaf that it shares with its parent, however deep the chain is",
    "walk": "the block's subblocks lie in several layers: found by walking once, then remembered",
}


def _state(seen: Explanation) -> str:
    if seen.state == UNWRITTEN:
        return f"never written: reads as zero (layers in the chain: {seen.chain})"
    assert seen.layer is not None
    depth = f"layer {seen.depth + 1} of {seen.chain}"
    whose = layer_name(seen.owner, seen.layer)
    return f"data of {whose}, {depth}" if seen.state == DATA else f"zero, trimmed or zeroed in {whose}, {depth}"


def _way(looks: tuple[Look, ...]) -> str:
    shown = [f"{layer_name(look.name, look.layer)} has {look.says}" for look in looks]
    if len(shown) > LOOKS:
        half = LOOKS // 2
        shown[half:-half] = [f"{len(shown) - 2 * half} more have {NOTHING}"]
    return " -> ".join(shown)


def _write(plan: WritePlan) -> str:
    what = f"of {plan.length} bytes at {plan.offset}"
    if plan.why is not None:
        return f"{what} is refused, or has to wait: {plan.why}"
    parts = []
    if plan.read:
        parts.append(f"reads {plan.read} bytes of what it covers in part")
    if plan.overwritten:
        parts.append(f"overwrites in place (subblocks: {plan.overwritten})")
    if plan.filled:
        parts.append(f"goes into blocks that are there (subblocks: {plan.filled})")
    if plan.blocks:
        parts.append(f"takes new blocks ({plan.blocks}) and writes to them (subblocks: {plan.allocated})")
    return f"{what} {', '.join(parts)}"


# -- maps


def _ranked(shown: Map) -> dict[int, int]:
    """Each owner's rank by what it has, in that order: who has most is told from others best."""
    order = sorted(range(len(shown.owners)), key=lambda place: -shown.owners[place].data)
    return {place: rank for rank, place in enumerate(order)}


def _letter(rank: int) -> str:
    return LETTERS[rank] if rank < len(LETTERS) else OTHER


def _colour(rank: int) -> str:
    return COLOURS[rank] if rank < len(COLOURS) else OTHER_COLOUR


def summary(shown: Map) -> str:
    average = format_size(shown.data // shown.runs) if shown.runs else "-"
    where = f"the last ends at {format_size(shown.highest)}" if shown.highest else "nothing is there"
    return (
        f"{shown.name}: {format_size(shown.data)} of {format_size(shown.size)} hold data, {where}; "
        f"{shown.runs} runs in the data file, {average} on average"
    )


def map_cells() -> int:
    """Cells for which there is room."""
    return _width() * ROWS


def _width() -> int:
    if not sys.stdout.isatty():
        return TEXT_WIDTH
    from rich.console import Console

    return max(min(Console().width, 128), 16)


def show_map(shown: Map) -> None:
    ranks = _ranked(shown)
    print(summary(shown))
    if len(shown.cells) <= map_cells():  # else it was made for a larger place
        print(f"each character is {format_size(shown.cell)}")
        if sys.stdout.isatty():
            _draw(shown, ranks)
        else:
            cells = [_text(cell, shown, ranks) for cell in shown.cells]
            for start in range(0, len(cells), TEXT_WIDTH):
                print("".join(cells[start : start + TEXT_WIDTH]))
    rows = [_owner_cells(owner, _letter(ranks[place]), shown) for place, owner in enumerate(shown.owners)]
    show_table(_OWNERS, rows, _OWNERS[2:])


def _text(cell: Cell, shown: Map, ranks: dict[int, int]) -> str:
    """A letter an owner, a small one where less than half holds data."""
    if cell.owner is None:
        return "."
    letter = _letter(ranks[cell.owner])
    return letter if 2 * cell.data >= shown.cell else letter.lower()


def _draw(shown: Map, ranks: dict[int, int]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    width = _width()
    for start in range(0, len(shown.cells), width):
        line = Text()
        for cell in shown.cells[start : start + width]:
            if cell.owner is None:
                line.append("·", style="dim")
            else:
                shade = SHADES[min(4 * cell.data // shown.cell, 3)]
                line.append(shade, style=_colour(ranks[cell.owner]))
        console.print(line, soft_wrap=True)
    legend = Text()
    for place, rank in list(ranks.items())[: len(COLOURS)]:
        owner = shown.owners[place]
        legend.append("█ ", style=_colour(rank))
        legend.append(f"{layer_name(owner.name, owner.layer)}  ")
    if len(ranks) > len(COLOURS):
        legend.append("█ ", style=OTHER_COLOUR)
        legend.append(f"{len(ranks) - len(COLOURS)} more")
    console.print(legend, soft_wrap=True)


def _owner_cells(owner: Owner, letter: str, shown: Map) -> tuple[str, ...]:
    return (
        letter,
        layer_name(owner.name, owner.layer),
        format_size(owner.data),
        f"{100 * owner.data / shown.data:.1f} %",
        str(owner.runs),
        format_size(owner.data // owner.runs),
    )


# -- SVG

SVG_COLUMNS = 64
_CELL = 12  # pixels
_MARGIN = 16
_LINE = 20
_STYLE = """
svg { font: 13px system-ui, sans-serif; }
.paper { fill: #ffffff; } text { fill: #1a1a1a; } .quiet { fill: #5a5a5a; } .empty { fill: #e8e8e8; }
@media (prefers-color-scheme: dark) {
  .paper { fill: #16181c; } text { fill: #ececec; } .quiet { fill: #a8a8a8; } .empty { fill: #2c2f36; }
}
"""


def svg(shown: Map) -> str:
    """The picture as a document of its own, for light and dark backgrounds."""
    ranks = _ranked(shown)
    legend = list(ranks.items())
    named, others = legend[: len(COLOURS)], legend[len(COLOURS) :]
    top = _MARGIN + 3 * _LINE
    rows = -(-len(shown.cells) // SVG_COLUMNS)
    bottom = top + rows * _CELL + _LINE
    width = 2 * _MARGIN + SVG_COLUMNS * _CELL
    height = bottom + _LINE * (len(named) + bool(others)) + _MARGIN
    title = escape(f"Map of {shown.name}")
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{title}">',
        f"<title>{title}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        _line(_MARGIN, _MARGIN + _LINE // 2, summary(shown)),
        _line(
            _MARGIN,
            _MARGIN + 3 * _LINE // 2,
            f"each square is {format_size(shown.cell)}, the paler the less data",
            "quiet",
        ),
        *(line for row in range(rows) for line in _row(shown, row, ranks, top + row * _CELL)),
    ]
    for number, (place, rank) in enumerate(named):
        owner = shown.owners[place]
        what = f"{layer_name(owner.name, owner.layer)}: {format_size(owner.data)}, {owner.runs} runs"
        lines += _legend(bottom + number * _LINE, _colour(rank), what)
    if others:
        data = sum(shown.owners[place].data for place, _ in others)
        lines += _legend(bottom + len(named) * _LINE, OTHER_COLOUR, f"{len(others)} more: {format_size(data)}")
    return "\n".join([*lines, "</svg>", ""])


def _line(x: int, y: int, text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{style}>{escape(printable(text))}</text>'


def _legend(y: int, colour: str, text: str) -> list[str]:
    return [f'<rect x="{_MARGIN}" y="{y}" width="12" height="12" fill="{colour}"/>', _line(_MARGIN + 20, y + 11, text)]


def _row(shown: Map, row: int, ranks: dict[int, int], y: int) -> Iterator[str]:
    """Neighbours that look alike are one rectangle."""
    column = 0
    cells = shown.cells[row * SVG_COLUMNS : (row + 1) * SVG_COLUMNS]
    for (owner, fullness), same in groupby(cells, key=lambda cell: (cell.owner, _fullness(cell, shown.cell))):
        alike = list(same)
        place = f'x="{_MARGIN + column * _CELL}" y="{y}" width="{len(alike) * _CELL - 1}" height="{_CELL - 1}"'
        if owner is None:
            yield f'<rect class="empty" {place}/>'
        else:
            whose = layer_name(shown.owners[owner].name, shown.owners[owner].layer)
            start = (row * SVG_COLUMNS + column) * shown.cell
            data = format_size(sum(cell.data for cell in alike))
            what = escape(f"from byte {start} on: {data} of data, most of {whose}")
            fill = f'fill="{_colour(ranks[owner])}" fill-opacity="{fullness}"'
            yield f"<rect {place} {fill}><title>{what}</title></rect>"
        column += len(alike)


def _fullness(cell: Cell, size: int) -> float:
    """As an opacity, in quarters."""
    return (1 + min(4 * cell.data // size, 3)) / 4
