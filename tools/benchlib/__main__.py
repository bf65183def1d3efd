"""The command line: which cells, how long, and where; exit status 1 when a cell failed or data was wrong."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
from rich.console import Console

from nbdthin.errors import Invalid
from nbdthin.units import GiB, MiB, format_size, parse_size

from . import bigpool, charts, machine, process, report
from .errors import BenchError
from .options import pattern
from .ours import Nbdthin, choose_data_path
from .peers import PEERS
from .rounds import Bench, Plan, cells
from .servers import Ground, Server
from .standings import Cell
from .trials import Trial, trials
from .trials import run as run_trials
from .works import FIRST_WRITE_SHARE, TREE_TASKS, WORKS

SERVERS: tuple[Server, ...] = (Nbdthin(), *PEERS)
_IMAGES = 20  # images of full size there are at once, with every server in every state


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except Invalid as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size < MiB or size % FIRST_WRITE_SHARE:
        raise argparse.ArgumentTypeError(f"{text}: at least 1M, and a multiple of 64K")
    return size


def _blocks(text: str) -> int:
    try:
        blocks = parse_size(text)
    except Invalid as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not blocks or blocks % bigpool.STEP:
        raise argparse.ArgumentTypeError(f"{text}: a multiple of {bigpool.STEP >> 10}K")
    return blocks


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="nbdthin beside nbdkit, qemu-nbd and nbd-server: the same fio jobs on each in turn.",
        epilog="A cell is named WORK/SERVER/IMAGE, as in read-4k-d32/nbdkit file/full; --list prints them all.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small and short, under 3 minutes: proves the data, not the times")
    add("--rounds", type=int, metavar="N", help="rounds in turn, of which the median counts (5; quick: 1)")
    add("--most", type=int, metavar="N", help="rounds where they leave it unsure whether a row holds (3 times as many)")
    add("--seconds", type=float, metavar="S", help="length of one run of one cell (1; quick: 0.2)")
    add("--mapped", type=_blocks, metavar="N", help="blocks mapped for the last works (1M; quick: 64K)")
    add("--size", type=_size, metavar="SIZE", help="of each image (512M; quick: 128M)")
    add("--only", type=pattern, default=pattern(""), metavar="REGEX", help="only the cells whose name it finds")
    add("--directory", type=Path, default=Path("/var/tmp"), metavar="DIR", help="where images go (/var/tmp)")
    add("--json", type=Path, metavar="FILE", help="write every figure there, too")
    add("--charts", type=Path, metavar="DIR", help="write charts there, as SVG")
    add("--interpreted", action="store_true", help="nbdthin as if tools/compile had not been run")
    add("--perf", action="store_true", help="one more run of each cell under perf, and where its server's time goes")
    add("--list", action="store_true", help="print the names of the cells, and end")
    return parser.parse_args(argv)


def _plan(arguments: argparse.Namespace) -> Plan:
    quick: bool = arguments.quick
    rounds: int = arguments.rounds or (1 if quick else 5)
    return Plan(
        size=arguments.size or (128 * MiB if quick else 512 * MiB),
        seconds=arguments.seconds or (0.2 if quick else 1.0),
        tries=1 if quick else 3,
        rounds=rounds,
        most=arguments.most or (rounds if quick else 3 * rounds),
        mapped=arguments.mapped or (64 << 10 if quick else 1 << 20),
        warm_up=not quick,
        trimmed=_trimmed(arguments.directory, GiB if quick else 100 * GiB),
        debian=not quick and os.geteuid() == 0,
        perf=arguments.perf,
    )


def _trimmed(directory: Path, most: int) -> int:
    """What is trimmed takes its space for a moment: a quarter of what is free, at most."""
    size = most
    while size > psutil.disk_usage(str(directory)).free // 4 and size > MiB << 5:
        size = 1 << (size - 1).bit_length() - 1
    return size


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    chosen = [cell for cell in cells(WORKS, SERVERS) if arguments.only.search(cell.name)]
    tried = [trial for trial in trials() if arguments.only.search(trial.name)]
    if arguments.list:
        for cell in chosen:
            print(f"{cell.name} ({cell.reason})" if cell.reason else cell.name)
        for trial in tried:
            print(trial.name)
        return 0
    process.interrupt_on_signals()
    try:
        return _bench(chosen, tried, _plan(arguments), arguments)
    except (BenchError, OSError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tools/bench: interrupted; its servers are ended and its images removed", file=sys.stderr)
        return 130


def _bench(chosen: Sequence[Cell], tried: Sequence[Trial], plan: Plan, arguments: argparse.Namespace) -> int:
    directory: Path = arguments.directory
    if not chosen and not tried:
        raise BenchError("--only leaves no cell; --list shows their names")
    if chosen:
        _check_programs(chosen, plan)
        _check_room(plan.size, directory)
    programs = [program for cell in chosen for program in ("fio", *cell.server.programs[:1])]
    facts = machine.describe(programs, directory)
    facts["data path"] = choose_data_path(arguments.interpreted)
    with tempfile.TemporaryDirectory(prefix="nbench-", dir=directory) as place:
        with process.servers_ended(), Console(stderr=True).status("") as status:
            bench = Bench(Ground(Path(place), plan.size), plan, status.update)
            bench.run(chosen)
            run_trials(tried, Path(place), plan, status.update)
    result = report.Result(facts, plan, chosen, bench.verdicts, tried)
    report.print_report(result)
    if arguments.json is not None:
        report.write_json(arguments.json, result)
    if arguments.charts is not None:
        charts.write(arguments.charts, result)
    return 0 if result.sound else 1


def _check_programs(chosen: Sequence[Cell], plan: Plan) -> None:
    needed = {"fio", *(program for cell in chosen for program in cell.server.programs)}
    if any(cell.work.job in TREE_TASKS for cell in chosen if cell.reason is None):
        needed |= {"nbdcopy", "mke2fs", *(["debootstrap"] if plan.debian else [])}
    if plan.perf:
        needed.add("perf")
    machine.require(needed)


def _check_room(size: int, directory: Path) -> None:
    """A warm-cache bench on a machine that cannot hold the images would measure its disk."""
    needed = _IMAGES * size
    for what, free in (
        ("memory", psutil.virtual_memory().available),
        (str(directory), psutil.disk_usage(str(directory)).free),
    ):
        if free < needed:
            raise BenchError(
                f"{format_size(free)} free in {what}, {format_size(needed)} are needed for images of "
                f"{format_size(size)}: choose a smaller --size"
            )


if __name__ == "__main__":
    sys.exit(main())
