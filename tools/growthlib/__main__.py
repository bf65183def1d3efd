"""The command line: which statements, where, and what is written; exit status 1 when one could not be measured.

A bound that does not hold is told, and no failure: machines differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchlib import machine, process
from benchlib.errors import BenchError
from benchlib.options import pattern
from benchlib.ours import choose_data_path
from rich.console import Console

from nbdthin.errors import Error

from . import charts, clones, deletion, names, report, sequential, tails
from .model import Scale, Statement


def statements() -> list[Statement]:
    fio = ("fio",)
    return [
        Statement("names", "A snapshot and a clone cost the same beside 100,000 names", names.measure),
        Statement("clones", "A clone of a fully written 1 TiB volume", clones.measure_one),
        Statement("open", "A thousand open clones of one image", clones.measure_open),
        Statement("deletion", "Deleting a snapshot costs what it alone holds", deletion.measure),
        Statement("sequential", "Sequential reads after random writes", sequential.measure, (*fio, "nbdkit")),
        Statement("tails", "p99 of 4 KiB reads beside other clients", tails.measure, (*fio, "nbdkit")),
        Statement("upkeep", "p99 of 4 KiB reads beside checkpoints and merges", tails.measure_upkeep),
    ]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    keys = ", ".join(each.key for each in statements())
    parser = argparse.ArgumentParser(
        prog="tools/growth",
        description="What of nbdthin grows with a pool and what does not: curves, and whether their bounds hold.",
        epilog=f"The statements: {keys}. All of them take under 6 minutes on 2 cores.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small, under 30 s: proves the data, not the figures")
    add("--only", type=pattern, default=pattern(""), metavar="REGEX", help="only the statements whose name it finds")
    add("--directory", type=Path, default=Path("/var/tmp"), metavar="DIR", help="where pools go (/var/tmp)")
    add("--json", type=Path, metavar="FILE", help="write every figure there, too")
    add("--charts", type=Path, metavar="DIR", help="write each curve there as growth-NAME.svg, too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    process.interrupt_on_signals()
    try:
        return _measure([each for each in statements() if arguments.only.search(each.key)], arguments)
    except (BenchError, OSError) as error:
        print(f"tools/growth: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tools/growth: interrupted; its daemons are ended and its pools removed", file=sys.stderr)
        return 130


def _measure(chosen: Sequence[Statement], arguments: argparse.Namespace) -> int:
    if not chosen:
        raise BenchError(f"--only leaves none of {', '.join(each.key for each in statements())}")
    programs = sorted({program for each in chosen for program in each.programs})
    machine.require(programs)
    scale = Scale(arguments.quick)
    facts = machine.describe(programs, arguments.directory)
    facts["data path"] = choose_data_path(False)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="growth-", dir=arguments.directory) as place:
        with process.servers_ended(), Console(stderr=True).status("") as status:
            for each in chosen:
                status.update(each.title)
                _run(each, Path(place) / each.key, scale)
    facts["took"] = f"{time.monotonic() - began:.0f} s"
    report.print_report(facts, chosen, scale)
    if arguments.json is not None:
        report.write_json(arguments.json, facts, chosen, scale)
    if arguments.charts is not None:
        arguments.charts.mkdir(parents=True, exist_ok=True)
        for curve in (curve for each in chosen if each.measured for curve in each.measured.curves):
            charts.write(arguments.charts, curve)
    return 1 if any(each.failure for each in chosen) else 0


def _run(statement: Statement, place: Path, scale: Scale) -> None:
    place.mkdir()
    try:
        statement.measured = statement.run(place, scale)
    except (BenchError, Error, OSError) as error:
        statement.failure = str(error)


if __name__ == "__main__":
    sys.exit(main())
