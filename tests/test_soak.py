"""Long runs: mixed work at the highest rate on a small pool, and nothing grows with it.

Two hours of ordinary work are a minute of this one; NBDTHIN_LONG=1 makes it twenty. A figure that is not flat is a
leak: figures of the second third of the run are held against those of the last.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import nbdthin
from nbdthin.control.commands import Daemon as Commanded
from nbdthin.control.server import ControlServer
from nbdthin.host import own_memory
from nbdthin.lag import Lag
from nbdthin.pool import check
from nbdthin.pool.live import IO_THREADS, MERGE_MOST, LivePool
from nbdthin.pool.pool import Batch, Pool
from nbdthin.units import KiB, MiB
from tests.clients.daemon import Daemon
from tests.rawclient import CACHE, FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES, Client, Serving

SECONDS = 1200.0 if os.environ.get("NBDTHIN_LONG") else 30.0  # for each of the two runs
SAMPLE = 0.25  # seconds between two looks at the figures
WORKERS = 3
ISLANDS, ISLAND, APART = 48, 512 * KiB, 32 * MiB  # what is written of a volume: a leaf of the mapping each
VOLUME = ISLANDS * APART
MOST = 8  # snapshots, and as many clones
REQUESTS = 300  # of a connection, before a new one
THREADS = IO_THREADS + 2 + 8  # the executors of a live pool, and those of whoever else is in the process
POOL = 1024 * MiB  # room for all of them with nothing shared: nobody meets a full pool here

pytestmark = pytest.mark.slow


def fill(path: Path, name: str) -> None:
    """Write all that will be written, so that what grows later does so for another reason."""
    with contextlib.closing(Client(path, name)) as client:
        for island in range(ISLANDS):
            assert client.write(island * APART, bytes([island + 1]) * ISLAND) == 0


def work(path: Path, name: str, seed: int, enough: threading.Event) -> int:
    """One client after the other, each with many requests. Returns how many were answered."""
    choice = random.Random(seed)
    answered = 0
    while not enough.is_set():
        client = Client(path, name, structured=choice.random() < 0.5)
        with contextlib.closing(client):
            for _ in range(REQUESTS // 10):
                messages = b"".join(_request(client, choice) for _ in range(10))
                client.sock.sendall(messages)
                done = 0
                while done < 10:
                    chunk = client.reply()
                    assert chunk.error == 0, chunk
                    done += chunk.done
                answered += done
    return answered


def _request(client: Client, choice: random.Random) -> bytes:
    commands, weights = (WRITE, READ, TRIM, WRITE_ZEROES, FLUSH, CACHE), (50, 20, 10, 10, 8, 2)
    command = choice.choices(commands, weights)[0]
    if command == FLUSH:
        return client.request(command, 0, 0)[1]
    length = choice.choice((512, 4 * KiB, 20 * KiB, 64 * KiB, 300 * KiB))
    offset = choice.randrange(ISLANDS) * APART + choice.randrange(0, ISLAND - length, 512)
    payload = choice.randbytes(16) * (length // 16) if command == WRITE else b""
    flags = choice.choice((0, FUA)) if command != READ and choice.random() < 0.1 else 0
    if command == WRITE_ZEROES and choice.random() < 0.3:
        flags |= NO_HOLE
    return client.request(command, offset, length, payload, flags)[1]


class Commander:
    """Asks for everything that can be asked, one command after the other."""

    def __init__(self, control: Path, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._control = control
        self._random = random.Random(seed)
        self._images: list[str] = []
        self._clones: list[str] = []
        self._number = 0

    def work(self, enough: threading.Event) -> None:
        while not enough.is_set():
            with nbdthin.connect(self._control) as pool:
                for _ in range(50):
                    self._one(pool)

    def _one(self, pool: nbdthin.Client) -> None:
        self._number += 1
        choice = self._random
        match choice.randrange(8):
            case 0 | 1 if len(self._images) < MOST:
                name = f"image{self._number}"
                pool.snapshot(choice.choice([*(f"w{each}" for each in range(WORKERS)), *self._clones]), name)
                self._images.append(name)
                self.done["snapshot"] += 1
            case 2 if self._images and len(self._clones) < MOST:
                name = f"clone{self._number}"
                pool.clone(choice.choice(self._images), name)
                self._clones.append(name)
                self.done["clone"] += 1
            case 3 if self._images and self._clones:
                pool.rollback(choice.choice(self._clones), choice.choice(self._images))
                self.done["rollback"] += 1
            case 4 if self._clones:
                pool.resize(choice.choice(self._clones), choice.randrange(MiB, VOLUME, 512))
                self.done["resize"] += 1
            case 5 if self._clones:
                pool.label(choice.choice(self._clones), {"number": str(self._number)})
                self.done["label"] += 1
            case 6 if self._images:
                pool.remove(self._images.pop(choice.randrange(len(self._images))))
                self.done["remove"] += 1
            case 7 if self._clones:
                pool.remove(self._clones.pop(choice.randrange(len(self._clones))))
                self.done["remove"] += 1
            case _:
                pool.list()
                self.done["list"] += 1


@dataclass(frozen=True)
class Figures:
    """At one moment."""

    memory: int  # bytes resident
    files: int  # descriptors
    threads: int
    metadata: int  # bytes of journal and checkpoints on disk
    journal: int  # bytes since the last checkpoint
    sequence: int
    nameless: int  # layers that wait to be merged, or cannot be
    tasks: int = 0


def run(path: Path, control: Path, look: Callable[[], Figures]) -> list[Figures]:
    """All of the work for SECONDS, looked at again and again."""
    seed = int(os.environ.get("NBDTHIN_SEED", random.randrange(1 << 32)))
    print(f"NBDTHIN_SEED={seed}")
    with nbdthin.connect(control) as pool:
        for number in range(WORKERS):
            pool.create(f"w{number}", VOLUME)
            fill(path, f"w{number}")
    enough = threading.Event()
    commander = Commander(control, seed)
    figures = []
    with ThreadPoolExecutor() as threads:
        working = [threads.submit(work, path, f"w{number}", seed + number, enough) for number in range(WORKERS)]
        commanding = threads.submit(commander.work, enough)
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and not commanding.done() and not any(each.done() for each in working):
                figures.append(look())
                time.sleep(SAMPLE)
        finally:
            enough.set()
    commanding.result()
    print(f"requests: {sum(each.result() for each in working)}; commands: {dict(commander.done)}")
    return figures


def hold_flat(figures: list[Figures]) -> None:
    """Nothing has grown with the work. Two thirds after a warm-up are compared; no bound depends on how long it ran."""
    third = len(figures) // 3
    before, after = figures[third : 2 * third], figures[2 * third :]
    for what in ("memory", "files", "threads", "metadata", "nameless", "tasks"):
        print(f"{what}: {_mean(before, what):.0f}, then {_mean(after, what):.0f}")
    print(f"commits: {after[-1].sequence}")
    assert after[-1].sequence > before[0].sequence + 100, "there was work"
    print(f"checkpoints seen: {sum(b.journal < a.journal for a, b in itertools.pairwise(figures))}")
    for what, slack in (("files", 4), ("tasks", 8)):
        assert _mean(after, what) <= _mean(before, what) + slack, what
    assert max(each.threads for each in after) <= THREADS, "executors grow to their bounds and no further"
    # Two checkpoints while one is written, the journal between them, and segments of which one may be empty.
    assert max(each.metadata for each in after) < 40 * MiB
    assert _mean(after, "memory") < 1.05 * _mean(before, "memory") + 2 * MiB
    assert _mean(after, "nameless") <= _mean(before, "nameless") + 8, "merging keeps up"
    assert max(each.nameless for each in after) <= MERGE_MOST + 2 * MOST, "or commands wait for it"


def _mean(figures: list[Figures], what: str) -> float:
    return statistics.fmean(getattr(each, what) for each in figures)


def test_a_daemon_stays_as_it_is_however_much_it_does(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, size=POOL)
    with contextlib.closing(daemon):
        daemon.start()
        process = psutil.Process(daemon.pid)
        with daemon.connect() as pool:

            def look() -> Figures:
                info = pool.info().pool
                return Figures(
                    memory=own_memory(process),
                    files=process.num_fds(),
                    threads=process.num_threads(),
                    metadata=info.metadata_used,
                    journal=info.journal,
                    sequence=info.sequence,
                    nameless=info.layers - info.volumes - info.snapshots,
                )

            figures = run(daemon.socket, daemon.control, look)
        hold_flat(figures)


# -- the same in this process, where one can look inside


class AskedPool(LivePool):
    """At each checkpoint the free map must be the one that the entries give, while all writers wait."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.checkpoints = 0
        self.problems: list[str] = []

    async def _checkpoint(self, batch: Batch) -> None:
        await super()._checkpoint(batch)
        async with self._structure, AsyncExitStack() as gates:
            for name in list(self.pool._volumes):  # others may be asked for meanwhile
                await gates.enter_async_context(self.open(name).gated())
            self.checkpoints += 1
            self.problems.extend(check._space(self.pool))


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr("nbdthin.pool.pool.CHECKPOINT_JOURNAL", 512 * KiB)
    Pool.init(tmp_path / "pool", size=POOL)
    with Serving(tmp_path / "pool", tmp_path / "nbd.sock", live=AskedPool) as serving:
        yield serving


async def _serve_control(serving: Serving, path: Path) -> ControlServer:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    control = ControlServer(Commanded(serving.live, serving.server, (), path, Lag()))
    await control.listen(listening)
    return control


def test_the_free_map_is_that_of_the_entries_at_every_checkpoint(serving: Serving, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    control = serving.run(_serve_control(serving, path))
    live = serving.live
    assert isinstance(live, AskedPool)
    process = psutil.Process()

    async def look() -> Figures:
        state, journal = live.pool.state, live.pool.journal
        return Figures(
            memory=own_memory(process),
            files=process.num_fds(),
            threads=process.num_threads(),
            metadata=journal.disk_bytes,
            journal=journal.bytes_since_checkpoint,
            sequence=journal.sequence,
            nameless=sum(layer.name is None for layer in state.layers.values()),
            tasks=len(asyncio.all_tasks()),
        )

    figures = run(serving.socket, path, lambda: serving.run(look()))
    serving.run(control.close(5))
    assert live.problems == []
    print(f"checkpoints: {live.checkpoints}")
    assert live.checkpoints > 1
    hold_flat(figures)
