"""Reading in order what was written in none: a volume, and a raw sparse file behind nbdkit, filled the same way.

Each is filled by 4 KiB writes at random places, every place once. Warm is all in the page cache; before a cold pass the
cache is told to forget the data file.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchlib import images
from benchlib.cold import forget
from benchlib.process import Daemon

from nbdthin.units import GiB, KiB, MiB

from . import jobs
from .jobs import Job
from .model import Bound, Curve, Measured, Scale
from .served import serving

_LEAST = 0.7
_SHAPES = ((128 * KiB, 1), (128 * KiB, 8), (MiB, 8))  # bytes of a request, and how many at once


@dataclass(frozen=True, slots=True)
class _Filled:
    name: str
    uri: str
    file: Path


def measure(place: Path, scale: Scale) -> Measured:
    size, rounds = scale.choose(512, 32) * MiB, scale.choose(3, 1)
    curves, bounds = [], []
    with _both(place, size) as both:
        for filled in both:
            jobs.run(filled.uri, Job("randwrite", 4 * KiB, 16, size, extra=("--end_fsync=1",)))
        for cache in ("warm", "cold"):
            curve = Curve(
                f"sequential-{cache}", f"Sequential read after random writes, {cache}", "KiB x depth", "MiB/s"
            )
            curves.append(curve)
            for block, depth in _SHAPES:
                rates = _in_turn(both, Job("read", block, depth, size), cache == "cold", rounds)
                for name, rate in rates.items():
                    curve.add(name, block * depth // KiB, rate / MiB)
                ours, theirs = rates.values()
                what = f"{cache}, {block // KiB} KiB, depth {depth}: nbdthin / raw"
                bounds.append(Bound(what, ours / theirs, _LEAST, "times", least=True))
    return Measured(curves, bounds)


def _in_turn(both: list[_Filled], job: Job, cold: bool, rounds: int) -> dict[str, float]:
    """Medians, in bytes a second."""
    rates: dict[str, list[float]] = {filled.name: [] for filled in both}
    for number in range(-(rounds > 1), rounds):
        for filled in both:
            if cold:
                forget(filled.file)
            rate = jobs.run(filled.uri, job)
            if number >= 0:  # one before them warms up
                rates[filled.name].append(rate)
    return {name: statistics.median(each) for name, each in rates.items()}


@contextmanager
def _both(place: Path, size: int) -> Iterator[list[_Filled]]:
    raw, sock = place / "raw", place / "k"
    images.make_sparse(raw, size)
    daemon = Daemon(["nbdkit", "-f", "-U", str(sock), "file", str(raw)], sock)
    try:
        with serving(place, 2 * size + GiB) as served:
            served.pool.create("v", size)
            yield [
                _Filled("nbdthin", served.uri("v"), served.data),
                _Filled("nbdkit file", f"nbd+unix:///?socket={sock}", raw),
            ]
    finally:
        daemon.stop()
