"""What was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from nbdthin.units import format_size

from . import profile
from .rounds import STOLEN, Plan, Verdict
from .servers import State
from .standings import Cell, Ratio, Standing, peers_of, standings
from .trials import Trial
from .works import Load, Task, Work

_PIPED_WIDTH = 190  # without a terminal to ask: wide enough for the longest row


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
        f"Warm page cache, unix socket, one connection, images of {format_size(plan.size)}, unless it says otherwise; "
        f"{plan.rounds} to {plan.most} rounds in turn, {plan.seconds:g} s each. Figures are medians of them, also "
        "ratios, taken in each; in brackets is where a ratio surely lies. Compare ratios, not machines."
    )
    console.print(", ".join(f"{name} {value}" for name, value in result.facts.items()))
    console.print()
    style = box.MARKDOWN if piped else box.ROUNDED
    if result.cells:
        console.print(_table(result, style))
        _print_verdicts(console, result.verdicts)
        if again := sum(cell.again for cell in result.cells):
            console.print(f"{again} rounds were measured again: the hypervisor took {STOLEN:.0%} and more of them.")
        if found := standings(result.cells):
            console.print()
            console.print(_standings(found, plan, style))
    if any(cell.profile for cell in result.cells):
        console.print()
        console.print(_profiles(result, style))
    if result.trials:
        console.print(_trials(result, style))


def _table(result: Result, style: box.Box) -> Table:
    measured = result.cells
    table = Table(box=style)
    table.add_column("work and server", no_wrap=True)
    for heading in ("per second", "lowest-highest", "/ best peer", "CPU us each", "p99 us", "fio busy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note")
    for work in dict.fromkeys(cell.work for cell in measured):
        table.add_section()
        table.add_row(title(work, result.plan), *[""] * 6, f"against: {work.against.title}", style="bold")
        for cell in measured:
            if cell.work is work:
                table.add_row(f"  {_who(cell)}", *_figures(cell, measured), _note(cell, measured))
    return table


def title(work: Work, plan: Plan) -> str:
    return plan.title(work) if work.unit == "requests" else f"{plan.title(work)}, {work.unit}"


def standing_title(standing: Standing, plan: Plan) -> str:
    work, state = standing.ours.work, standing.ours.state
    return f"{plan.title(work)}: {state.value}" if len(work.states) > 1 else plan.title(work)


def best_of(standing: Standing) -> str:
    own = standing.bar.own
    return who(standing.best) if own is None else f"its own {own.value}"


def who(cell: Cell) -> str:
    return f"{cell.server.name}, raw" if cell.server.is_raw(cell.state) else cell.server.name


def _who(cell: Cell) -> str:
    name = who(cell)
    return f"{name}, {cell.state.value}" if len(cell.work.states) > 1 else name


def _figures(cell: Cell, measured: Sequence[Cell]) -> list[str]:
    if not cell.samples:
        return ["-"] * 6
    rates = [sample.rate for sample in cell.samples]
    peers = peers_of(cell, measured)
    p99, busy = _p99(cell), _busy(cell)
    return [
        _number(cell.rate),
        f"{_number(min(rates))}-{_number(max(rates))}",
        f"{Ratio.of(cell, peers[0]).median:.2f}" if peers else "-",
        f"{1e6 * cell.cpu:,.1f}",
        "-" if p99 is None else f"{1e6 * p99:,.0f}",
        "-" if busy is None else f"{100 * busy:.0f} %",
    ]


def _p99(cell: Cell) -> float | None:
    """Seconds."""
    return cell.median(lambda sample: sample.p99)


def _busy(cell: Cell) -> float | None:
    return cell.median(lambda sample: sample.busy)


def _standings(found: Sequence[Standing], plan: Plan, style: box.Box) -> Table:
    """What was asked for, and whether it holds. The CPU time is that of one request, over the best peer's."""
    table = Table(box=style)
    table.add_column("work")
    table.add_column("best peer")
    for heading in ("nbdthin / it", "", "at least", "aim", "CPU / its", "aim", "/ best CoW peer"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("holds")
    for each in found:
        bar, cpu = each.bar, each.cpu_ratio
        table.add_row(
            standing_title(each, plan),
            best_of(each),
            f"{each.ratio.median:.2f}",
            f"({each.ratio.low:.2f}-{each.ratio.high:.2f})" if math.isfinite(each.ratio.high) else "",
            f"{bar.least:g}",
            f"{bar.aim:g}",
            "-" if cpu is None else f"{cpu:.2f}",
            "" if bar.cpu is None else f"{bar.cpu:g}",
            f"{Ratio.of(each.ours, each.best_cow).median:.2f}" if each.best_cow else "-",
            each.holds.value,
        )
    table.add_section()
    holding = sum(each.is_held for each in found)
    table.add_row(f"{holding} of {len(found)} hold", style="bold")
    return table


def _profiles(result: Result, style: box.Box) -> Table:
    """Of one more run, whose shares are laid upon the CPU time of the others."""
    table = Table(box=style)
    table.add_column("the server's CPU us each")
    for part in ("in all", *profile.COLUMNS):
        table.add_column(part, justify="right")
    for cell in result.cells:
        if shares := profile.shares(cell.profile):
            figures = [f"{1e6 * cell.cpu * share:,.1f}" for share in (1.0, *shares.values())]
            table.add_row(f"{title(cell.work, result.plan)}: {_who(cell)}", *figures)
    return table


def _note(cell: Cell, measured: Sequence[Cell]) -> str:
    if cell.failure or cell.reason:
        return cell.failure or cell.reason or ""
    if (gain := ratio_to_one_writer(cell, measured)) is not None:
        return f"{gain:.1f} times one writer"
    if cell.server.name in cell.work.against.beside:
        return "no peer: keeps it in memory"
    if isinstance(cell.work.job, Task):
        whole = 1000 * statistics.median(sample.seconds for sample in cell.samples)
        return f"{whole:,.1f} ms in all" if cell.work.job is not Task.MAP else ""
    if cell.state.depth <= 1:
        return ""
    short = [c for c in measured if c.server is cell.server and c.work is cell.work and c.state is State.CHAIN_1]
    return f"{Ratio.of(cell, short[0]).median:.2f} of its chain of 1" if short and short[0].samples else ""


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
        "root": "Debian minbase" if result.plan.debian else "library of this Python",
        "trimmed": result.plan.trimmed,
        "size": result.plan.size,
        "seconds": result.plan.seconds,
        "rounds": result.plan.rounds,
        "rounds_at_most": result.plan.most,
        "settings": {
            name: [{"arguments": s.arguments, "reason": s.reason} for s in server.settings]
            for name, server in servers.items()
        },
        "cells": [_cell(cell, result) for cell in result.cells],
        "standings": [_standing(each, result.plan) for each in standings(result.cells)],
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


def _standing(each: Standing, plan: Plan) -> dict[str, object]:
    return {
        "work": each.ours.work.key,
        "title": standing_title(each, plan),
        "against": each.ours.work.against.title,
        "image": each.ours.state.value,
        "over": list(each.ours.work.against.over or each.ours.work.against.names),
        "best_peer": each.best.server.name,
        "best_peer_image": each.best.state.value,
        "best_peer_is_raw": each.best.server.is_raw(each.best.state),
        "ratio": each.ratio.median,
        "ratio_from": each.ratio.low,
        "ratio_to": each.ratio.high if math.isfinite(each.ratio.high) else None,
        "at_least": each.bar.least,
        "aim": each.bar.aim,
        "cpu_ratio": each.cpu_ratio,
        "cpu_aim": each.bar.cpu,
        "best_cow_peer": each.best_cow.server.name if each.best_cow else None,
        "ratio_to_best_cow_peer": Ratio.of(each.ours, each.best_cow).median if each.best_cow else None,
        "holds": each.is_held,
        "surely": each.holds.is_sure,
    }


def _cell(cell: Cell, result: Result) -> dict[str, object]:
    job = cell.work.job
    who: dict[str, object] = {
        "work": cell.work.key,
        "title": result.plan.title(cell.work),
        "unit": cell.work.unit,
        "cache": "cold" if isinstance(job, Load) and job.cold else "warm",
        "server": cell.server.name,
        "image": cell.state.value,
        "is_raw": cell.server.is_raw(cell.state),
        "is_peer": cell.server.name in cell.work.against.names,
    }
    if not cell.samples:
        return who | {"reason": cell.failure or cell.reason}
    measured = result.cells
    peers, p99 = peers_of(cell, measured), _p99(cell)
    return who | {
        "per_second": cell.rate,
        "rounds": [sample.rate for sample in cell.samples],
        "seconds": [sample.seconds for sample in cell.samples],
        "measured_again": cell.again,
        "ratio_to_best_peer": Ratio.of(cell, peers[0]).median if peers else None,
        "cpu_us_each": 1e6 * cell.cpu,
        "p99_us": None if p99 is None else 1e6 * p99,
        "client_busy": _busy(cell),
        "ratio_to_one_writer": ratio_to_one_writer(cell, measured),
        "failure": cell.failure,
        "profile": profile.shares(cell.profile),
    }
