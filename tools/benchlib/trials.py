"""What depends on the size of the mapping, and has no peer to be compared with: nbdthin against its own limits.

    containers  what images and containers take on this machine (containers.py)
    load        how long a pool of 16 times `mapped` blocks takes to open, and how much memory
    checkpoint  what writing a checkpoint of `mapped` blocks does to the reads beside it, one at a time and 16
    merge       what merging a removed snapshot does to them

Pools come from bigpool.py: mapped, and without data but for what is read. A read that overlaps with a checkpoint or a
merge is compared with those of the same run that do not, so whatever else the machine does meets both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nbdthin.units import GiB, MiB

from . import bigpool, containers, images, latency
from .client import Client
from .errors import BenchError
from .latency import Span
from .process import Daemon, output_of
from .rounds import Plan
from .tree import mount_missing

LOADED = 16  # times as many blocks in the pool that is loaded
LOAD_SECONDS = 2.0
LOAD_BYTES = 300 * MiB
P99_RATIO = 2.0  # what a checkpoint or a merge may do to it
_READ = 64 * MiB  # at most, of a volume: all of it cached
_LIMITS_FROM = 1 << 20  # mapped blocks; smaller pools prove the data, not the limits
_PATIENCE = 60.0  # seconds for a checkpoint or a merge to come by


@dataclass(slots=True)
class Trial:
    """`run` returns figures by name; those that `limits` names must stay below."""

    key: str
    title: str
    run: Callable[[Path, Plan], dict[str, float]]
    limits: dict[str, float]
    image: str = "mapped"
    figures: dict[str, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def name(self) -> str:
        return f"{self.key}/nbdthin/{self.image}"

    def missed(self, plan: Plan) -> list[str]:
        """The figures beyond their limits."""
        if plan.mapped < _LIMITS_FROM:
            return []
        return [name for name, limit in self.limits.items() if self.figures.get(name, 0) >= limit]


def run(todo: Sequence[Trial], directory: Path, plan: Plan, say: Callable[[str], None]) -> None:
    for trial in todo:
        say(trial.title)
        place = directory / trial.key
        place.mkdir()
        try:
            trial.figures = trial.run(place, plan)
        except (BenchError, OSError) as error:
            trial.failure = str(error)


def _load(place: Path, plan: Plan) -> dict[str, float]:
    blocks = LOADED * plan.mapped
    bigpool.make(place / "pool", blocks)
    runs = [_load_once(place / "pool", blocks) for _ in range(max(plan.rounds, 2))]
    began = time.monotonic()
    _program(["nbdthin", "check", str(place / "pool")])
    checked = time.monotonic() - began
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]} | {"check_seconds": checked}


def _load_once(pool: Path, blocks: int) -> dict[str, float]:
    figures: dict[str, float] = json.loads(_program(["benchlib.load", str(pool)]))
    if figures["blocks"] != blocks:
        raise BenchError(f"{blocks} blocks were mapped, {figures['blocks']:.0f} are in the pool that was loaded")
    return figures


def _program(argv: Sequence[str]) -> str:
    return output_of([sys.executable, "-m", *argv], argv[0])


def _beside(kind: str, depth: int) -> Callable[[Path, Plan], dict[str, float]]:
    def measure(place: Path, plan: Plan) -> dict[str, float]:
        bigpool.make(place / "pool", plan.mapped)
        config = place / "exports.toml"
        config.write_text('[pool]\npath = "pool"\n[server]\nlisten = ["unix:s"]\n[control]\nsocket = "control"\n')
        log = place / "spans"
        argv = [sys.executable, "-m", "benchlib.upkeep", str(config), kind, str(log)]
        daemon = Daemon(argv, place / "s")
        try:
            return _read_beside(place / "s", log, depth, plan)
        finally:
            daemon.stop()

    return measure


def _read_beside(sock: Path, log: Path, depth: int, plan: Plan) -> dict[str, float]:
    size = min(_READ, bigpool.volume_size(plan.mapped))
    with Client(sock, "v0") as client:
        images.fill(client, size)
    runs = []
    began = time.monotonic()
    while True:
        runs.append(latency.read(sock, "v0", size, depth, plan.seconds))
        spans = [Span(*map(float, line.split())) for line in log.read_text().splitlines()]
        met = [span for span in spans if span.begun > runs[0].sent[0]]
        if len(runs) >= plan.rounds and len(met) >= 2:
            break
        if time.monotonic() > began + _PATIENCE + plan.rounds * plan.seconds:
            raise BenchError(f"{len(met)} of them in {_PATIENCE:.0f} s")
    parts = [run.split(spans) for run in runs]
    with_it = np.concatenate([inside for inside, _ in parts])
    without = np.concatenate([outside for _, outside in parts])
    if not len(with_it) or not len(without):
        raise BenchError("no reads beside it, or none without it")
    p99_with, p99_without = (float(np.percentile(each, 99)) for each in (with_it, without))
    return {
        "count": len(met),
        "seconds_each": statistics.median(span.ended - span.begun for span in met),
        "reads_with": len(with_it),
        "reads_without": len(without),
        "p50_us_with": 1e6 * float(np.percentile(with_it, 50)),
        "p50_us_without": 1e6 * float(np.percentile(without, 50)),
        "p99_us_with": 1e6 * p99_with,
        "p99_us_without": 1e6 * p99_without,
        "p99_ratio": p99_with / p99_without,
    }


def trials() -> list[Trial]:
    return [
        Trial("load", f"opening a pool of {LOADED} times the blocks", _load, _LOAD_LIMITS),
        *(
            Trial(f"{kind}-d{depth}", f"4 KiB reads, depth {depth}, beside {what}", _beside(kind, depth), _P99_LIMIT)
            for kind, what in (("checkpoint", "checkpoints"), ("merge", "merges"))
            for depth in (1, 16)
        ),
        *([] if mount_missing() else [Trial("containers", "images and containers", containers.run, _STARTS, "images")]),
    ]


_LOAD_LIMITS = {"load_seconds": LOAD_SECONDS, "peak_bytes": float(LOAD_BYTES)}
# containerd's devmapper snapshotter takes 66 ms to make one and 50 ms to mount it, one at a time (containerd #12335).
_STARTS = {"load_over_tar": 1 / 0.6, "start_ms": 116.0, "at_once_seconds": 11.6}
_P99_LIMIT = {"p99_ratio": P99_RATIO}
assert LOADED * _LIMITS_FROM * bigpool.BLOCK_SIZE == 1024 * GiB
