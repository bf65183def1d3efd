"""The measuring: each work on each server in turn, round by round, then every image checked.

A cell is one work on one image of one server. What a cell cannot do is known before it starts (`reason`); what
goes wrong on the way stays in its cell (`failure`), so that one broken server costs no other its figures.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import psutil

from nbdthin.units import MiB, format_size

from . import cold, fio, images, profile, ranges, slowdisk, tree
from .errors import BenchError
from .ours import Nbdthin
from .process import cpu_seconds
from .servers import Export, Ground, Server, State
from .standings import Cell, Sample, in_question
from .works import FIRST_WRITE_SHARE, Load, Task, Work

STOLEN = 0.02  # of the processors' time, by the hypervisor, beyond which a round is measured again
_WARM_UP = 0.3  # seconds: first touches, thread pools, socket buffers
_CHILD_ENDS = 0.03  # seconds for a server's child to end after its connection, and its parent to notice
_FAULTS = (BenchError, OSError)  # OSError: the server broke its connection, or let it time out
_VERIFIED = 64 << 20  # bytes written and read back with checksums, or all of a smaller image


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
    tries: int  # at most, of a round that is disturbed
    rounds: int
    most: int  # rounds, where it is not sure whether a row holds
    warm_up: bool
    mapped: int  # blocks of the pools of trials.py
    trimmed: int  # bytes of the volume that is trimmed
    debian: bool  # whether the root file system is Debian's, or something smaller
    perf: bool = False  # whether each cell has one more run, under perf

    @property
    def fragmented(self) -> int:
        """Bytes of the volume that is mapped; half of it is written."""
        return 2 * self.size

    def title(self, work: Work) -> str:
        return work.title.format(
            root="a Debian root" if self.debian else "Python's library",
            trimmed=format_size(self.trimmed),
            fragmented=format_size(self.fragmented),
        )


def cells(works: Sequence[Work], servers: Sequence[Server]) -> list[Cell]:
    """All of them: nbdthin's, and those of the peers that the works name."""
    found: list[Cell] = []
    for work in works:
        reason = _missing(work)
        for server in servers:
            if server.name in (Nbdthin.name, *work.against.names, *work.against.beside):
                states = [each for each in work.states if each is not State.CHAIN_1000 or server.name == Nbdthin.name]
                found += [Cell(work, server, state, reason) for state in states]
    return found


def _missing(work: Work) -> str | None:
    """Why this machine cannot do it; None when it can."""
    if State.SLOW in work.states:
        return slowdisk.missing()
    return tree.mount_missing() if work.job is Task.UNPACK else ranges.map_missing() if work.job is Task.MAP else None


class _Job(NamedTuple):
    """How a task is done."""

    size: int  # bytes of its image
    setup: Callable[[Export], None] | None  # what is done once to an image that lasts; None: it takes a fresh one
    prepared: Callable[[Export], AbstractContextManager[Callable[[], float]]]  # hands out what is timed, then checks it


class Bench:
    """`exports` are the images that stay open from their first use to the end; bounded works take fresh ones.

    `lent` are those of the tasks of one work, by the server's name.
    """

    def __init__(self, ground: Ground, plan: Plan, say: Callable[[str], None]) -> None:
        self._ground = ground
        self._plan = plan
        self._say = say
        self._exports: dict[tuple[str, State], Export] = {}
        self._lent: dict[str, Export] = {}
        self._profile: Counter[str] | None = None  # of the cell that is profiled just now
        self._tree = tree.Tree(ground.directory, plan.debian)
        self.verdicts: list[Verdict] = []

    def run(self, todo: Sequence[Cell]) -> None:
        for work in dict.fromkeys(cell.work for cell in todo):
            self._measure(work, [cell for cell in todo if cell.work is work])
        self._verify(todo)

    def _measure(self, work: Work, todo: Sequence[Cell]) -> None:
        """All rounds of one work, close in time for all servers; more of them where they leave a row unsure."""
        ready = [cell for cell in todo if cell.measurable and self._prepare(cell)]
        for number in range(self._plan.most):
            if number >= self._plan.rounds:
                unsure = in_question(todo)
                # Who has left stays out, as rounds are compared by their numbers.
                ready = [cell for cell in ready if cell in unsure]
            # In another order each time: who was before leaves memory and disk as they are.
            for cell in random.Random(number).sample(ready, len(ready)):
                if cell.measurable:
                    self._say(f"{self._plan.title(work)}: round {number + 1}, {cell.server.name}")
                    with _kept_in(cell):
                        cell.samples.append(self._undisturbed(cell, number))
        if self._plan.perf:
            for cell in (cell for cell in todo if cell.samples and cell.measurable):
                self._say(f"{self._plan.title(work)}: {cell.server.name} under perf")
                self._profile = cell.profile
                with _kept_in(cell):
                    self._round(cell, self._plan.most)
                self._profile = None
        while self._lent:
            self._lent.popitem()[1].close()

    def _prepare(self, cell: Cell) -> bool:
        self._say(f"{self._plan.title(cell.work)}: preparing {cell.server.name}, {cell.state.value}")
        load = cell.work.job
        with _kept_in(cell):
            if isinstance(load, Load) and not load.bounded:
                export = self._lasting_export(cell)
                if self._plan.warm_up and not load.cold:
                    _read_all(export)
                    fio.measure(export.uri, load, self._plan.size, _WARM_UP, None, seed=0)
        return cell.measurable

    def _lasting_export(self, cell: Cell) -> Export:
        key = cell.server.name, cell.state
        if key not in self._exports:
            self._exports[key] = cell.server.open(cell.state, self._ground)
        return self._exports[key]

    def _undisturbed(self, cell: Cell, number: int) -> Sample:
        """A round, or the least disturbed of a few where the hypervisor gives the processors to others."""
        tries: list[tuple[float, Sample]] = []
        while True:
            before, began = psutil.cpu_times().steal, time.monotonic()
            sample = self._round(cell, number)
            passed = (time.monotonic() - began) * (os.cpu_count() or 1)
            tries.append(((psutil.cpu_times().steal - before) / passed, sample))
            if tries[-1][0] <= STOLEN or len(tries) >= self._plan.tries:
                return min(tries, key=lambda each: each[0])[1]
            cell.again += 1

    def _round(self, cell: Cell, number: int) -> Sample:
        load = cell.work.job
        if isinstance(load, Task):
            return self._task(cell, load)
        if load.bounded:
            return self._first_writes(cell, load, number)
        export = self._lasting_export(cell)
        if load.cold:
            cold.drop(export)
        sample = self._run(export, load, None, number + 1)
        if load.writes:  # the next to be measured shall not pay for this one's dirty pages
            with export.client() as client:
                client.flush()
        return sample

    def _first_writes(self, cell: Cell, load: Load, number: int) -> Sample:
        """As many fresh images as the time holds, their making included. The last one's bytes are counted."""
        requests = max(1, self._plan.size // FIRST_WRITE_SHARE)
        samples: list[Sample] = []
        deadline = time.monotonic() + self._plan.seconds
        last = False
        while not last:
            export = cell.server.open(cell.state, self._ground)
            try:
                samples.append(self._run(export, load, requests, number + 1))
                measured = sum(sample.seconds for sample in samples)
                last = measured >= self._plan.seconds or time.monotonic() >= deadline
                if last and number + 1 == self._plan.rounds and cell.server.keeps(cell.state):
                    _check_first_writes(export, requests)
            finally:
                export.close()
        return reduce(Sample.__add__, samples)

    def _run(self, export: Export, load: Load, requests: int | None, seed: int) -> Sample:
        before = cpu_seconds(export.pid)
        with self._watched(export):
            job = fio.measure(export.uri, load, self._plan.size, self._plan.seconds, requests, seed)
        time.sleep(_CHILD_ENDS)
        cpu = cpu_seconds(export.pid) - before
        return Sample(job.requests, job.seconds, cpu, job.p99, job.busy)

    def _task(self, cell: Cell, task: Task) -> Sample:
        """On a fresh image, or on one that lasts through the rounds of its work; what it did is checked."""
        job = self._tasks()[task]
        export = self._lent.get(cell.server.name) or self._lend(cell, job)
        try:
            with job.prepared(export) as go:
                before, began = cpu_seconds(export.pid), time.monotonic()
                with self._watched(export):
                    amount = go()
                seconds = time.monotonic() - began
                time.sleep(_CHILD_ENDS)
                return Sample(amount, seconds, cpu_seconds(export.pid) - before)
        finally:
            if job.setup is None:
                self._lent.pop(cell.server.name).close()

    def _watched(self, export: Export) -> AbstractContextManager[None]:
        return nullcontext() if self._profile is None else profile.recording(export.pid, self._profile)

    def _lend(self, cell: Cell, job: _Job) -> Export:
        export = cell.server.open(cell.state, self._ground.sized(job.size))
        try:
            if job.setup is not None:
                job.setup(export)
        except BaseException:
            export.close()
            raise
        self._lent[cell.server.name] = export
        return export

    def _tasks(self) -> dict[Task, _Job]:
        root, plan = self._tree, self._plan
        return {
            Task.COPY_IN: _Job(root.size, None, root.copy_in),
            Task.COPY_OUT: _Job(root.size, root.put_in, root.copy_out),
            Task.UNPACK: _Job(root.size, None, root.unpack),
            Task.TRIM: _Job(plan.trimmed, None, ranges.trim),
            Task.MAP: _Job(plan.fragmented, ranges.fragment, ranges.block_status),
        }

    def _verify(self, done: Sequence[Cell]) -> None:
        """Reads back what was measured, then writes and reads under load with checksums, then the parents."""
        by_fio = [cell for cell in done if cell.samples and isinstance(cell.work.job, Load)]
        for cell in {(cell.server.name, cell.state): cell for cell in by_fio}.values():
            self._verify_image(cell)
        for server in {cell.server.name: cell.server for cell in done if cell.samples}.values():
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


def _read_all(export: Export) -> None:
    """Warm is what was read before: the data, and what a server remembers of where it lies."""
    with export.client() as client:
        for offset in range(0, client.size, MiB):
            client.read(offset, min(MiB, client.size - offset))


def _check_blocks(export: Export, state: State) -> None:
    """Of the images that stay open, fio's measured writes went to the full ones alone."""
    check = images.check if state.is_full else images.check_kept
    with export.client() as client:
        check(client, export.generations)


def _check_first_writes(export: Export, requests: int) -> None:
    """Each write is there, and nothing else changed."""
    with export.client() as client:
        written = images.check(client, export.generations)
    if written != requests:
        raise BenchError(f"{requests} blocks were written, {written} are there")
