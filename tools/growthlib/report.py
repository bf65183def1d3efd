"""What was measured: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .model import Bound, Curve, Scale, Statement

_PIPED_WIDTH = 160  # without a terminal to ask: wide enough for the longest row


def print_report(facts: Mapping[str, str], statements: Sequence[Statement], scale: Scale) -> None:
    piped = not sys.stdout.isatty()
    console = Console(width=_PIPED_WIDTH if piped else None, highlight=False)
    style = box.MARKDOWN if piped else box.ROUNDED
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if scale.quick:
        console.print("Quick: it runs and the data is right; the figures mean little, and bounds are not judged.")
    for statement in statements:
        console.print(f"\n[bold]{statement.title}[/bold]  (tools/growth --only {statement.key})\n")
        if statement.failure is not None:
            console.print(f"NOT MEASURED: {statement.failure}", markup=False)
        if statement.measured is not None:
            for curve in statement.measured.curves:
                console.print(_curve(curve, style))
            console.print(_bounds(statement.measured.bounds, scale, style))


def _curve(curve: Curve, style: box.Box) -> Table:
    table = Table(box=style, title=f"{curve.title}: {curve.y}", title_justify="left")
    table.add_column(curve.x)
    places = sorted({x for points in curve.series.values() for x, _ in points})
    for place in places:
        table.add_column(f"{place:,.0f}", justify="right")
    for name, points in curve.series.items():
        values = dict(points)
        table.add_row(name, *(number(values[place]) if place in values else "" for place in places))
    return table


def _bounds(bounds: Sequence[Bound], scale: Scale, style: box.Box) -> Table:
    table = Table(box=style)
    for heading in ("bound", "measured", "at most, or at least", ""):
        table.add_column(heading)
    for bound in bounds:
        limit = f"{'>=' if bound.least else '<='} {number(bound.limit)} {bound.unit}"
        verdict = "" if scale.quick else "holds" if bound.holds else "MISSED"
        table.add_row(bound.what, f"{number(bound.value)} {bound.unit}", limit, verdict)
    return table


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_json(path: Path, facts: Mapping[str, str], statements: Sequence[Statement], scale: Scale) -> None:
    report = {
        "machine": dict(facts),
        "quick": scale.quick,
        "statements": [
            {
                "key": each.key,
                "title": each.title,
                "failure": each.failure,
                "curves": [asdict(curve) for curve in each.measured.curves] if each.measured else [],
                "bounds": [asdict(b) | {"holds": b.holds} for b in each.measured.bounds] if each.measured else [],
            }
            for each in statements
        ],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
