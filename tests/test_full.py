"""A full pool over the protocol: who waits, who is refused, what goes on meanwhile, and what ends the waiting."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import nbdthin
from nbdthin.config import ExportRule
from nbdthin.pool import livevolume as volume_module
from nbdthin.pool.commands import (
    Clone,
    Command,
    Create,
    Extend,
    Quota,
    Remove,
    Rename,
    Reserve,
    Resize,
    Rollback,
    Snapshot,
)
from nbdthin.pool.events import Event, Listener
from nbdthin.pool.live import LivePool
from nbdthin.pool.policy import ERROR, QUEUE, Policy
from nbdthin.pool.pool import Pool
from tests.clients.daemon import Daemon
from tests.conftest import Ballast, need_root
from tests.pool.conftest import Faults
from tests.rawclient import EIO, ENOSPC, FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES, Client, Serving

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 16 * KIB
BLOCKS = 63
WAITING = Policy(no_space=QUEUE, min_free=0, auto_extend=False)
BRIEF = Policy(no_space=QUEUE, no_space_timeout=0.2, min_free=0, auto_extend=False)


class Full(Serving):
    """A served pool, and what tests ask of it."""

    def do(self, *commands: Command) -> None:
        self.run(self.live.execute(commands))

    def connect(self, name: str) -> Client:
        return Client(self.socket, name)

    def until(self, what: Callable[[LivePool], bool]) -> None:
        """Return when `what` is so."""

        async def wait() -> None:
            while not what(self.live):  # noqa: ASYNC110 - nothing tells of all that is asked here
                await asyncio.sleep(0.001)

        self.run(wait())

    def until_waiting(self, count: int) -> None:
        self.until(lambda live: live.waiting == count)

    def listen(self) -> list[Event]:
        """Events from now on, as they come."""
        heard: list[Event] = []

        async def collect(listener: Listener) -> None:
            async for event in listener:
                heard.append(event)

        async def begin() -> None:
            self._listening = asyncio.create_task(collect(self.live.events.listen()))

        self.run(begin())
        return heard

    def sizes(self) -> tuple[int, int]:
        """Blocks in use and free."""
        space = self.live.pool.allocator
        return space.used, space.free


@contextmanager
def serving(
    directory: Path,
    policy: Policy = WAITING,
    rules: tuple[ExportRule, ...] = (),
    *,
    size: int = (BLOCKS + 1) * BLOCK,
) -> Iterator[Full]:
    if not (directory / "pool").exists():
        Pool.init(directory / "pool", size=size, block_size=BLOCK)
    with Full(directory / "pool", directory / "nbd.sock", rules, policy) as full:
        yield full


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Full]:
    """`big` has all 63 blocks, `small` has none; who finds no space waits."""
    with serving(tmp_path) as full:
        fill(full)
        yield full


def fill(full: Full) -> None:
    full.do(Create("big", 2 * MIB), Create("small", 2 * MIB))
    client = full.connect("big")
    assert client.write(0, bytes([7]) * (BLOCKS * BLOCK)) == 0
    assert client.call(FLUSH, 0, 0) == 0
    client.close()
    assert full.sizes() == (BLOCKS, 0)


# -- what ends the waiting


def delete(full: Full) -> None:
    full.do(Remove("big"))


def trim(full: Full) -> None:
    client = full.connect("big")
    assert client.call(TRIM, 0, 4 * BLOCK) == 0
    client.close()


def extend(full: Full) -> None:
    full.do(Extend(80 * BLOCK))


def shrink(full: Full) -> None:
    full.do(Resize("big", MIB // 2))


def roll_back(full: Full) -> None:
    full.do(Rollback("big", "empty"))


@pytest.mark.parametrize("relief", [delete, trim, extend, shrink, roll_back])
def test_a_write_that_waits_goes_on_when_there_is_space(tmp_path: Path, relief: Callable[[Full], None]) -> None:
    with serving(tmp_path) as full:
        full.do(Create("big", 2 * MIB), Snapshot("big", "empty"), Remove("big"), Clone("empty", "big", 2 * MIB))
        full.do(Create("small", 2 * MIB))
        client = full.connect("big")
        assert client.write(0, bytes([7]) * (BLOCKS * BLOCK)) == 0
        client.close()
        client = full.connect("small")
        cookie = client.send(WRITE, 0, 3 * BLOCK, bytes([1]) * (3 * BLOCK))
        full.until_waiting(1)
        full.run(full.server.disconnect("big"))
        relief(full)
        reply = client.reply()
        assert (reply.cookie, reply.error) == (cookie, 0)
        assert client.read(0, 3 * BLOCK) == bytes([1]) * (3 * BLOCK)
        client.close()


def test_a_lower_reservation_lets_others_go_on(tmp_path: Path) -> None:
    with serving(tmp_path) as full:
        full.do(Create("v", 2 * MIB), Create("w", 2 * MIB), Reserve("v", BLOCKS * BLOCK))
        client = full.connect("w")
        client.send(WRITE, 0, BLOCK, bytes([1]) * BLOCK)
        full.until_waiting(1)
        full.do(Reserve("v", None))
        assert client.reply().error == 0
        client.close()


def test_a_pool_that_grows_by_policy_keeps_nobody_waiting(tmp_path: Path) -> None:
    with serving(tmp_path, Policy(min_free=0)) as full:
        full.do(Create("v", 64 * MIB))
        heard = full.listen()
        client = full.connect("v")
        assert client.write(0, bytes([7]) * 8 * MIB) == 0
        assert client.call(WRITE_ZEROES, 16 * MIB, 8 * MIB, flags=NO_HOLE) == 0
        assert client.call(FLUSH, 0, 0) == 0
        assert full.live.pool.size > 16 * MIB
        assert {event.kind for event in heard} == {"extended"}
        client.close()
    with serving(tmp_path) as full:
        client = full.connect("v")
        assert client.read(0, 8 * MIB) == bytes([7]) * 8 * MIB
        client.close()


# -- what goes on meanwhile


def test_everything_that_needs_no_space_goes_on_beside_a_write_that_waits(full: Full) -> None:
    client, other = full.connect("big"), full.connect("small")
    full.do(Snapshot("big", "s"), Remove("s"))
    waits = other.send(WRITE, 0, BLOCK, b"a" * BLOCK)
    full.until_waiting(1)
    assert other.read(0, 2 * BLOCK) == bytes(2 * BLOCK)
    assert other.call(FLUSH, 0, 0) == 0
    assert other.call(TRIM, MIB, MIB) == 0
    assert other.call(WRITE_ZEROES, MIB, MIB) == 0
    assert client.write(0, b"b" * BLOCK, FUA) == 0
    assert client.read(0, BLOCK) == b"b" * BLOCK
    full.do(Snapshot("small", "small@1"), Snapshot("big", "big@1"), Rename("small@1", "x"), Remove("x"))
    again = other.send(WRITE, 0, BLOCK, b"c" * BLOCK)
    full.until_waiting(2)
    full.do(Remove("big@1"))
    assert client.call(TRIM, 4 * BLOCK, BLOCK) == 0
    assert {other.reply().cookie, other.reply().cookie} == {waits, again}
    assert other.read(0, BLOCK) in (b"a" * BLOCK, b"c" * BLOCK)
    client.close()
    other.close()


def test_however_much_waits_the_same_connection_can_make_the_space(full: Full) -> None:
    full.do(Resize("big", 40 * MIB))
    client = full.connect("big")
    for _ in range(2):
        client.send(WRITE, 4 * MIB, 32 * MIB, bytes(32 * MIB))
    full.until_waiting(2)
    read = client.send(READ, 0, BLOCK)
    trimmed = client.send(TRIM, 0, BLOCK)
    client.lengths[read] = BLOCK
    replies = {reply.cookie: reply.error for reply in (client.reply(), client.reply())}
    assert replies == {read: 0, trimmed: 0}
    client.close()


def test_a_snapshot_passes_a_write_that_waits_and_does_not_hold_it(full: Full) -> None:
    other = full.connect("small")
    other.send(WRITE, 0, BLOCK, b"a" * BLOCK)
    full.until_waiting(1)
    full.do(Snapshot("small", "s"))
    trim(full)
    assert other.reply().error == 0
    snapshot = full.connect("s")
    assert snapshot.read(0, BLOCK) == bytes(BLOCK)
    assert other.read(0, BLOCK) == b"a" * BLOCK
    snapshot.close()
    other.close()


@pytest.mark.parametrize("length", [MIB, 2 * MIB])
def test_provisioning_waits_for_all_that_it_needs_and_takes_nothing_before(full: Full, length: int) -> None:
    other = full.connect("small")
    other.send(WRITE_ZEROES, 0, 40 * BLOCK, flags=NO_HOLE)
    full.until_waiting(1)
    client = full.connect("big")
    assert client.call(TRIM, 0, 20 * BLOCK, flags=FUA) == 0
    full.until(lambda live: live.pool.allocator.pending == 0 and live.waiting == 1)
    assert full.sizes() == (BLOCKS - 20, 20)
    assert client.call(TRIM, 0, length, flags=FUA) == 0
    assert other.reply().error == 0
    assert full.live.pool.show("small").charged == 40 * BLOCK
    client.close()
    other.close()


# -- the end of patience


def test_after_the_timeout_it_is_refused_and_nothing_has_changed(tmp_path: Path) -> None:
    with serving(tmp_path, BRIEF) as full:
        fill(full)
        client = full.connect("small")
        assert client.write(5, b"x" * BLOCK) == ENOSPC
        assert client.call(WRITE_ZEROES, 0, BLOCK, flags=NO_HOLE) == ENOSPC
        assert client.read(0, 2 * BLOCK) == bytes(2 * BLOCK)
        assert full.live.waiting == 0
        client.close()


def test_each_export_has_its_own_policy(tmp_path: Path) -> None:
    rules = (ExportRule("small", no_space=ERROR), ExportRule("patient/*", no_space=QUEUE))
    with serving(tmp_path, WAITING, rules) as full:
        fill(full)
        full.do(Create("patient/1", MIB))
        small, patient = full.connect("small"), full.connect("patient/1")
        patient.send(WRITE, 0, BLOCK, b"p" * BLOCK)
        full.until_waiting(1)
        assert small.write(0, b"s" * BLOCK) == ENOSPC
        full.do(Remove("big"))
        assert patient.reply().error == 0
        assert small.write(0, b"s" * BLOCK) == 0
        small.close()
        patient.close()


def test_a_refusing_policy_still_waits_for_what_was_freed_already(tmp_path: Path) -> None:
    with serving(tmp_path, Policy(no_space=ERROR, min_free=0, auto_extend=False)) as full:
        fill(full)
        client, other = full.connect("big"), full.connect("small")
        for _ in range(5):
            assert client.call(TRIM, 0, BLOCK) == 0
            assert other.write(0, b"x" * BLOCK) == 0
            assert other.write(BLOCK, b"x" * BLOCK) == ENOSPC
            assert other.call(TRIM, 0, BLOCK) == 0
            assert client.write(0, b"x" * BLOCK) == 0
        client.close()
        other.close()


def test_a_stopping_server_waits_for_nobody_and_answers_the_others(full: Full) -> None:
    other = full.connect("small")
    other.send(WRITE, 0, BLOCK, b"a" * BLOCK)
    full.until_waiting(1)
    read = other.send(READ, 0, 4)
    other.lengths[read] = 4
    stopping = threading.Thread(target=full.stop)
    stopping.start()
    reply = other.reply()
    assert (reply.cookie, reply.error) == (read, 0)
    assert other.closed(), "the write got no answer, so that the client sends it again"
    other.close()
    stopping.join()


def test_a_client_that_goes_away_while_it_waits_leaves_nothing_behind(full: Full) -> None:
    other = full.connect("small")
    other.send(WRITE, 0, BLOCK, b"a" * BLOCK)
    full.until_waiting(1)
    other.close()
    trim(full)
    full.until_waiting(0)
    full.until(lambda live: not live.users("small"))


def test_removal_by_force_does_not_wait_for_a_write_that_waits(full: Full) -> None:
    other = full.connect("small")
    other.send(WRITE, 0, BLOCK, b"a" * BLOCK)
    full.until_waiting(1)
    full.run(full.server.disconnect("small"))
    assert full.live.waiting == 0
    full.do(Remove("small"))
    other.close()


def test_a_pool_that_fails_tells_those_who_wait(full: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = full.listen()
    client, other = full.connect("big"), full.connect("small")
    cookie = other.send(WRITE, 0, BLOCK, b"a" * BLOCK)
    full.until_waiting(1)
    Faults(monkeypatch, full.live.pool.data, "sync", errno.EIO)
    assert client.write(0, b"b" * BLOCK, FUA) == EIO
    reply = other.reply()
    assert (reply.cookie, reply.error) == (cookie, EIO)
    assert [event.kind for event in heard] == ["no_space", "failed"]
    client.close()
    other.close()


# -- limits, under writers at once


def test_a_quota_is_exact_under_writers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_module, "INLINE_WRITE", BLOCK)  # larger ones spend time in threads
    with serving(tmp_path, size=512 * BLOCK) as full:
        full.do(Create("v", 64 * MIB), Quota("v", 100 * BLOCK), Create("w", 64 * MIB), Reserve("w", 50 * BLOCK))
        clients = [full.connect("v") for _ in range(4)]
        for turn, done in enumerate((100, 99)):
            sent = 0
            for number in range(60):
                for index, client in enumerate(clients):
                    client.send(WRITE, (turn * 8 + index * 2) * MIB + number * 2 * BLOCK, 2 * BLOCK, bytes(2 * BLOCK))
                    sent += 1
            errors = [client.reply().error for client in clients for _ in range(60)]
            assert set(errors) == {0, ENOSPC}
            assert full.live.pool.show("v").charged in range((done - 1) * BLOCK, 100 * BLOCK + 1)
            full.do(Snapshot("v", "s")) if not turn else None
            assert clients[0].write(60 * MIB, b"x" * 2 * BLOCK) == ENOSPC
            full.do(Quota("v", 150 * BLOCK)) if not turn else None
            if not turn:
                assert clients[0].write(60 * MIB, b"x" * 50 * BLOCK) == 0
                full.do(Remove("s"), Quota("v", 100 * BLOCK))
                assert clients[0].call(TRIM, 0, 64 * MIB, flags=FUA) == 0
                full.until(lambda live: live.pool.show("v").charged == 0)
        other = full.connect("w")
        assert other.write(0, bytes(50 * BLOCK)) == 0
        for client in (*clients, other):
            client.close()


def test_what_is_reserved_is_there_under_writers_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, BRIEF, size=256 * BLOCK) as full:
        full.do(*(Create(name, 16 * MIB) for name in "abcr"), Reserve("r", 100 * BLOCK))
        clients = [full.connect(name) for name in "abc"]
        for number in range(80):
            for client in clients:
                client.send(WRITE, number * BLOCK, BLOCK, bytes([1]) * BLOCK)
        errors = [client.reply().error for client in clients for _ in range(80)]
        assert errors.count(0) == 155 and errors.count(ENOSPC) == 85
        reserved = full.connect("r")
        assert reserved.write(0, bytes([2]) * (100 * BLOCK)) == 0
        assert full.sizes() == (255, 0)
        for client in (*clients, reserved):
            client.close()


# -- events


def test_events_are_told_once_at_each_edge(tmp_path: Path) -> None:
    policy = Policy(no_space=ERROR, min_free=0, auto_extend=False, low_water=(0.5, 0.9))
    with serving(tmp_path, policy, size=101 * BLOCK) as full:
        full.do(Create("v", 16 * MIB))
        heard = full.listen()
        client = full.connect("v")

        def use(blocks: int) -> None:
            assert client.call(TRIM, blocks * BLOCK, 16 * MIB - blocks * BLOCK) == 0
            assert client.write(0, bytes([1]) * (blocks * BLOCK)) == 0
            assert client.call(FLUSH, 0, 0) == 0

        for blocks in (49, 50, 51, 49, 50, 90, 99, 40, 60):
            use(blocks)
        kinds = [(event.kind, event.facts.get("level")) for event in heard]
        low, recovered = "low_water", "recovered"
        assert kinds == [(low, 50.0), (low, 90.0), (recovered, 50.0), (low, 50.0)]
        heard.clear()
        use(89)
        for _ in range(3):
            assert client.write(10 * MIB, bytes(12 * BLOCK)) == ENOSPC
        assert [(event.kind, event.facts["name"], event.facts["waits"]) for event in heard] == [
            ("no_space", "v", False)
        ]
        use(40)
        full.until(lambda live: live.pool.allocator.pending == 0)
        assert client.write(10 * MIB, b"x") == 0
        assert client.call(FLUSH, 0, 0) == 0
        full.until(lambda live: any(event.kind == "space" for event in heard))
        full.do(Quota("v", 41 * BLOCK))
        heard.clear()
        for _ in range(3):
            assert client.write(0, bytes([1]) * (50 * BLOCK)) == ENOSPC
        assert [event.kind for event in heard] == ["no_space"] and "quota" in heard[0].message
        client.close()


def test_a_listener_that_does_not_take_its_events_is_told_how_many_are_gone(full: Full) -> None:
    async def listen() -> list[Event]:
        listener = full.live.events.listen(10)
        for number in range(25):
            full.live.events.notify("extended", f"number {number}")
        full.live.events.close()
        return [event async for event in listener]

    events = full.run(listen())
    assert [event.message for event in events[1:]] == [f"number {number}" for number in range(15, 25)]
    assert (events[0].kind, events[0].facts) == ("dropped", {"count": 15})


# -- the file system below is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    need_root()
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32M", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def write_all_there_is(full: Full, name: str) -> None:
    """Until the file system below is full; the volume's writes do not wait."""
    client = full.connect(name)
    number = 0
    while client.write(number * MIB, bytes([number + 1]) * MIB) == 0:
        number += 1
    while client.write(number * MIB, b"x" * 4096) == 0:
        number += 1
    assert number > 10
    client.close()


def test_on_a_full_file_system_writes_wait_for_what_a_deletion_gives_back(small_disk: Path) -> None:
    with serving(small_disk, WAITING, (ExportRule("a", no_space=ERROR),), size=1024 * MIB) as full:
        full.do(Create("a", 512 * MIB), Create("b", 512 * MIB))
        write_all_there_is(full, "a")
        other = full.connect("b")
        cookie = other.send(WRITE, 0, 64 * BLOCK, b"b" * (64 * BLOCK))
        full.until_waiting(1)
        client = full.connect("a")
        assert client.read(0, BLOCK) == bytes([1]) * BLOCK
        assert client.write(0, b"in place" * (BLOCK // 8), FUA) == 0
        assert client.read(0, 8) == b"in place"
        client.close()
        full.do(Snapshot("a", "a@1"), Remove("a@1"))
        trimmer = full.connect("a")
        assert trimmer.call(TRIM, 0, 512 * MIB) == 0
        reply = other.reply()
        assert (reply.cookie, reply.error) == (cookie, 0)
        assert other.read(0, 64 * BLOCK) == b"b" * (64 * BLOCK)
        trimmer.close()
        other.close()


def test_space_that_others_free_on_the_file_system_is_noticed(small_disk: Path) -> None:
    with serving(small_disk, size=1024 * MIB) as full:
        full.do(Create("a", 512 * MIB))
        ballast = Ballast(small_disk)
        ballast.inflate()
        client = full.connect("a")
        client.send(WRITE, 0, BLOCK, b"a" * BLOCK)
        full.until_waiting(1)
        ballast.deflate()
        assert client.reply().error == 0
        client.close()


def test_a_commit_without_room_waits_and_then_tells_who_asked_but_goes_on_trying(small_disk: Path) -> None:
    with serving(small_disk, BRIEF, size=1024 * MIB) as full:
        full.do(Create("a", 512 * MIB))
        client = full.connect("a")
        assert client.write(0, b"a" * MIB, FUA) == 0
        full.until(lambda live: live.pool.journal.next_ready)
        heard = full.listen()
        ballast = Ballast(small_disk)
        ballast.inflate()
        journal = full.live.pool.journal

        async def use_up() -> None:
            """Records that are true already, until the journal has no room."""
            row = full.live.pool.state.names["a"]
            padded = row._replace(labels={str(number): "x" * 4000 for number in range(60)})
            try:
                while True:
                    full.live.pool.apply([padded, row])
                    await full.live.commit()
            except Exception as error:
                assert type(error).__name__ == "NoSpace", error

        full.run(use_up())
        assert full.live.pool.failed is None and journal.starved
        assert "journal_low" in [event.kind for event in heard]
        assert client.write(0, b"in place" * 512) == 0
        assert client.call(FLUSH, 0, 0) == ENOSPC
        assert client.write(4 * MIB, b"b" * BLOCK) == ENOSPC
        assert client.read(0, 8) == b"in place"
        ballast.deflate()
        while client.call(FLUSH, 0, 0) == ENOSPC:
            pass
        assert client.write(4 * MIB, b"b" * BLOCK) == 0
        full.until(lambda live: "journal_room" in [event.kind for event in heard])
        full.do(Create("c", MIB))
        client.close()


def test_a_full_pool_on_a_full_file_system_starts_again(small_disk: Path) -> None:
    with serving(small_disk, size=(BLOCKS + 1) * BLOCK) as full:
        fill(full)
    Ballast(small_disk).inflate()
    assert os.statvfs(small_disk).f_bavail == 0
    with serving(small_disk) as full:
        client, other = full.connect("big"), full.connect("small")
        assert client.read(0, BLOCK) == bytes([7]) * BLOCK
        assert client.write(0, b"o" * BLOCK, FUA) == 0
        other.send(WRITE, 0, BLOCK, b"a" * BLOCK)
        full.until_waiting(1)
        full.do(Snapshot("small", "s"))
        assert client.call(TRIM, 0, 8 * BLOCK) == 0
        assert other.reply().error == 0
        client.close()
        other.close()


# -- the daemon itself


@contextmanager
def daemon(directory: Path, *lines: str, size: int = MIB) -> Iterator[Daemon]:
    """With `lines` more in its [pool]."""
    daemon = Daemon(directory, size=size)
    daemon.config.write_text(daemon.config.read_text().replace("[server]", "\n".join((*lines, "[server]"))))
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


def test_a_daemon_that_stops_without_room_for_its_journal_answers_nobody_and_starts_again(small_disk: Path) -> None:
    ballast = Ballast(small_disk)
    with daemon(small_disk, "no_space_timeout = 0.5", size=1024 * MIB) as running:
        with running.connect() as pool:
            pool.create("a", 512 * MIB, labels={str(number): "x" * 4000 for number in range(10)})
            client = Client(running.socket, "a")
            assert client.write(0, b"a" * MIB, FUA) == 0
            pool.create("renamed", MIB, labels={str(number): "x" * 4000 for number in range(60)})
            ballast.inflate()
            with pytest.raises(nbdthin.NoSpace, match="not durable yet"):
                while True:
                    with pool.batch():
                        pool.rename("renamed", "again")
                        pool.rename("again", "renamed")
        assert client.write(0, b"in place" * 512) == 0
        client.send(WRITE, MIB, 65536, b"b" * 65536)
        client.send(FLUSH, 0, 0)
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
        assert client.closed(), "neither was carried out, and so neither has an answer"
        assert "what nobody was told is durable may be lost" in running.log.read_text()
        client.close()
        running.start()  # on the same full file system, its sockets too
        client = Client(running.socket, "a")
        assert client.read(0, 8) == b"in place"
        assert client.read(4096, 4096) == b"a" * 4096
        client.close()
        ballast.deflate()


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A program that says something; it is killed at the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_what_happens_is_told_on_the_control_socket_and_to_the_hook(tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\nread -r event\necho "$NBDTHIN_EVENT $NBDTHIN_POOL $event" >>{tmp_path}/told\nexit 3\n')
    hook.chmod(0o755)
    lines = ('low_water = ["50%"]', f'hook = ["{hook}", "with", "arguments"]', 'max_size = "2 MiB"', 'min_free = "0%"')
    with daemon(tmp_path, *lines, 'no_space = "error"') as running:
        running.create("a", "16 MiB")
        command = [sys.executable, "-m", "nbdthin", "--socket", str(running.control), "events"]
        with running.connect() as pool, started([*command, "--json"]) as listening:
            assert listening.stdout is not None
            heard = pool.events()
            assert next(heard).kind == "listening"
            assert json.loads(listening.stdout.readline())["kind"] == "listening"
            client = Client(running.socket, "a")
            assert client.write(0, bytes([1]) * 3 * MIB) == ENOSPC
            assert client.write(0, bytes([1]) * (MIB + MIB // 2)) == 0
            assert client.call(FLUSH, 0, 0) == 0
            client.close()
            expected = ["extended"] * 5 + ["no_space", "low_water"]
            events = [next(heard) for _ in expected]
            assert [event.kind for event in events] == expected
            assert (events[0].facts["before"], events[4].facts["size"]) == (MIB, 2 * MIB)
            assert events[-1].facts["level"] == 50.0
            printed = [json.loads(listening.stdout.readline()) for _ in expected]
            assert [event["kind"] for event in printed] == expected
            with pytest.raises(nbdthin.Invalid), running.connect() as other:
                other.extend("1 MiB")
            while not (tmp_path / "told").exists() or len((tmp_path / "told").read_text().splitlines()) < len(expected):
                time.sleep(0.01)
            told = [line.split(" ", 2) for line in (tmp_path / "told").read_text().splitlines()]
            assert [kind for kind, _, _ in told] == expected
            assert {place for _, place, _ in told} == {str(running.pool)}
            assert [json.loads(event)["facts"] for _, _, event in told] == [dict(event.facts) for event in events]
            running.stop()
            assert listening.wait() in (0, 1)
        assert f"the hook {hook} ended with status 3 for low_water" in running.log.read_text()
        assert "more than 50% of the pool are in use" in running.log.read_text()


@pytest.mark.parametrize("hook", ["missing", "/"])
def test_a_hook_that_cannot_be_run_is_a_line_in_the_log(tmp_path: Path, hook: str) -> None:
    with daemon(tmp_path, f'hook = ["{hook}"]') as running:
        with running.connect() as pool:
            pool.extend("2 MiB")
            while f"the hook {hook} cannot be run" not in running.log.read_text():
                time.sleep(0.01)
            pool.extend("3 MiB")


def test_limits_by_command_line(tmp_path: Path) -> None:
    with daemon(tmp_path, 'min_free = "5%"') as running:

        def nbdthin_(*arguments: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "nbdthin", "--socket", str(running.control), *arguments],
                capture_output=True,
                text=True,
            )
            return done.stdout if not done.returncode else done.stderr

        nbdthin_("create", "a", "1M")
        assert nbdthin_("quota", "a", "512K") == nbdthin_("reserve", "a", "256K") == ""
        assert "Quota: 512 KiB (524288 bytes)\nReservation: 256 KiB (262144 bytes)\n" in nbdthin_("show", "a")
        row = json.loads(nbdthin_("ls", "--json"))[0]
        assert (row["quota"], row["reservation"], row["charged"]) == (524288, 262144, 0)
        assert "Data reserved: 256 KiB" in nbdthin_("info")
        assert nbdthin_("reserve", "a", "2M").startswith("nbdthin: 'a' cannot have more reserved")
        assert nbdthin_("quota", "a", "none") == nbdthin_("reserve", "a", "none") == ""
        assert nbdthin_("reserve", "a", "2M").startswith("nbdthin: the pool cannot keep so much: ")
        assert nbdthin_("quota", "a", "much") == "nbdthin: not a size: 'much' (write 10G, 512M, 64KiB or bytes)\n"
        assert nbdthin_("extend", "512K") == "nbdthin: the pool has 1 MiB, it cannot shrink to 512 KiB\n"
        assert nbdthin_("extend", "4M") == nbdthin_("reserve", "a", "2M") == ""


def refused_for_want_of_space(running: Daemon, written: int) -> str:
    """What is said to who wants a new volume when another has `written` bytes."""
    running.create("a", 64 * MIB)
    client = Client(running.socket, "a")
    for offset in range(0, written, BLOCK):
        assert client.write(offset, b"x" * BLOCK) == 0
    assert client.call(FLUSH, 0, 0) == 0
    client.close()
    with running.connect() as pool, pytest.raises(nbdthin.NoSpace, match="no new volumes or clones") as error:
        pool.create("b", MIB)
    return str(error.value)


@pytest.mark.parametrize(
    ("lines", "advice"),
    [
        (["auto_extend = false"], "(remove snapshots or volumes, trim, or: nbdthin extend SIZE)"),
        (
            ['max_size = "2 MiB"', 'auto_extend_step = "100%"'],
            "or: nbdthin extend SIZE, as it has grown to its max_size of 2 MiB)",
        ),
    ],
)
def test_who_is_refused_under_min_free_is_told_to_extend_where_that_helps(
    tmp_path: Path, lines: list[str], advice: str
) -> None:
    with daemon(tmp_path, *lines) as running:
        assert refused_for_want_of_space(running, MIB - 64 * KIB if len(lines) == 1 else 2 * MIB - 64 * KIB).endswith(
            advice
        )


def test_who_is_refused_by_a_full_file_system_is_not_told_to_extend(small_disk: Path) -> None:
    ballast = Ballast(small_disk)
    with daemon(small_disk, size=1024 * MIB) as running:
        ballast.inflate(leave=13 * MIB)
        said = refused_for_want_of_space(running, 12 * MIB)
        assert "nbdthin extend" not in said
        assert f"or free space on the file system of {running.pool}/data, which has less left than the pool)" in said
        with running.connect() as pool, pytest.raises(nbdthin.NoSpace, match="cannot keep so much") as error:
            pool.reserve("a", 64 * MIB)
        assert "nbdthin extend" not in str(error.value) and "free space on the file system" in str(error.value)
        ballast.deflate()
