"""The measuring: each work on each server in turn, A B C A B C, then every image checked.

A cell is one work on one image of one server. What a cell cannot do is known before it starts (`reason`); what
goes wrong on the way stays in its cell (`failure`), so that one broken server costs no other its figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce

from . import fio, images
from .errors import BenchError
from .process import cpu_seconds
from .servers import Export, Ground, Server, State
from .works import FIRST_WRITE_SHARE, Work

_WARM_UP = 0.3  # seconds: first touches, thread pools, socket buffers
_CHILD_ENDS = 0.03  # seconds for a server's child to end after its connection, and its parent to notice
_FAULTS = (BenchError, OSError)  # OSError: the server broke its connection, or let it time out
_VERIFIED = 64 << 20  # bytes written and read back with checksums, or all of a smaller image


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one cell. A bounded work's runs on several clones are added up."""

    requests: int
    seconds: float
    cpu: float  # seconds of the server's process tree
    p99: float  # seconds
    busy: float  # of fio

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    def __add__(self, other: Sample) -> Sample:
        return Sample(
            self.requests + other.requests,
            self.seconds + other.seconds,
            self.cpu + other.cpu,
            max(self.p99, other.p99),  # the worst of them: fio tells percentiles, which cannot be added
            max(self.busy, other.busy),
        )


@dataclass(slots=True)
class Cell:
    work: Work
    server: Server
    state: State
    reason: str | None = None
    failure: str | None = None
    samples: list[Sample] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.work.key}/{self.server.name}/{self.state.value}"

    @property
    def measurable(self) -> bool:
        return self.reason is None and self.failure is None

    def median(self, figure: Callable[[Sample], float]) -> float:
        return statistics.median(map(figure, self.samples))

    @property
    def rate(self) -> float:
        return self.median(lambda sample: sample.rate)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wrong` is None for data that is as it must be."""

    server: str
    state: str
    checked: str
    wrong: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    size: int  # bytes of each image
    seconds: float  # of one run
    rounds: int
    warm_up: bool
    mapped: int  # blocks of the pools of trials.py


def cells(works: Sequence[Work], servers: Sequence[Server]) -> list[Cell]:
    """All of them. What a server has in no state of a work is one cell, with the reason, not several."""
    found: list[Cell] = []
    for work in works:
        for server in servers:
            possible = [state for state in work.states if server.lacks(state) is None]
            found += [Cell(work, server, state) for state in possible]
            if not possible:
                found.append(Cell(work, server, work.states[0], server.lacks(work.states[0])))
    return found


class Bench:
    """`exports` are the images that stay open from their first use to the end; bounded works take fresh ones."""

    def __init__(self, ground: Ground, plan: Plan, say: Callable[[str], None]) -> None:
        self._ground = ground
        self._plan = plan
        self._say = say
        self._exports: dict[tuple[str, State], Export] = {}
        self.verdicts: list[Verdict] = []

    def run(self, todo: Sequence[Cell]) -> None:
        for work in dict.fromkeys(cell.work for cell in todo):
            self._measure(work, [cell for cell in todo if cell.work is work])
        self._verify(todo)

    def _measure(self, work: Work, todo: Sequence[Cell]) -> None:
        """All rounds of one work, close in time for all servers."""
        ready = [cell for cell in todo if cell.measurable and self._prepare(cell)]
        for number in range(self._plan.rounds):
            for cell in ready:
                if cell.measurable:
                    self._say(f"{work.title}: round {number + 1} of {self._plan.rounds}, {cell.server.name}")
                    with _kept_in(cell):
                        cell.samples.append(self._round(cell, number))

    def _prepare(self, cell: Cell) -> bool:
        self._say(f"{cell.work.title}: preparing {cell.server.name}, {cell.state.value}")
        with _kept_in(cell):
            if not cell.work.bounded:
                export = self._lasting_export(cell)
                if self._plan.warm_up:
                    fio.measure(export.uri, cell.work, self._plan.size, _WARM_UP, None, seed=0)
        return cell.measurable

    def _lasting_export(self, cell: Cell) -> Export:
        key = cell.server.name, cell.state
        if key not in self._exports:
            self._exports[key] = cell.server.open(cell.state, self._ground)
        return self._exports[key]

    def _round(self, cell: Cell, number: int) -> Sample:
        if cell.work.bounded:
            return self._first_writes(cell, number)
        export = self._lasting_export(cell)
        sample = self._run(export, cell.work, None, number + 1)
        if cell.work.writes:  # the next to be measured shall not pay for this one's dirty pages
            with export.client() as client:
                client.flush()
        return sample

    def _first_writes(self, cell: Cell, number: int) -> Sample:
        """As many fresh clones as the time holds; the last one's bytes are counted."""
        requests = max(1, self._plan.size // FIRST_WRITE_SHARE)
        samples: list[Sample] = []
        deadline = time.monotonic() + 2 * self._plan.seconds
        last = False
        while not last:
            export = cell.server.open(cell.state, self._ground)
            try:
                samples.append(self._run(export, cell.work, requests, number + 1))
                measured = sum(sample.seconds for sample in samples)
                last = measured >= self._plan.seconds or time.monotonic() >= deadline
                if last and cell.server.keeps(cell.state):
                    _check_first_writes(export, requests)
            finally:
                export.close()
        return reduce(Sample.__add__, samples)

    def _run(self, export: Export, work: Work, requests: int | None, seed: int) -> Sample:
        before = cpu_seconds(export.pid)
        job = fio.measure(export.uri, work, self._plan.size, self._plan.seconds, requests, seed)
        time.sleep(_CHILD_ENDS)
        cpu = cpu_seconds(export.pid) - before
        return Sample(job.requests, job.seconds, cpu, job.p99, job.busy)

    def _verify(self, done: Sequence[Cell]) -> None:
        """Reads back what was measured, then writes and reads under load with checksums, then the parents."""
        images_used = {(cell.server.name, cell.state): cell for cell in done if cell.samples}
        for cell in images_used.values():
            self._verify_image(cell)
        for server in {name: cell.server for (name, _), cell in images_used.items()}.values():
            self._say(f"verifying what the clones of {server.name} are made of")
            with self._verdict(server, "parent", "unchanged"):
                server.check_parents(self._ground)

    def _verify_image(self, cell: Cell) -> None:
        server, state = cell.server, cell.state
        self._say(f"verifying {server.name}, {state.value}")
        if server.keeps(state):
            with self._verdict(server, state.value, "each block read back"):
                _check_blocks(self._lasting_export(cell), state)
        with self._verdict(server, state.value, "written and read under load, crc32c"):
            fio.verify(self._lasting_export(cell).uri, self._plan.size, min(_VERIFIED, self._plan.size))

    @contextmanager
    def _verdict(self, server: Server, state: str, checked: str) -> Iterator[None]:
        wrong = None
        try:
            yield
        except _FAULTS as error:
            wrong = str(error)
        self.verdicts.append(Verdict(server.name, state, checked, wrong))


@contextmanager
def _kept_in(cell: Cell) -> Iterator[None]:
    """What goes wrong stays in the cell."""
    try:
        yield
    except _FAULTS as error:
        cell.failure = str(error)


def _check_blocks(export: Export, state: State) -> None:
    """Of the images that stay open, fio's measured writes went to the full ones alone."""
    check = images.check if state in (State.FULL, State.SLOW) else images.check_kept
    with export.client() as client:
        check(client, export.generations)


def _check_first_writes(export: Export, requests: int) -> None:
    """Each write is there, and nothing else changed."""
    with export.client() as client:
        written = images.check(client, export.generations)
    if written != requests:
        raise BenchError(f"{requests} blocks were written, {written} are there")
