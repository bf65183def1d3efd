"""4 KiB reads on one volume while the daemon does something else: their p99 beside it, over that without.

Something else is another client with its own connection and volume, or, from benchlib's upkeep, checkpoints and merges.
With and without take turns, so that whatever else the machine does meets both. Each read is compared with what was
written.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
from benchlib import images, latency, trials
from benchlib.errors import BenchError
from benchlib.rounds import Plan

from nbdthin.units import GiB, KiB, MiB

from . import jobs
from .jobs import Job
from .model import Bound, Curve, Measured, Scale
from .served import Served, serving

_MOST = 3.0
_READ = 64 * MiB  # bytes of the volume that is read: all of it cached
_DEPTHS = (1, 16)
_LONG = 600.0  # seconds: more than any measuring takes
_PATIENCE = 20.0  # seconds for a client to connect
_UNDER_WAY = 0.1  # seconds from then on until it has as many requests under way as it may
_FORGET = 0.05  # seconds between two times that the page cache is told to forget the other volume
_EVERY_FEW_MS = ("--fsync=1", "--thinktime=3000")


def measure(place: Path, scale: Scale) -> Measured:
    curve = Curve("tails", "p99 of 4 KiB reads", "reads at once", "us")
    bounds = []
    size, seconds, rounds = scale.choose(512, 64) * MiB, scale.choose(10, 2) / 10, scale.choose(4, 1)
    with serving(place, 2 * size + GiB) as served:
        _fill(served, size)
        for depth in _depths(scale):
            for what, beside in _BESIDE.items():
                without, with_it = [], []
                for _ in range(rounds):
                    without.append(_read(served, depth, seconds))
                    with beside(served, size):
                        with_it.append(_read(served, depth, seconds))
                bounds.append(_compare(curve, depth, what, np.concatenate(with_it), np.concatenate(without)))
        lag = served.pool.info().loop.lag_p99
    bounds.append(Bound("lag of the loop over all of it, p99", 1000 * lag, 10.0, "ms"))
    return Measured([curve], bounds)


def measure_upkeep(place: Path, scale: Scale) -> Measured:
    curve = Curve("upkeep", "p99 of 4 KiB reads", "reads at once", "us")
    kinds = ("checkpoint", "merge")
    return Measured([curve], [_upkeep(place, curve, kind, depth, scale) for depth in _depths(scale) for kind in kinds])


def _depths(scale: Scale) -> tuple[int, ...]:
    return _DEPTHS[-1:] if scale.quick else _DEPTHS


def _compare(curve: Curve, depth: int, what: str, with_it: latency.Times, without: latency.Times) -> Bound:
    beside, alone = (1e6 * float(np.percentile(each, 99)) for each in (with_it, without))
    curve.add(f"beside {what}", depth, beside)
    curve.add(f"without {what}", depth, alone)
    return Bound(f"depth {depth}, beside {what}: p99 / without", beside / alone, _MOST, "times")


def _upkeep(place: Path, curve: Curve, what: str, depth: int, scale: Scale) -> Bound:
    """By benchlib's trial, which has a daemon, and a pool of a mapping worth the work, of its own."""
    (trial,) = [each for each in trials.trials() if each.key == f"{what}-d{depth}"]
    ground = place / f"{what[0]}{depth}"  # short: a socket has at most 107 bytes of path
    ground.mkdir()
    blocks = scale.choose(1 << 20, 16 << 10)
    figures = trial.run(ground, Plan(0, 1.0, scale.choose(3, 1), warm_up=False, mapped=blocks, trimmed=0, debian=False))
    curve.add(f"beside a {what}", depth, figures["p99_us_with"])
    curve.add(f"without a {what}", depth, figures["p99_us_without"])
    return Bound(f"depth {depth}, beside a {what}: p99 / without", figures["p99_ratio"], _MOST, "times")


def _fill(served: Served, size: int) -> None:
    """The other volume first: its blocks are the first ones of the data file, and none else's."""
    served.pool.create("other", size)
    jobs.run(served.uri("other"), Job("write", MiB, 8, size, extra=("--end_fsync=1",)))
    for name in ("read", "flushed"):
        served.pool.create(name, _READ)
        with served.client(name) as client:
            images.fill(client, _READ)


def _read(served: Served, depth: int, seconds: float) -> latency.Times:
    timings = latency.read(served.socket, "read", _READ, depth, seconds)
    return timings.answered - timings.sent


# -- what goes on beside


@contextmanager
def _client(served: Served, name: str, job: Job) -> Iterator[None]:
    """Inside, it is connected and at work."""
    with jobs.beside(served.uri(name), job):
        deadline = time.monotonic() + _PATIENCE
        while not served.pool.show(name).connections:
            if time.monotonic() > deadline:
                raise BenchError(f"the client of {name!r} does not connect")
            time.sleep(0.01)
        time.sleep(_UNDER_WAY)
        yield


@contextmanager
def _overwritten(served: Served, size: int) -> Iterator[None]:
    with _client(served, "other", Job("randwrite", 4 * KiB, 32, size, _LONG)):
        yield


@contextmanager
def _overwritten_largely(served: Served, size: int) -> Iterator[None]:
    with _client(served, "other", Job("randwrite", MiB, 4, size, _LONG)):
        yield


@contextmanager
def _read_cold(served: Served, size: int) -> Iterator[None]:
    """The page cache forgets the volume again and again, so that its reads have to wait for the disk."""
    stop = threading.Event()
    descriptor = os.open(served.data, os.O_RDONLY)

    def forget() -> None:
        while not stop.wait(_FORGET):
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        with _client(served, "other", Job("randread", 64 * KiB, 16, size, _LONG)):
            yield
    finally:
        stop.set()
        thread.join()
        os.close(descriptor)


@contextmanager
def _flushed(served: Served, size: int) -> Iterator[None]:
    with _client(served, "flushed", Job("randwrite", 4 * KiB, 1, _READ, _LONG, _EVERY_FEW_MS)):
        yield


_BESIDE: dict[str, Callable[[Served, int], AbstractContextManager[None]]] = {
    "4 KiB writes, depth 32": _overwritten,
    "1 MiB writes, depth 4": _overwritten_largely,
    "cold reads": _read_cold,
    "a flush every 3 ms": _flushed,
}
