"""The command line: see `tools/simulate --help`."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence

from simulatelib.directed import ALL, run_directed
from simulatelib.livework import run_live
from simulatelib.run import Counts, Failure, run_seed


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/simulate",
        description="Cut the power during seeded work on a small pool, at every sync and at moments between; make "
        "disks as each cut may leave them (unsynced sectors of 512 bytes and names kept or lost in any mix); open "
        "them with the real engine, and compare with what had been answered. The same arguments are the same run.",
        epilog="Exit status 1: something was lost; what, where in the log, and the command that shows it again are "
        "printed. Takes memory, not disk: pools lie in /dev/shm where there is room.",
    )
    add = parser.add_argument
    add("--seed", type=int, metavar="N", help="the run to make (a new one, printed)")
    add(
        "--steps", type=int, default=600, metavar="N", help="steps of work; every 150, the run goes on from a cut (600)"
    )
    add(
        "--cuts",
        choices=("sync", "all"),
        default="sync",
        help="before and after each sync, and 5 %% of the other calls; or all",
    )
    add(
        "--live",
        action="store_true",
        help="through the event loop and its threads; timing is part of it: may not repeat",
    )
    add("--directed", choices=ALL, help="a short history instead, cut at every call")
    add("--minutes", type=float, default=0.0, metavar="M", help="go on with the seeds that follow for so long")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace, seed: int) -> Counts:
    if arguments.directed:
        return run_directed(arguments.directed, seed)
    if arguments.live:
        return run_live(seed, arguments.steps)
    return run_seed(seed, arguments.steps, arguments.cuts)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 31)
    began = time.monotonic()
    total = Counts()
    return _seeds(lambda number: _run(arguments, number), seed, began + 60 * arguments.minutes, total)


def _seeds(run: Callable[[int], Counts], seed: int, end: float, total: Counts) -> int:
    while True:
        began = time.monotonic()
        try:
            counts = run(seed)
        except Failure as failure:
            print(f"seed {seed}: {failure}")
            return 1
        total.add(counts)
        print(f"seed {seed}: {counts}, {counts.images / (time.monotonic() - began):.0f} a second", flush=True)
        seed += 1
        if time.monotonic() >= end:
            return 0


if __name__ == "__main__":
    sys.exit(main())
