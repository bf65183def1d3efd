"""Snapshots and clones beside ever more names: one group of records, one sync, whatever there is already."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchlib.errors import BenchError

from nbdthin.units import GiB

from .model import Bound, Curve, Measured, Scale
from .served import Served, serving

_EACH = 50  # snapshots, and clones, measured beside each number of names
_BATCH = 10_000
_SAME = 3.0  # times what it takes beside the fewest names: what the noise of a sync leaves to be said


def measure(place: Path, scale: Scale) -> Measured:
    most = scale.choose(100_000, 1000)
    times = Curve("names-time", "A snapshot, a clone", "names in the pool", "ms, median")
    sizes = Curve("names-journal", "A snapshot, a clone: journal", "names in the pool", "bytes")
    with serving(place, GiB) as served:
        pool = served.pool
        pool.create("v", GiB)
        pool.snapshot("v", "image")
        names = 2
        wanted = 10
        while wanted <= most:
            while names < wanted:
                names += _batch(served, names, min(wanted - names, _BATCH))
            served.settle()
            for kind, make in (("snapshot", _snapshot), ("clone", _clone)):
                took, grew = _one_by_one(served, names, make)
                times.add(kind, wanted, 1000 * statistics.median(took))
                sizes.add(kind, wanted, statistics.median(grew))
            names += 2 * _EACH
            wanted *= 10
        began = time.perf_counter()
        names += _batch(served, names, _BATCH)
        batch = time.perf_counter() - began
        facts = pool.info().pool
        if facts.volumes + facts.snapshots != names:
            raise BenchError(f"{names} names were made, and there are {facts.volumes + facts.snapshots}")
    bounds = [Bound(f"{_BATCH:,} clones in one batch", batch, 1.0, "s")]
    for kind in ("snapshot", "clone"):
        taken, grown = times.values(kind), sizes.values(kind)
        bounds.append(Bound(f"{kind}: time beside {most:,} names / beside 10", taken[-1] / taken[0], _SAME, "times"))
        bounds.append(Bound(f"{kind}: journal beside {most:,} names / beside 10", grown[-1] / grown[0], 1.5, "times"))
    return Measured([times, sizes], bounds)


def _batch(served: Served, first: int, count: int) -> int:
    with served.pool.batch():
        for number in range(count):
            served.pool.clone("image", f"clone/{first + number}")
    return count


def _snapshot(served: Served, name: str) -> None:
    served.pool.snapshot("v", f"snapshot/{name}")


def _clone(served: Served, name: str) -> None:
    served.pool.clone("image", f"more/{name}")


def _one_by_one(served: Served, names: int, make: Callable[[Served, str], None]) -> tuple[list[float], list[int]]:
    """Seconds and bytes of journal of each. Raises BenchError where one is not one frame of the journal."""
    took, grew = [], []
    for number in range(_EACH):
        before = served.pool.info().pool
        began = time.perf_counter()
        make(served, f"{names}.{number}")
        took.append(time.perf_counter() - began)
        after = served.pool.info().pool
        if after.sequence != before.sequence + 1:
            raise BenchError(f"{after.sequence - before.sequence} frames of the journal for one command")
        if after.journal > before.journal:  # else a checkpoint has come between
            grew.append(after.journal - before.journal)
    return took, grew
