"""What the rounds say: how nbdthin stands to its peers, and how sure that is.

A machine that is shared changes its pace from minute to minute. So two servers are compared round by round, as both
meet the same minute, and a ratio is the median of those of the rounds. Between which ratios it lies is told by their
order, whatever the noise is like (the sign test): of five rounds by the least and the greatest.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from .ours import Nbdthin
from .servers import Server, State
from .works import Bar, Work

_DOUBT = 0.07  # how likely, at most, the median lies outside; five rounds that agree leave 1 in 16


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one cell. A bounded work's runs on several images are added up."""

    amount: float  # requests, or what else the work counts
    seconds: float
    cpu: float  # seconds of the server's process tree
    p99: float | None = None  # seconds; None where it was not fio that asked
    busy: float | None = None  # of fio

    @property
    def rate(self) -> float:
        return self.amount / self.seconds

    def __add__(self, other: Sample) -> Sample:
        assert self.p99 is not None and other.p99 is not None and self.busy is not None and other.busy is not None
        return Sample(
            self.amount + other.amount,
            self.seconds + other.seconds,
            self.cpu + other.cpu,
            max(self.p99, other.p99),  # the worst of them: fio tells percentiles, which cannot be added
            max(self.busy, other.busy),
        )


@dataclass(slots=True)
class Cell:
    """`samples` are one for each round: those of cells of one work are of the same minute where their numbers are."""

    work: Work
    server: Server
    state: State
    reason: str | None = None
    failure: str | None = None
    samples: list[Sample] = field(default_factory=list)
    again: int = 0  # rounds that were measured again
    profile: Counter[str] = field(default_factory=Counter)  # samples of its server by part (profile.py)

    @property
    def name(self) -> str:
        return f"{self.work.key}/{self.server.name}/{self.state.value}"

    @property
    def measurable(self) -> bool:
        return self.reason is None and self.failure is None

    @property
    def is_ours(self) -> bool:
        return self.server.name == Nbdthin.name

    def median(self, figure: Callable[[Sample], float | None]) -> float | None:
        """None where the samples have no such figure."""
        figures = [value for value in map(figure, self.samples) if value is not None]
        return statistics.median(figures) if figures else None

    @property
    def rate(self) -> float:
        return statistics.median(sample.rate for sample in self.samples)

    @property
    def cpu(self) -> float:
        """Seconds of one request. Of all rounds together: the kernel tells CPU time in steps of 10 ms."""
        return sum(sample.cpu for sample in self.samples) / sum(sample.amount for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The rates of one cell over another's: the median of the rounds, and between which it lies."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, one: Cell, other: Cell) -> Ratio:
        """Both have samples. With fewer than five rounds nothing is known of where it lies."""
        ratios = sorted(ours.rate / theirs.rate for ours, theirs in zip(one.samples, other.samples, strict=False))
        outside = _outside(len(ratios))
        low, high = (0.0, math.inf) if outside is None else (ratios[outside], ratios[-1 - outside])
        return cls(statistics.median(ratios), low, high)


def _outside(count: int) -> int | None:
    """How many of the least, and of the greatest, of `count` measures may be left out; None: all are too few."""
    below, chance = None, 0.0
    for left_out in range((count + 1) // 2):
        chance += 2 * math.comb(count, left_out) / 2**count
        if chance > _DOUBT:
            break
        below = left_out
    return below


class Holds(Enum):
    """Whether a ratio is what it shall be, as far as the rounds tell."""

    YES = "yes"
    PERHAPS = "yes, but not surely"
    HARDLY = "NO, but not surely"
    NO = "NO"

    @property
    def is_sure(self) -> bool:
        return self in (Holds.YES, Holds.NO)


@dataclass(frozen=True, slots=True)
class Standing:
    """How nbdthin's `ours` stands to what it is measured against, and to what it shall be."""

    ours: Cell
    bar: Bar
    against: Sequence[Cell]  # the best first
    best_cow: Cell | None  # the best of those that are more than a plain file

    @property
    def best(self) -> Cell:
        return self.against[0]

    @property
    def ratio(self) -> Ratio:
        return Ratio.of(self.ours, self.best)

    @property
    def cpu_ratio(self) -> float | None:
        """None where the best took less CPU time than can be told."""
        return self.ours.cpu / self.best.cpu if self.best.cpu else None

    @property
    def is_held(self) -> bool:
        return self.ratio.median >= self.bar.least

    @property
    def holds(self) -> Holds:
        """Sure of no is who is sure of one peer, and of yes who is so of all."""
        ratios = [Ratio.of(self.ours, peer) for peer in self.against]
        least = self.bar.least
        if self.is_held:
            return Holds.YES if all(ratio.low >= least for ratio in ratios) else Holds.PERHAPS
        return Holds.NO if any(ratio.high < least for ratio in ratios) else Holds.HARDLY


def in_question(all_cells: Sequence[Cell]) -> list[Cell]:
    """Those that further rounds shall measure: where it is not sure, nbdthin's and what may be too near to it."""
    found = []
    for each in standings(all_cells):
        if not each.holds.is_sure:
            near = (peer for peer in each.against if Ratio.of(each.ours, peer).low < each.bar.least)
            found += [each.ours, *near]
    return found


def peers_of(cell: Cell, all_cells: Iterable[Cell]) -> list[Cell]:
    """Those that did the same work on an image in the same state, the best first."""
    same = (other for other in all_cells if other.samples and other.work is cell.work and other.state is cell.state)
    peers = (each for each in same if each.server.name in cell.work.against.names)
    return sorted(peers, key=lambda each: Ratio.of(cell, each).median)


def standings(all_cells: Sequence[Cell]) -> list[Standing]:
    """Of each bar that could be tried."""
    found = []
    for ours in (cell for cell in all_cells if cell.is_ours and cell.samples):
        for bar in (bar for bar in ours.work.bars if bar.state is ours.state):
            against = peers_of(ours, all_cells)
            cow = next((peer for peer in against if not peer.server.is_raw(peer.state)), None)
            if bar.own is not None:
                same = (cell for cell in all_cells if cell.is_ours and cell.work is ours.work and cell.samples)
                against, cow = [cell for cell in same if cell.state is bar.own], None
            elif over := ours.work.against.over:
                against = [peer for peer in against if peer.server.name in over]
            if against:
                found.append(Standing(ours, bar, against, cow))
    return found
