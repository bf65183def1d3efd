"""4 KiB reads on one volume while the daemon does something else: their p99 beside it, over that without.

Something else is another client with its own connection and volume, which nbdkit's file plugin is asked to do, too, or,
from benchlib's upkeep, checkpoints and merges. With and without take turns, so that whatever else the machine does
meets both. Each read is compared with what was written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchlib import images, latency, trials
from benchlib.client import Client
from benchlib.cold import forget
from benchlib.errors import BenchError
from benchlib.process import Daemon
from benchlib.rounds import Plan

from nbdthin.addresses import UnixAddress
from nbdthin.units import GiB, KiB, MiB

from . import jobs
from .jobs import Job
from .model import Bound, Curve, Measured, Scale
from .served import serving

_MOST = 3.0
_READ = 64 * MiB  # bytes of the volume that is read: all of it cached
_DEPTHS = (1, 16)
_LONG = 600.0  # seconds: more than any measuring takes
_PATIENCE = 20.0  # seconds for a client to connect
_UNDER_WAY = 0.1  # seconds from then on until it has as many requests under way as it may


@dataclass(frozen=True, slots=True)
class _Beside:
    """What another client does, with a volume of its own."""

    what: str
    volume: str
    job: Job
    cold: bool = False  # nothing of its volume is cached when it begins, and it reads no place twice


@dataclass(frozen=True, slots=True)
class _Server:
    """That has the volumes `read`, `flushed` and `other`, and they have data everywhere."""

    name: str
    socket: Path
    files: tuple[Path, ...]  # where the data lies

    def uri(self, volume: str) -> str:
        return UnixAddress(self.socket).uri(volume)

    def forget(self) -> None:
        """None of it is cached any more, but for what is read by who measures."""
        forget(*self.files)
        with Client(self.socket, "read") as client:
            for offset in range(0, _READ, MiB):
                client.read(offset, MiB)

    @property
    def connections(self) -> int:
        return sum(line.endswith(f" {self.socket}\n") for line in Path("/proc/net/unix").open())


def measure(place: Path, scale: Scale) -> Measured:
    size, seconds, rounds = scale.choose(2048, 64) * MiB, scale.choose(10, 2) / 10, scale.choose(4, 1)
    with serving(place, size + GiB) as served, _nbdkit(place, size) as nbdkit:
        for name, length in _sizes(size).items():
            served.pool.create(name, length)
        curves = {
            _Server("nbdthin", served.socket, (served.data,)): Curve(
                "tails", "p99 of 4 KiB reads", "reads at once", "us"
            ),
            nbdkit: Curve("tails-nbdkit", "p99 of 4 KiB reads, of nbdkit file", "reads at once", "us"),
        }
        bounds = []
        for server in curves:
            _fill(server, size)
        for depth in _depths(scale):
            for beside in _besides(size):
                for server, curve in curves.items():
                    bound = _compare(curve, depth, beside.what, *_in_turn(server, beside, depth, seconds, rounds))
                    if server is not nbdkit:  # which is beside it for comparison
                        bounds.append(bound)
        lag = served.pool.info().loop.lag_p99
    bounds.append(Bound("lag of the loop over all of it, p99", 1000 * lag, 10.0, "ms"))
    return Measured(list(curves.values()), bounds)


def _in_turn(
    server: _Server, beside: _Beside, depth: int, seconds: float, rounds: int
) -> tuple[latency.Times, latency.Times]:
    """With it and without."""
    with_it, without = [], []
    for _ in range(rounds):
        if beside.cold:
            server.forget()
        without.append(_read(server, depth, seconds))
        with _client(server, beside):
            with_it.append(_read(server, depth, seconds))
    return np.concatenate(with_it), np.concatenate(without)


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
    blocks, rounds = scale.choose(1 << 20, 16 << 10), scale.choose(3, 1)
    plan = Plan(0, 1.0, tries=1, rounds=rounds, most=rounds, warm_up=False, mapped=blocks, trimmed=0, debian=False)
    figures = trial.run(ground, plan)
    curve.add(f"beside a {what}", depth, figures["p99_us_with"])
    curve.add(f"without a {what}", depth, figures["p99_us_without"])
    return Bound(f"depth {depth}, beside a {what}: p99 / without", figures["p99_ratio"], _MOST, "times")


def _sizes(size: int) -> dict[str, int]:
    """The volumes, and their bytes. The other one first: its blocks are the first ones of the data file."""
    return {"other": size, "read": _READ, "flushed": _READ}


@contextmanager
def _nbdkit(place: Path, size: int) -> Iterator[_Server]:
    directory, sock = place / "raw", place / "k"
    directory.mkdir()
    files = tuple(directory / name for name in _sizes(size))
    for file, length in zip(files, _sizes(size).values(), strict=True):
        images.make_sparse(file, length)
    daemon = Daemon(["nbdkit", "-f", "-U", str(sock), "file", f"dir={directory}"], sock)
    try:
        yield _Server("nbdkit", sock, files)
    finally:
        daemon.stop()


def _fill(server: _Server, size: int) -> None:
    jobs.run(server.uri("other"), Job("write", 64 * KiB, 8, size, extra=("--end_fsync=1",)))
    for name in ("read", "flushed"):
        with Client(server.socket, name) as client:
            images.fill(client, _READ)


def _read(server: _Server, depth: int, seconds: float) -> latency.Times:
    timings = latency.read(server.socket, "read", _READ, depth, seconds)
    return timings.answered - timings.sent


@contextmanager
def _client(server: _Server, beside: _Beside) -> Iterator[None]:
    """Inside, it is connected and at work."""
    before = server.connections
    with jobs.beside(server.uri(beside.volume), beside.job):
        deadline = time.monotonic() + _PATIENCE
        while server.connections == before:
            if time.monotonic() > deadline:
                raise BenchError(f"the client of {beside.volume!r} does not connect")
            time.sleep(0.01)
        time.sleep(_UNDER_WAY)
        yield


def _besides(size: int) -> list[_Beside]:
    part = min(size, 512 * MiB)
    return [
        _Beside("4 KiB writes, depth 32", "other", Job("randwrite", 4 * KiB, 32, part, _LONG)),
        _Beside("1 MiB writes, depth 4", "other", Job("randwrite", MiB, 4, part, _LONG)),
        _Beside("cold reads", "other", Job("randread", 64 * KiB, 16, size, _LONG), cold=True),
        _Beside(
            "a flush every 3 ms",
            "flushed",
            Job("randwrite", 4 * KiB, 1, _READ, _LONG, ("--fsync=1", "--thinktime=3000")),
        ),
    ]
