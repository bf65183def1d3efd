"""What was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from nbdthin.units import format_size

from .ours import Nbdthin
from .rounds import Cell, Plan, Verdict
from .servers import State
from .trials import Trial

_PIPED_WIDTH = 160  # without a terminal to ask: wide enough for the longest row


def best_peer(cell: Cell, all_cells: Sequence[Cell]) -> float | None:
    """The highest rate of the others than nbdthin at the same work on an image in the same state."""
    rates = [
        other.rate
        for other in all_cells
        if other.samples and other.work is cell.work and other.state is cell.state and other.server.name != Nbdthin.name
    ]
    return max(rates, default=None)


@dataclass(frozen=True, slots=True)
class Result:
    facts: Mapping[str, str]
    plan: Plan
    cells: Sequence[Cell]
    verdicts: Sequence[Verdict]
    trials: Sequence[Trial]

    @property
    def sound(self) -> bool:
        """Every cell that can be measured was, and all data was right."""
        failed = any(cell.failure for cell in self.cells) or any(trial.failure for trial in self.trials)
        return not failed and not any(verdict.wrong for verdict in self.verdicts)


def print_report(result: Result) -> None:
    plan = result.plan
    piped = not sys.stdout.isatty()
    console = Console(width=_PIPED_WIDTH if piped else None, highlight=False)
    console.print(
        f"Warm page cache, unix socket, one connection, images of {format_size(plan.size)}; "
        f"medians of {plan.rounds} in turn, {plan.seconds:g} s each. Compare ratios, not machines."
    )
    console.print(", ".join(f"{name} {value}" for name, value in result.facts.items()))
    console.print()
    style = box.MARKDOWN if piped else box.ROUNDED
    if result.cells:
        console.print(_table(result.cells, style))
        _print_verdicts(console, result.verdicts)
    if result.trials:
        console.print(_trials(result, style))


def _table(measured: Sequence[Cell], style: box.Box) -> Table:
    table = Table(box=style)
    table.add_column("work and server", no_wrap=True)
    for heading in ("requests/s", "lowest-highest", "/ best peer", "CPU us/request", "p99 us", "fio busy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note")
    for work in dict.fromkeys(cell.work for cell in measured):
        table.add_section()
        table.add_row(work.title, style="bold")
        for cell in measured:
            if cell.work is work:
                table.add_row(f"  {_who(cell)}", *_figures(cell, measured), _note(cell, measured))
    return table


def _who(cell: Cell) -> str:
    several = len(cell.work.states) > 1 and cell.reason is None
    return f"{cell.server.name}, {cell.state.value}" if several else cell.server.name


def _figures(cell: Cell, measured: Sequence[Cell]) -> list[str]:
    if not cell.samples:
        return ["-"] * 6
    rates = [sample.rate for sample in cell.samples]
    best = best_peer(cell, measured)
    return [
        f"{cell.rate:,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        "-" if best is None else f"{cell.rate / best:.2f}",
        f"{cpu_per_request(cell):.1f}",
        f"{1e6 * cell.median(lambda sample: sample.p99):,.0f}",
        f"{100 * cell.median(lambda sample: sample.busy):.0f} %",
    ]


def cpu_per_request(cell: Cell) -> float:
    """Microseconds. Of all rounds together: the kernel tells CPU time in steps of 10 ms."""
    return 1e6 * sum(sample.cpu for sample in cell.samples) / sum(sample.requests for sample in cell.samples)


def _note(cell: Cell, measured: Sequence[Cell]) -> str:
    if cell.failure or cell.reason:
        return cell.failure or cell.reason or ""
    if (gain := ratio_to_one_writer(cell, measured)) is not None:
        return f"{gain:.1f} times one writer"
    if cell.state is not State.CHAIN_100:
        return ""
    short = [c for c in measured if c.server is cell.server and c.work is cell.work and c.state is State.CHAIN_1]
    return f"{cell.rate / short[0].rate:.2f} of its chain of 1" if short and short[0].samples else ""


def _trials(result: Result, style: box.Box) -> Table:
    table = Table(box=style)
    for heading in (f"nbdthin, {result.plan.mapped:,} mapped blocks", "figures", "limit"):
        table.add_column(heading)
    for trial in result.trials:
        figures = ", ".join(f"{name} {_number(value)}" for name, value in trial.figures.items())
        limits = ", ".join(f"{name} < {_number(value)}" for name, value in trial.limits.items())
        missed = trial.missed(result.plan)
        table.add_row(trial.title, trial.failure or figures, f"MISSED: {', '.join(missed)}" if missed else limits)
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio_to_one_writer(cell: Cell, measured: Sequence[Cell]) -> float | None:
    """Of a work of many writers, where the same server was measured with one."""
    one = [c for c in measured if c.server is cell.server and c.work.key == cell.work.one and c.samples]
    return cell.rate / one[0].rate if one and cell.samples else None


def _print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    wrong = [verdict for verdict in verdicts if verdict.wrong is not None]
    console.print()
    if not wrong:
        console.print(
            f"Data verified: {len(verdicts)} checks over {len({v.server for v in verdicts})} servers, all right."
        )
    for verdict in wrong:
        console.print(f"NOT VERIFIED: {verdict.server}, {verdict.state}, {verdict.checked}: {verdict.wrong}")


def write_json(path: Path, result: Result) -> None:
    servers = {cell.server.name: cell.server for cell in result.cells}
    report = {
        "machine": dict(result.facts),
        "cache": "warm",
        "size": result.plan.size,
        "seconds": result.plan.seconds,
        "rounds": result.plan.rounds,
        "settings": {
            name: [{"arguments": s.arguments, "reason": s.reason} for s in server.settings]
            for name, server in servers.items()
        },
        "cells": [_cell(cell, result.cells) for cell in result.cells],
        "mapped": result.plan.mapped,
        "trials": [
            {
                "work": trial.key,
                "title": trial.title,
                "figures": trial.figures,
                "limits": trial.limits,
                "missed": trial.missed(result.plan),
                "failure": trial.failure,
            }
            for trial in result.trials
        ],
        "verified": [
            {"server": v.server, "image": v.state, "checked": v.checked, "wrong": v.wrong} for v in result.verdicts
        ],
        "sound": result.sound,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def _cell(cell: Cell, measured: Sequence[Cell]) -> dict[str, object]:
    who: dict[str, object] = {
        "work": cell.work.key,
        "title": cell.work.title,
        "server": cell.server.name,
        "image": cell.state.value,
    }
    if not cell.samples:
        return who | {"reason": cell.failure or cell.reason}
    best = best_peer(cell, measured)
    return who | {
        "requests_per_second": cell.rate,
        "rounds": [sample.rate for sample in cell.samples],
        "ratio_to_best_peer": None if best is None else cell.rate / best,
        "cpu_us_per_request": cpu_per_request(cell),
        "p99_us": 1e6 * cell.median(lambda sample: sample.p99),
        "client_busy": cell.median(lambda sample: sample.busy),
        "ratio_to_one_writer": ratio_to_one_writer(cell, measured),
        "failure": cell.failure,
    }
