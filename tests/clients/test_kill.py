"""kill -9 under load, again and again: nothing that was promised is lost, nothing that was answered has not happened.

In each round fio verifies what it writes, clients of our own write, trim and flush with an oracle beside them, and
someone takes snapshots, clones them and removes both, until the daemon is killed at a random moment, now and then also
while it starts. Then everything that was answered is there, even if nobody flushed it: see pool/unsynced.py. In half of
the rounds those files are taken away, and everything that was flushed is there.

NBDTHIN_SEED=N replays the random choices; when exactly the kill comes is the machine's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import nbdthin
from nbdthin.pool.check import check_path
from nbdthin.units import MiB
from tests import rawclient
from tests.clients import oracle
from tests.clients.daemon import Daemon, run
from tests.clients.oracle import Allowed, Numbers, Volume
from tests.conftest import need

KILLS = 50
LOAD_SECONDS = 0.8  # of a round, at most
DEPTH = 16  # requests that a client sends at once
WRITERS = 4
MOST_IMAGES = 6
MOST_CLONES = 3
FIO_SIZE = 8 * MiB

pytestmark = pytest.mark.slow

FIO = ("--ioengine=nbd", "--thread", "--verify=crc32c", "--randrepeat=0")
LOAD = (
    *("--rw=randrw", "--bsrange=4k-64k", "--iodepth=8", "--numjobs=2", "--offset_increment=4m", "--size=4m"),
    *("--verify_backlog=16", "--verify_fatal=1", "--fsync=32", "--time_based", "--runtime=600"),
)
STABLE = ("--name=stable", "--rw=randwrite", "--bs=4k", "--size=4m", "--iodepth=16", "--randseed=7")


def read_islands(path: Path, name: str) -> bytes:
    """What the oracle looks at of a volume."""
    return _read(path, name, [(island * oracle.APART, oracle.ISLAND) for island in range(oracle.ISLANDS)])


def read_start(path: Path, name: str) -> bytes:
    """What fio uses of a volume."""
    return _read(path, name, [(offset, MiB) for offset in range(0, FIO_SIZE, MiB)])


def _read(path: Path, name: str, ranges: list[tuple[int, int]]) -> bytes:
    replies = {}
    with contextlib.closing(rawclient.Client(path, name)) as client:
        cookies = [client.send(rawclient.READ, offset, length) for offset, length in ranges]
        for _ in cookies:
            chunk = client.reply()
            assert chunk.error == 0
            replies[chunk.cookie] = chunk.payload
    return b"".join(replies[cookie] for cookie in cookies)


class Writer:
    """A client that writes, trims, zeroes and flushes until the daemon is gone, and tells the oracle."""

    def __init__(self, path: Path, name: str, volume: Volume, seed: int) -> None:
        self.done: Counter[int] = Counter()  # requests that were answered, by command
        self._path = path
        self._name = name
        self._volume = volume
        self._random = random.Random(seed)
        self._waiting: dict[int, Callable[[], None]] = {}

    def work(self) -> None:
        with (
            contextlib.suppress(EOFError, OSError),
            contextlib.closing(rawclient.Client(self._path, self._name)) as client,
        ):
            while True:
                client.sock.sendall(b"".join(filter(None, (self._next(client) for _ in range(DEPTH)))))
                while self._waiting:
                    chunk = client.reply()
                    assert chunk.error == 0
                    self._waiting.pop(chunk.cookie)()

    def _next(self, client: rawclient.Client) -> bytes | None:
        """A request; None where another client is at work."""
        command = self._random.choices(
            (rawclient.WRITE, rawclient.WRITE_ZEROES, rawclient.TRIM, rawclient.FLUSH), (70, 10, 5, 15)
        )[0]
        if command == rawclient.FLUSH:
            cookie, message = client.request(command, 0, 0)
            answers = self._volume.answers()
            self._waiting[cookie] = lambda: self._flushed(answers)
            return message
        first, count = self._place(whole=command == rawclient.TRIM)
        number = self._volume.claim(first, count, command != rawclient.WRITE)
        if number is None:
            return None
        flags = rawclient.FUA if self._random.random() < 0.05 else 0
        durable = bool(flags)
        if command == rawclient.WRITE_ZEROES and self._random.random() < 0.3:
            flags |= rawclient.NO_HOLE
        data = oracle.payload(number, first, count) if command == rawclient.WRITE else b""
        offset, length = oracle.offset_of(first), count * oracle.SECTOR
        cookie, message = client.request(command, offset, length, data, flags)
        self._waiting[cookie] = lambda: self._written(command, first, count, number, durable)
        return message

    def _place(self, whole: bool) -> tuple[int, int]:
        """Some sectors of an island; whole subblocks, which alone a TRIM is bound to clear."""
        unit = 8 if whole else 1
        island = self._random.randrange(oracle.ISLANDS)
        count = self._random.randint(1, 24 // unit) * unit
        start = self._random.randrange(0, oracle.PER_ISLAND - count + 1, unit)
        return island * oracle.PER_ISLAND + start, count

    def _written(self, command: int, first: int, count: int, number: int, durable: bool) -> None:
        self._volume.done(first, count, number, durable)
        self.done[command] += 1

    def _flushed(self, answers: Numbers) -> None:
        self._volume.flushed(answers)
        self.done[rawclient.FLUSH] += 1


@dataclass
class Image:
    """A snapshot. Of fio's volumes nobody knows more than that they do not change any more."""

    read: Callable[[Path, str], bytes]
    allowed: Allowed | None = None
    digest: str = ""  # of its bytes, once they have been read
    found: Numbers | None = None  # what is in them, of the oracle's

    def look(self, path: Path, name: str) -> None:
        """Hold it to what it may be, and from then on to what it was."""
        data = self.read(path, name)
        digest = hashlib.sha256(data).hexdigest()
        if not self.digest:
            if self.allowed is not None:
                self.found = self.allowed.check(data)
            self.digest = digest
        assert digest == self.digest, f"snapshot {name} has changed"


class Keeper:
    """Takes snapshots, clones and removes, one command after the other, and knows what must exist."""

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self.volumes: dict[str, Volume] = {}
        self.fio = ["fio0", "fio1"]
        self.images: dict[str, Image] = {}
        self.busy: set[str] = set()  # volumes with clients
        self.done: Counter[str] = Counter()  # commands that were answered
        self._daemon = daemon
        self._random = random.Random(seed)
        self._number = 0
        # What settles the command that was not answered: called with whether its name exists.
        self._doubt: tuple[str, Callable[[bool], None]] | None = None

    def work(self) -> None:
        with contextlib.suppress(nbdthin.Unreachable, EOFError, OSError), self._daemon.connect() as control:
            while True:
                self._random.choices((self._snapshot, self._clone, self._remove), (4, 3, 3))[0](control)

    def _name(self, kind: str) -> str:
        self._number += 1
        return f"{kind}{self._number}"

    def _snapshot(self, control: nbdthin.Client) -> None:
        if len(self.images) >= MOST_IMAGES:
            return
        origin = self._random.choice([*self.volumes, *self.fio])
        name = self._name("image")
        volume = self.volumes.get(origin)
        least = volume.answers() if volume else np.empty(0, dtype=np.int64)

        def settle(exists: bool) -> None:
            if exists and volume:
                self.images[name] = Image(read_islands, volume.allowed(least))
            elif exists:
                self.images[name] = Image(read_start)

        self._doubt = name, settle
        control.snapshot(origin, name)
        self._answered("snapshot", True)
        if self._random.random() < 0.5:
            self.images[name].look(self._daemon.socket, name)

    def _clone(self, control: nbdthin.Client) -> None:
        known = [name for name, image in self.images.items() if image.found is not None]
        if not known or len(self.volumes) >= 2 + MOST_CLONES:
            return
        image, name = self._random.choice(known), self._name("clone")

        def settle(exists: bool) -> None:
            if exists:
                self.volumes[name] = Volume(self.images[image].found)

        self._doubt = name, settle
        control.clone(image, name)
        self._answered("clone", True)

    def _remove(self, control: nbdthin.Client) -> None:
        clones = [name for name in self.volumes if name.startswith("clone") and name not in self.busy]
        if not clones and not self.images:
            return
        name = self._random.choice([*self.images, *clones])

        def settle(exists: bool) -> None:
            if not exists:
                self.images.pop(name, None)
                self.volumes.pop(name, None)

        self._doubt = name, settle
        control.remove(name)
        self._answered("remove", False)

    def _answered(self, what: str, exists: bool) -> None:
        assert self._doubt is not None
        self._doubt[1](exists)
        self._doubt = None
        self.done[what] += 1

    def look(self, killed_only: bool) -> None:
        """After a restart: everything that must be there is, and holds what it may."""
        with self._daemon.connect() as control:
            names = {row.name for row in control.list()}
        if self._doubt is not None:
            self._doubt[1](self._doubt[0] in names)
            self._doubt = None
        assert names == {*self.volumes, *self.images, *self.fio, "stable"}
        for name, image in self.images.items():
            image.look(self._daemon.socket, name)
        for name, volume in self.volumes.items():
            allowed = volume.allowed(volume.answered if killed_only else volume.durable)
            volume.settle(allowed.check(read_islands(self._daemon.socket, name)))


class Load:
    """What runs when the daemon is killed."""

    def __init__(self, daemon: Daemon, keeper: Keeper, seed: int, directory: Path) -> None:
        choice = random.Random(seed)
        names = [*("w0", "w1"), *choice.choices(sorted(keeper.volumes), k=WRITERS - 2)]
        keeper.busy = set(names)
        self.writers = [Writer(daemon.socket, name, keeper.volumes[name], choice.getrandbits(32)) for name in names]
        jobs = [part for name in keeper.fio for part in (f"--name={name}", f"--uri={daemon.uri(name)}", *LOAD)]
        self._threads = ThreadPoolExecutor()
        self._working = [self._threads.submit(work) for work in (keeper.work, *(each.work for each in self.writers))]
        self._fio = subprocess.Popen(
            [need("fio"), *FIO, *jobs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=directory
        )

    def end(self) -> int:
        """The daemon is gone. Returns how many writes of fio were answered; all but a few were read again."""
        said, _ = self._fio.communicate()
        self._threads.shutdown()
        for each in self._working:
            each.result()
        assert not re.search(r"verify failed|bad (magic|header)|verify: ", said), said
        return sum(map(int, re.findall(r"issued rwts: total=\d+,(\d+)", said)))


def forget_the_unsynced(pool: Path) -> None:
    for path in (pool / "journal").glob("unsynced.*"):
        path.unlink()


def kill_while_it_starts(daemon: Daemon, seconds: float) -> None:
    daemon.launch()
    time.sleep(seconds)
    daemon.kill()


def test_fifty_kills_under_load_lose_nothing_that_was_promised(daemon: Daemon, tmp_path: Path) -> None:
    seed = int(os.environ.get("NBDTHIN_SEED", random.randrange(1 << 32)))
    print(f"NBDTHIN_SEED={seed}")
    choice = random.Random(seed)
    stable = daemon.create("stable", "16 MiB")
    run(need("fio"), *FIO, *STABLE, f"--uri={stable}", "--do_verify=0", "--end_fsync=1", cwd=tmp_path)
    keeper = Keeper(daemon, choice.getrandbits(32))
    for name in ("w0", "w1"):
        daemon.create(name, oracle.SIZE)
        keeper.volumes[name] = Volume()
    for name in keeper.fio:
        daemon.create(name, FIO_SIZE)
    starts: list[float] = []
    answered: Counter[int] = Counter()
    verified = 0
    for number in range(KILLS):
        load = Load(daemon, keeper, choice.getrandbits(32), tmp_path)
        time.sleep(choice.uniform(0, LOAD_SECONDS))  # the random moment
        daemon.kill()
        verified += load.end()
        killed_only = choice.random() < 0.5
        if not killed_only:
            forget_the_unsynced(daemon.pool)
        answered.update(sum((writer.done for writer in load.writers), Counter()))
        if choice.random() < 0.2:
            kill_while_it_starts(daemon, choice.uniform(0, 2 * statistics.mean(starts or [0.3])))
        if choice.random() < 0.2:
            report = check_path(daemon.pool)
            assert not report.problems, (number, report.problems)
        before = time.monotonic()
        daemon.start()
        starts.append(time.monotonic() - before)
        keeper.look(killed_only)
        if number % 10 == 9:
            run("fio", *FIO, *STABLE, f"--uri={stable}", "--verify_only=1", cwd=tmp_path)
    print(f"restarts: median {statistics.median(starts):.2f} s, longest {max(starts):.2f} s")
    print(f"answered: {dict(answered)}, {dict(keeper.done)}; {verified} writes of fio")
    assert min(answered[command] for command in (1, 3, 4, 6)) > KILLS, "there was load"
    assert min(keeper.done[what] for what in ("snapshot", "clone", "remove")) > KILLS / 2
    assert verified > 100 * KILLS
