"""The server over real sockets, byte by byte: what clients that keep to the protocol see, and those that do not."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import psutil
import pytest

from nbdthin.connection import ALONE
from nbdthin.errors import InUse
from nbdthin.host import own_memory
from nbdthin.outbox import Outbox
from nbdthin.pool import live as live_module
from nbdthin.pool import readers as readers_module
from nbdthin.pool.commands import Clone, Create, Remove, Rename, Resize, Rollback, Snapshot
from nbdthin.pool.data import DataFile
from nbdthin.pool.pool import Pool
from nbdthin.pool.readers import Readers
from nbdthin.pool.threads import Threads
from nbdthin.server import Server
from nbdthin.ways import Ways
from tests.pagecache import forget, is_cached
from tests.rawclient import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    Serving,
    calls,
    until,
)
from tests.slowdisk import SlowDisk

KIB, MIB = 1 << 10, 1 << 20
SIZE = 256 * MIB


@dataclass(frozen=True)
class Rule:
    name: str
    read_only: bool = False
    description: str = ""
    no_space: str | None = None
    trim: bool = True


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    Pool.init(tmp_path / "pool", size="1G")
    rules = (Rule("golden/*", read_only=True, description="do not touch"), Rule("kept", trim=False))
    with Serving(tmp_path / "pool", tmp_path / "nbd.sock", rules) as serving:
        serving.run(serving.live.execute([Create("web", SIZE)]))
        yield serving


@pytest.fixture
def client(serving: Serving) -> Iterator[Client]:
    client = Client(serving.socket, "web")
    yield client
    client.close()


@pytest.fixture
def structured(serving: Serving) -> Iterator[Client]:
    client = Client(serving.socket, "web", structured=True, contexts=("base:allocation", "qemu:allocation-depth"))
    yield client
    client.close()


def pattern(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


# Data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 511, 4096, 5000, 65536, 65537, 3 * MIB + 17])
@pytest.mark.parametrize("offset", [0, 1, 4096, 65535, 100_000])
@pytest.mark.parametrize("kind", ["client", "structured"])
def test_what_is_written_is_read_back(request: pytest.FixtureRequest, kind: str, offset: int, length: int) -> None:
    client: Client = request.getfixturevalue(kind)
    data = pattern(length, length)
    assert client.write(offset, data) == 0
    assert client.read(offset, length) == data
    around = client.read(max(offset - 100, 0), length + 200)
    assert around == bytes(min(offset, 100)) + data + bytes(length + 200 - len(data) - min(offset, 100))


def test_a_payload_that_comes_in_small_pieces_is_put_together(client: Client) -> None:
    for length in (5000, 200_000):
        data = pattern(1, length)
        _, message = client.request(WRITE, 777, length, data)
        for start in range(0, len(message), 997):
            client.sock.sendall(message[start : start + 997])
        assert client.reply().error == 0
        assert client.read(777, length) == data


def test_a_client_alone_is_synced_for_by_the_loop_and_one_beside_others_is_not(
    serving: Serving, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdthin.pool.live.QUICK_SYNC", 60.0)  # this disk is
    data = serving.live.pool.data
    assert (client.write(0, bytes(4096)), client.call(FLUSH, 0, 0)) == (0, 0)
    by_the_loop = _syncs_by_the_loop(monkeypatch, data)

    def overwrite_and_flush() -> None:
        assert (client.write(0, bytes(4096)), client.call(FLUSH, 0, 0)) == (0, 0)
        assert not data.dirty

    for _ in range(ALONE + 2):
        overwrite_and_flush()
    assert by_the_loop == [False] * (ALONE - 1) + [True] * 3
    pipelined = client.request(WRITE, 0, 4096, bytes(4096))[1] + 3 * client.request(FLUSH, 0, 0)[1]
    client.sock.sendall(pipelined)
    assert [client.reply().error for _ in range(4)] == [0] * 4
    assert by_the_loop[ALONE + 2 :] in ([False], [True]), "one for all of them"
    other = Client(serving.socket, "web")
    assert other.read(0, 4096) == bytes(4096)
    overwrite_and_flush()
    assert not by_the_loop[-1]
    other.close()


def test_several_who_flush_every_write_are_synced_for_by_the_loop_until_somebody_else_comes(
    serving: Serving, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "QUICK_SYNC", 60.0)  # whatever disk this is
    assert (client.write(0, bytes(64 * KIB)), client.call(FLUSH, 0, 0)) == (0, 0)
    by_the_loop = _syncs_by_the_loop(monkeypatch, serving.live.pool.data)
    with closing(Client(serving.socket, "web")) as second, closing(Client(serving.socket, "web")) as reader:

        def overwrite_and_flush() -> None:
            for each in (client, second):
                assert (each.write(0, bytes(4096)), each.call(FLUSH, 0, 0)) == (0, 0)

        for _ in range(2 * ALONE):
            overwrite_and_flush()
        assert by_the_loop[0] is False
        assert by_the_loop[-ALONE:] == [True] * ALONE
        assert reader.read(0, 512) == bytes(512)
        overwrite_and_flush()
        assert by_the_loop[-2:] == [False, False]
        for _ in range(ALONE):
            overwrite_and_flush()
        assert by_the_loop[-1] is True
        assert second.write(4096, bytes(4096)) == 0, "a second write before the flush"
        assert second.write(8192, bytes(4096)) == 0
        assert (client.write(0, bytes(4096)), second.write(4096, bytes(4096))) == (0, 0)
        assert client.call(FLUSH, 0, 0) == 0
        assert by_the_loop[-1] is False, "one of them does something else now"
        for _ in range(2 * ALONE):
            overwrite_and_flush()
        assert by_the_loop[-1] is True
        assert reader.write(64 * KIB, bytes(4096), FUA) == 0, "a new block"
        assert reader.write(64 * KIB, bytes(4096), FUA) == 0
        assert by_the_loop[-1] is False, "who is durable without a flush is somebody else, too"


def _syncs_by_the_loop(monkeypatch: pytest.MonkeyPatch, data: DataFile) -> list[bool]:
    """Of each sync of `data` from now on, whether the loop itself waits for it."""
    found: list[bool] = []
    real = data.sync

    def sync() -> None:
        found.append(threading.current_thread().name != "nbdthin-sync")
        real()

    monkeypatch.setattr(data, "sync", sync)
    return found


def test_whoever_flushes_after_every_write_finds_it_synced_already_and_once(
    serving: Serving, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = serving.live.pool.data
    syncs = 0
    real = data.sync

    def sync() -> None:
        nonlocal syncs
        syncs += 1
        real()

    assert (client.write(0, bytes(64 * KIB)), client.call(FLUSH, 0, 0)) == (0, 0)
    monkeypatch.setattr(live_module, "QUICK_SYNC", 60.0)  # whatever disk this is
    monkeypatch.setattr(data, "sync", sync)
    for _ in range(2 * ALONE):
        assert (client.write(0, bytes(4096)), client.call(FLUSH, 0, 0)) == (0, 0)
    assert syncs == 2 * ALONE
    assert client.write(0, bytes(4096)) == 0
    assert client.read(0, 512) == bytes(512)  # so that the turn of the write is over
    assert (data.dirty, syncs) == (0, 2 * ALONE + 1)
    assert client.write(4096, bytes(4096)) == 0, "a second write before the flush"
    assert client.read(0, 512) == bytes(512)
    assert data.dirty
    assert client.call(FLUSH, 0, 0) == 0
    assert client.write(0, bytes(4096)) == 0
    assert client.read(0, 512) == bytes(512)
    assert data.dirty, "it is no longer known what comes"


def test_a_sync_that_was_begun_early_and_fails_is_told_to_the_flush(
    serving: Serving, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (client.write(0, bytes(64 * KIB)), client.call(FLUSH, 0, 0)) == (0, 0)
    monkeypatch.setattr(live_module, "QUICK_SYNC", 60.0)
    for _ in range(2 * ALONE):
        assert (client.write(0, bytes(4096)), client.call(FLUSH, 0, 0)) == (0, 0)

    def sync() -> None:
        raise OSError(EIO, "no such luck")

    monkeypatch.setattr(serving.live.pool.data, "sync", sync)
    assert client.write(0, bytes(4096)) == 0, "answered before, and never said to be durable"
    assert client.call(FLUSH, 0, 0) == EIO
    assert client.write(0, bytes(4096)) == EIO
    assert client.read(0, 512) == bytes(512)


def test_a_payload_of_64_mib_is_taken_and_one_of_more_closes(serving: Serving, client: Client) -> None:
    data = pattern(2, 64 * MIB)
    assert client.write(0, data) == 0
    assert client.read(0, 64 * MIB) == data
    assert client.call(READ, 0, 64 * MIB + 1) == EINVAL
    client.send(WRITE, 0, 64 * MIB + 1)
    assert client.closed()


def test_a_thousand_requests_sent_at_once_are_all_answered(client: Client) -> None:
    data = pattern(3, 4096)
    wanted = {}
    message = b""
    for index in range(500):
        cookie, part = client.request(WRITE, index * 8192, 4096, data)
        message += part
        wanted[cookie] = b""
    client.sock.sendall(message)
    for _ in range(500):
        assert wanted.pop(client.reply().cookie) == b""
    message = b""
    for index in range(1000):
        cookie, part = client.request(READ, index * 4096, 4096)
        message += part
        wanted[cookie] = data if index % 2 == 0 else bytes(4096)
    client.sock.sendall(message)
    for _ in range(1000):
        chunk = client.reply()
        assert chunk.payload == wanted.pop(chunk.cookie)
    assert not wanted


def test_a_client_that_asks_for_much_lets_another_have_its_turn(serving: Serving, client: Client) -> None:
    with contextlib.closing(Client(serving.socket, "web")) as other:
        other.read(0, 4096)
        flood = b"".join(client.request(READ, index * 4096, 4096)[1] for index in range(64))
        one = other.request(READ, 0, 4096)[1]

        async def ask_both() -> int:
            client.sock.sendall(flood)
            other.sock.sendall(one)
            for _ in range(1000):
                await asyncio.sleep(0)
                if _readable(other.sock):
                    break
            return _readable(client.sock)

        assert serving.run(ask_both()) <= 32 * (16 + 4096), "half of it may be answered before"
        other.reply()
        for _ in range(64):
            assert client.reply().payload == bytes(4096)


def _readable(sock: socket.socket) -> int:
    """Bytes."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_reads_that_are_not_cached_return_the_same_bytes(serving: Serving, client: Client) -> None:
    data = pattern(4, 8 * MIB)
    client.write(0, data)
    client.call(FLUSH, 0, 0)
    fd = serving.live.pool.data.fd
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for offset in (4 * MIB, 0, 1 * MIB + 333):
        assert client.read(offset, 70_000) == data[offset : offset + 70_000]
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert client.write(100, b"x" * 10) == 0  # the rest of the subblock comes from the disk
    assert client.read(0, 8192) == data[:100] + b"x" * 10 + data[110:8192]


@pytest.mark.parametrize("kind", ["client", "structured"])
def test_many_small_reads_that_are_not_cached_each_get_their_own_bytes(
    request: pytest.FixtureRequest, serving: Serving, kind: str
) -> None:
    client: Client = request.getfixturevalue(kind)
    data = pattern(14, 8 * MIB)
    client.write(0, data)
    client.call(FLUSH, 0, 0)
    chance = random.Random(15)
    for length in (4096, 20_000):  # of the larger ones not all fit into the arena at once
        forget(serving.live.pool.data.fd)
        offsets = {}
        message = b""
        for start in chance.sample(range(0, len(data), 64 * KIB), 100):
            cookie, each = client.request(READ, start + 100, length)
            offsets[cookie] = start + 100
            message += each
        client.sock.sendall(message)
        while offsets:
            reply = client.reply()
            assert (reply.done, reply.error) == (True, 0)
            start = offsets.pop(reply.cookie)
            assert reply.payload[8 if kind == "structured" else 0 :] == data[start : start + length]


def _cached(serving: Serving, offset: int) -> bool:
    """Any of 64 KiB of the volume."""
    ((position, length),) = serving.live.pool.volume("web").segments(offset, 64 * KIB)
    return is_cached(serving.live.pool.data.fd, position, length)


@pytest.mark.interpreted("how quick a disk must be is changed")
@pytest.mark.parametrize("length", [64 * KIB, 256 * KIB])
def test_large_reads_in_order_have_the_disk_asked_for_what_comes_next_in_the_volume(
    serving: Serving, client: Client, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(readers_module, "QUICK", 60.0)  # the loop itself would wait for it
    data = pattern(16, 24 * MIB)
    for start in range(20 * MIB, -1, -4 * MIB):  # the other way round in the data file
        client.write(start, data[start : start + 4 * MIB])
    client.call(FLUSH, 0, 0)
    forget(serving.live.pool.data.fd)
    read_to = 4 * MIB + 512 * KIB
    for start in range(0, read_to, length):
        assert client.read(start, length) == data[start : start + length]
    until(lambda: _cached(serving, 11 * MIB))  # which in the data file lies before what was read
    assert client.read(16 * MIB, 256 * KIB) == data[16 * MIB :][: 256 * KIB]  # which is in no order with them
    time.sleep(0.05)
    assert not _cached(serving, 19 * MIB)
    for start in range(read_to, len(data), length):
        assert client.read(start, length) == data[start : start + length]


@pytest.mark.parametrize("order", [(0, 2 * MIB, MIB), (0, 0, 256 * KIB)], ids=["in no order", "of what is cached"])
def test_other_large_reads_have_it_asked_for_nothing_more(
    serving: Serving, client: Client, order: tuple[int, ...]
) -> None:
    data = pattern(17, 8 * MIB)
    client.write(0, data)
    client.call(FLUSH, 0, 0)
    forget(serving.live.pool.data.fd)
    client.read(0, MIB)
    for start in order:
        assert client.read(start, 256 * KIB) == data[start : start + 256 * KIB]
    time.sleep(0.05)
    assert not _cached(serving, 5 * MIB)


@pytest.mark.parametrize(("before", "length"), [(128 * KIB, 64 * KIB), (MIB, 512 * KIB)], ids=["in the loop", "thread"])
def test_a_large_read_in_no_order_has_the_disk_read_no_more_than_it_asks_for(
    serving: Serving, client: Client, before: int, length: int
) -> None:
    data = pattern(18, 8 * MIB)
    client.write(0, data)
    client.call(FLUSH, 0, 0)
    forget(serving.live.pool.data.fd)
    for start, count in ((0, before), (4 * MIB, 64 * KIB)):
        assert client.read(start, count) == data[start : start + count]
    # The kernel takes what comes right behind so much that is cached for a part of something longer.
    assert client.read(before, length) == data[before : before + length]
    assert not _cached(serving, before + length)


@pytest.mark.interpreted("what it measures is told instead")
@pytest.mark.parametrize("kind", ["client", "structured"])
@pytest.mark.parametrize("lends", [True, False])
def test_large_reads_are_the_same_bytes_lent_and_copied(
    request: pytest.FixtureRequest, serving: Serving, monkeypatch: pytest.MonkeyPatch, kind: str, lends: bool
) -> None:
    client: Client = request.getfixturevalue(kind)
    monkeypatch.setattr(Ways, "lends_next", lambda *_: lends)
    lent = calls(monkeypatch, Outbox, "_lend")
    data = pattern(21, 8 * MIB)
    client.write(0, data)
    for length in (32 * KIB, 100_000, MIB):
        for start in (0, 333, 5 * MIB):
            assert client.read(start, length) == data[start : start + length]
    assert bool(lent) is lends


@pytest.mark.interpreted("what it measures is told instead")
def test_large_reads_of_which_some_are_lent_and_some_copied_come_in_order(
    serving: Serving, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = cycle([True, False, False, True, True])
    monkeypatch.setattr(Ways, "lends_next", lambda *_: next(turns))
    data = pattern(22, 8 * MIB)
    client.write(0, data)
    lengths = [32 * KIB, 4 * KIB, 200_000, MIB, 64 * KIB, 2 * MIB, 3 * MIB]
    asked = [(333 * number, lengths[number % len(lengths)]) for number in range(60)]
    cookies = [client.send(READ, start, length) for start, length in asked]
    got = {}
    for _ in asked:
        reply = client.reply()
        got[reply.cookie] = reply.payload
    assert [got[each] == data[o : o + n] for each, (o, n) in zip(cookies, asked, strict=True)] == [True] * len(asked)


@pytest.mark.interpreted("a class of ours is watched")
@pytest.mark.parametrize("length", [4 * KIB, 60 * KIB])
def test_who_waits_for_a_quick_disk_is_answered_without_a_thread_alone_or_with_others(
    serving: Serving, client: Client, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(readers_module, "QUICK", 60.0)
    monkeypatch.setattr(serving.live.readers, "_took", 0.0)
    handed_over = calls(monkeypatch, Threads, "call")
    waited_for = calls(monkeypatch, Readers, "wait_for")
    data = pattern(18, 16 * MIB)
    client.write(0, data)
    client.call(FLUSH, 0, 0)

    def read_all(*clients: Client) -> int:
        """How many reads were handed over."""
        forget(serving.live.pool.data.fd)
        before = len(handed_over)
        places = random.Random(19).sample(range(0, len(data), 256 * KIB), 64)
        for index, start in enumerate(places):
            assert clients[index % len(clients)].read(start, length) == data[start : start + length]
        return len(handed_over) - before

    with contextlib.closing(Client(serving.socket, "web")) as other:
        assert read_all(client, other) == 0
        assert len(waited_for) <= 1, "one of them was alone before"
        monkeypatch.setattr(readers_module, "QUICK", 0.0)
        assert read_all(client, other) > ALONE + 1, "the disk is not quick"
        monkeypatch.setattr(readers_module, "QUICK", 60.0)
        assert read_all(client) <= ALONE + 1
        assert len(waited_for) > 32
        for places in (range(0, 4 * MIB, length), random.Random(20).sample(range(0, len(data), 256 * KIB), 64)):
            forget(serving.live.pool.data.fd)
            before, requests = len(waited_for), [client.request(READ, start, length) for start in places]
            client.sock.sendall(b"".join(message for _, message in requests))
            replies = {reply.cookie: reply.payload for reply in (client.reply() for _ in requests)}
            for start, (cookie, _) in zip(places, requests, strict=True):
                assert replies[cookie] == data[start : start + length]
            assert len(waited_for) == before, "many at once"


@pytest.fixture
def slow_disk(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.free.set()


def test_an_error_of_a_small_read_that_is_not_cached_reaches_it_alone(
    serving: Serving, structured: Client, slow_disk: SlowDisk
) -> None:
    data = pattern(16, MIB)
    structured.write(0, data)
    slow_disk.bad = {serving.live.open("web").volume.locate(number * 64 * KIB, 4096) for number in (0, 7, 8, 15)}
    requests = [structured.request(READ, number * 64 * KIB, 4096) for number in range(16)]
    structured.sock.sendall(b"".join(message for _, message in requests))
    until(lambda: bool(serving.live.pool._readers))
    slow_disk.free.set()
    replies = {reply.cookie: reply for reply in (structured.reply() for _ in requests)}
    for number, (cookie, _) in enumerate(requests):
        if number in (0, 7, 8, 15):
            assert replies[cookie].error == EIO
        else:
            assert replies[cookie].payload[8:] == data[number * 64 * KIB :][:4096]


def test_a_disk_that_is_quick_no_longer_is_waited_for_by_a_thread_whoever_waits(
    serving: Serving, client: Client, slow_disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pattern(23, MIB)
    client.write(0, data)
    readers = serving.live.readers
    monkeypatch.setattr(readers, "_took", 0.0)
    monkeypatch.setattr(readers_module, "BESIDE", 60.0)
    with contextlib.closing(Client(serving.socket, "web")) as other:
        assert other.call(FLUSH, 0, 0) == 0  # so that neither is alone
        for number, each in enumerate((client, other)):
            each.sock.sendall(each.request(READ, number * 64 * KIB, 4096)[1])
        until(lambda: readers._watched > 0)
        time.sleep(0.01)
        slow_disk.free.set()
        for number, each in enumerate((client, other)):
            assert each.reply().payload == data[number * 64 * KIB :][:4096]
    assert readers._took > 0.001


@pytest.mark.parametrize("cut_off", [False, True])
def test_small_reads_that_wait_for_the_disk_keep_their_blocks_and_end_when_their_client_has_gone(
    serving: Serving, client: Client, slow_disk: SlowDisk, cut_off: bool
) -> None:
    pool = serving.live.pool
    client.write(0, pattern(17, MIB))
    client.call(FLUSH, 0, 0)
    other = Client(serving.socket, "web")
    client.sock.sendall(b"".join(client.request(READ, number * 64 * KIB, 4096)[1] for number in range(16)))
    until(lambda: bool(pool._readers))
    assert other.call(TRIM, 0, MIB) == other.call(FLUSH, 0, 0) == 0
    assert other.read(0, 4096) == bytes(4096)
    if cut_off:
        serving.loop.call_soon_threadsafe(next(iter(serving.server._connections)).abort)
    client.close()
    time.sleep(0.02)  # as it would be freed and forgotten
    assert pool.has_freed and not pool.can_reclaim
    assert serving.server.connections == 2
    slow_disk.free.set()
    until(lambda: serving.server.connections == 1 and not pool._readers and not pool.has_freed)
    other.close()


def test_what_lies_in_a_parent_is_read_from_disk_when_part_of_a_subblock_is_written(
    serving: Serving, client: Client
) -> None:
    data = pattern(5, 64 * KIB)
    client.write(0, data)
    serving.run(serving.live.execute([Snapshot("web", "web@1"), Clone("web@1", "two")]))
    forget(serving.live.pool.data.fd)
    other = Client(serving.socket, "two")
    assert other.write(5000, b"new") == 0
    assert other.read(0, 64 * KIB) == data[:5000] + b"new" + data[5003:]
    assert client.read(0, 64 * KIB) == data
    other.close()


def test_trim_and_write_zeroes_read_as_zero_and_free_their_blocks(serving: Serving, client: Client) -> None:
    client.write(0, pattern(6, MIB))
    assert client.call(TRIM, 0, 512 * KIB) == 0
    assert client.call(WRITE_ZEROES, 512 * KIB, 256 * KIB, flags=FAST_ZERO) == 0
    assert client.call(WRITE_ZEROES, 768 * KIB + 10, 100, flags=FUA) == 0
    assert client.read(0, 768 * KIB) == bytes(768 * KIB)
    assert (
        client.read(768 * KIB, 256 * KIB)
        == pattern(6, MIB)[768 * KIB :][:10] + bytes(100) + pattern(6, MIB)[768 * KIB + 110 :]
    )
    assert serving.live.pool.allocator.used == 4


def test_write_zeroes_without_a_hole_keeps_its_blocks(serving: Serving, structured: Client) -> None:
    assert structured.call(WRITE_ZEROES, 0, 256 * KIB, flags=NO_HOLE) == 0
    assert serving.live.pool.allocator.used == 4
    assert structured.read(0, 256 * KIB) == bytes(256 * KIB)
    context = structured.contexts["base:allocation"]
    assert structured.status(0, MIB)[context] == [(256 * KIB, 2), (768 * KIB, 3)]


def test_requests_of_length_zero_change_nothing_and_keep_the_connection(client: Client, structured: Client) -> None:
    for each in (client, structured):
        for command in (READ, WRITE, TRIM, CACHE, WRITE_ZEROES):
            assert each.call(command, 4096, 0) == 0
        assert each.call(BLOCK_STATUS, 4096, 0) == EINVAL
        assert each.read(0, 512) == bytes(512)


# Structured replies ---------------------------------------------------------------------------------------


def test_holes_are_sent_as_holes(structured: Client) -> None:
    data = pattern(7, 4096)
    structured.write(8192, data)
    cookie = structured.send(READ, 0, 64 * KIB)
    chunks = [structured.reply() for _ in range(3)]
    assert [(chunk.cookie, chunk.kind, chunk.done) for chunk in chunks] == [
        (cookie, 2, False),
        (cookie, 1, False),
        (cookie, 2, True),
    ]
    assert chunks[0].payload == struct.pack(">QI", 0, 8192)
    assert chunks[1].payload == struct.pack(">Q", 8192) + data
    assert chunks[2].payload == struct.pack(">QI", 12288, 64 * KIB - 12288)


def test_a_read_with_df_comes_in_one_chunk(structured: Client) -> None:
    structured.write(8192, b"x" * 4096)
    structured.send(READ, 0, 64 * KIB, flags=DF)
    chunk = structured.reply()
    assert chunk.done and chunk.payload[8:] == bytes(8192) + b"x" * 4096 + bytes(64 * KIB - 12288)


def test_block_status_tells_data_from_holes_at_4_kib_and_who_owns_it(serving: Serving, structured: Client) -> None:
    structured.write(4096, b"x" * 4096)
    serving.run(serving.live.execute([Snapshot("web", "web@1")]))
    structured.write(12288, b"y" * 4096)
    structured.call(TRIM, 4096, 4096)
    allocation, depth = structured.contexts["base:allocation"], structured.contexts["qemu:allocation-depth"]
    found = structured.status(0, MIB)
    # The new head's own block is there already: what is zero in it is no hole.
    assert found[allocation] == [(12288, 2), (4096, 0), (49152, 2), (MIB - 65536, 3)]
    assert found[depth] == [(4096, 0), (4096, 1), (4096, 0), (4096, 1), (MIB - 16384, 0)]
    assert structured.status(0, MIB, REQ_ONE)[allocation] == [(12288, 2)]


# Refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "error"),
    [
        (WRITE, 0, SIZE, 4096, ENOSPC),
        (WRITE, 0, SIZE - 512, 4096, ENOSPC),
        (WRITE, 0, (1 << 64) - 4096, 8192, ENOSPC),
        (WRITE, 0x80, 0, 4096, EINVAL),
        (WRITE, NO_HOLE, 0, 4096, EINVAL),
        (WRITE, 0, SIZE, 3 * MIB, ENOSPC),
        (READ, 0, SIZE, 1, EINVAL),
        (TRIM, 0, SIZE - 1, 2, EINVAL),
        (CACHE, 0, SIZE, 1, EINVAL),
        (WRITE_ZEROES, 0, SIZE, 1, ENOSPC),
        (BLOCK_STATUS, 0, 0, 512, EINVAL),
        (8, 0, 0, 512, EINVAL),
        (77, 0, 0, 0, EINVAL),
    ],
)
def test_a_refused_request_gets_its_error_and_the_connection_goes_on(
    client: Client, command: int, flags: int, offset: int, length: int, error: int
) -> None:
    payload = b"z" * length if command == WRITE else b""
    assert client.call(command, offset, length, payload, flags) == error
    assert client.write(0, b"still here") == 0
    assert client.read(0, 10) == b"still here"


def test_a_refused_write_still_consumes_its_payload_before_it_is_answered(client: Client) -> None:
    cookie, message = client.request(WRITE, SIZE, 300_000, pattern(8, 300_000))
    client.sock.sendall(message[:100])
    time.sleep(0.01)
    client.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.sock.recv(1)
    client.sock.setblocking(True)
    client.sock.sendall(message[100:])
    assert client.reply()[:4] == (cookie, -1, True, ENOSPC)
    assert client.read(0, 100) == bytes(100)


def test_snapshots_and_read_only_exports_refuse_every_kind_of_write(serving: Serving) -> None:
    serving.run(serving.live.execute([Snapshot("web", "web@1"), Create("golden/a", MIB)]))
    for name in ("web@1", "golden/a"):
        client = Client(serving.socket, name)
        assert client.flags & 2
        assert client.write(0, b"no") == EPERM
        assert client.call(TRIM, 0, 4096) == EPERM
        assert client.call(WRITE_ZEROES, 0, 4096) == EPERM
        assert client.call(FLUSH, 0, 0) == 0
        assert client.read(0, 10) == bytes(10)
        client.close()


def test_a_wrong_magic_number_closes_the_connection(client: Client) -> None:
    client.sock.sendall(bytes(28))
    assert client.closed()


def test_a_full_pool_answers_enospc_and_goes_on_reading_trimming_and_overwriting(tmp_path: Path) -> None:
    Pool.init(tmp_path / "small", size="2M")
    with Serving(tmp_path / "small", tmp_path / "nbd.sock") as serving:
        serving.run(serving.live.execute([Create("big", 64 * MIB)]))
        client = Client(serving.socket, "big")
        blocks = serving.live.pool.allocator.capacity
        for index in range(blocks):
            assert client.write(index * 64 * KIB, pattern(index, 64 * KIB)) == 0
        assert client.write(blocks * 64 * KIB, b"one more") == ENOSPC
        assert client.call(WRITE_ZEROES, 40 * MIB, 4096, flags=NO_HOLE) == ENOSPC
        assert client.write(0, b"in place") == 0
        assert client.read(0, 8) == b"in place"
        assert client.call(TRIM, 0, 64 * KIB) == 0
        assert client.write(blocks * 64 * KIB, b"one more") == 0, "what a trim gave back can be written at once"
        assert client.read(64 * KIB, 64 * KIB) == pattern(1, 64 * KIB)
        client.close()


# Connections ----------------------------------------------------------------------------------------------


def test_a_client_that_does_not_take_its_replies_is_not_read_from(serving: Serving, client: Client) -> None:
    client.write(0, pattern(9, MIB))
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    before = serving.run(_memory())
    message = b"".join(client.request(READ, 0, MIB)[1] for _ in range(2000))
    sender = threading.Thread(target=client.sock.sendall, args=(message,))
    sender.start()  # two thousand replies of 1 MiB: far more than sockets hold
    memory = [serving.run(_memory()) for _ in range(20)]
    assert max(memory) - before < 200 * MIB
    for _ in range(2000):
        assert len(client.reply().payload) == MIB
    sender.join()


async def _memory() -> int:
    return own_memory(psutil.Process())


def test_what_is_announced_takes_no_memory(serving: Serving, client: Client) -> None:
    before = serving.run(_memory())
    announcing = [Client(serving.socket, "web") for _ in range(20)]
    for each in announcing:
        each.sock.sendall(each.request(WRITE, 0, 64 * MIB)[1])
    assert client.read(0, 512) == bytes(512)
    assert serving.run(_memory()) - before < 100 * MIB
    for each in announcing:
        each.close()


def test_a_defect_of_ours_is_an_io_error_to_one_request_and_a_line_in_the_log(
    serving: Serving, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for target, command, length in (
        ("volume.Volume.write_small", WRITE, 4096),
        ("livevolume.LiveVolume.write_now", WRITE, 5),
        ("livevolume.LiveVolume.trim_now", TRIM, 4096),
        ("volume.Volume.locate", READ, 4096),
        ("volume.Volume.segments", READ, 65536),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"nbdthin.pool.{target}", lambda *_: 1 // 0)
            assert client.call(command, 0, length, bytes(length) if command == WRITE else b"") == EIO
        assert "ZeroDivisionError" in caplog.text
        caplog.clear()
    assert client.read(0, 512) == bytes(512)


def test_disconnect_finishes_what_was_asked_before_it(client: Client) -> None:
    message = b"".join(client.request(WRITE, index * 4096, 4096, b"a" * 4096)[1] for index in range(20))
    message += client.request(FLUSH, 0, 0)[1] + client.request(DISC, 0, 0)[1]
    client.sock.sendall(message)
    assert [client.reply().error for _ in range(21)] == [0] * 21
    assert client.closed()


def test_a_client_that_only_stops_sending_still_gets_its_replies(client: Client) -> None:
    client.sock.sendall(b"".join(client.request(READ, 0, 4096)[1] for _ in range(50)) + client.request(FLUSH, 0, 0)[1])
    client.sock.shutdown(socket.SHUT_WR)
    assert [client.reply().error for _ in range(51)] == [0] * 51
    assert client.closed()


def test_connections_reset_in_the_middle_harm_nobody_else(serving: Serving, client: Client) -> None:
    data = pattern(10, 4096)
    client.write(0, data)
    for index in range(100):
        rude = Client(serving.socket, "web")
        rude.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        rude.sock.sendall(b"".join(rude.request(READ, 0, MIB)[1] for _ in range(20)))
        rude.sock.sendall(rude.request(WRITE, 8192, 2 * MIB)[1] + bytes(index * 100))
        rude.close()
    assert client.read(0, 4096) == data


def test_many_connections_see_each_others_writes(serving: Serving) -> None:
    clients = [Client(serving.socket, "web") for _ in range(8)]
    for index, each in enumerate(clients):
        assert each.flags & 0x100
        assert each.write(index * 4096, bytes([index + 1]) * 4096) == 0
    assert clients[3].call(FLUSH, 0, 0) == 0
    expected = b"".join(bytes([index + 1]) * 4096 for index in range(8))
    assert all(each.read(0, 8 * 4096) == expected for each in clients)
    for each in clients:
        each.close()


def test_a_volume_grows_under_its_clients(serving: Serving, client: Client) -> None:
    size = client.size
    assert client.write(size - 512, b"a" * 512) == 0
    assert client.write(size, b"b" * 512) == ENOSPC
    serving.run(serving.live.execute([Resize("web", size + MIB)]))
    assert client.write(size + MIB - 512, b"c" * 512) == 0
    assert client.read(size - 512, MIB + 512) == b"a" * 512 + bytes(MIB - 512) + b"c" * 512
    later = Client(serving.socket, "web")
    assert later.size == size + MIB
    later.close()


def test_a_name_in_use_is_not_removed_shrunk_renamed_or_rolled_back(serving: Serving, client: Client) -> None:
    serving.run(serving.live.execute([Snapshot("web", "web@1")]))
    for command in (Remove("web"), Resize("web", MIB), Rename("web", "new"), Rollback("web", "web@1")):
        with pytest.raises(InUse, match=rf"in use.*pid {os.getpid()}") as caught:
            serving.run(serving.live.execute([command]))
        assert len(caught.value.holders) == 1
    serving.run(serving.server.disconnect("web"))
    assert client.closed()
    serving.run(serving.live.execute([Remove("web")]))


def test_a_name_that_went_and_came_back_is_a_new_volume(serving: Serving, client: Client) -> None:
    client.write(0, b"old")
    serving.run(serving.server.disconnect("web"))
    serving.run(serving.live.execute([Remove("web")]))
    serving.run(serving.live.execute([Create("web", MIB)]))
    again = Client(serving.socket, "web")
    assert (again.size, again.read(0, 3)) == (MIB, bytes(3))
    again.close()


def test_a_connection_that_has_ended_keeps_no_buffers_until_cycles_are_collected(serving: Serving) -> None:
    client = Client(serving.socket, "web")
    (connection,) = serving.server._connections
    assert client.read(0, 4096) == bytes(4096)
    assert len(connection._view)
    client.close()
    serving.run(asyncio.wait_for(asyncio.shield(connection.closed), 60))
    assert len(connection._view) == 0


def test_a_connection_that_has_written_keeps_no_payload(serving: Serving, client: Client) -> None:
    assert client.write(0, bytes(3 * MIB)) == 0
    assert client.write(0, bytes(MIB)) == 0
    (connection,) = serving.server._connections
    assert connection._payload is None


def test_a_large_write_is_written_as_it_comes_in(serving: Serving, client: Client) -> None:
    """And what it replaces is read until its piece is there."""
    data = os.urandom(MIB)
    cookie, message = client.request(WRITE, 5, MIB, data)
    client.sock.sendall(message[: 28 + MIB // 2])
    other = Client(serving.socket, "web")
    until(lambda: other.read(5, 256 * KIB) == data[: 256 * KIB])
    assert other.read(5 + 3 * MIB // 4, 512) == bytes(512)
    client.sock.sendall(message[28 + MIB // 2 :] + client.request(READ, 5, MIB)[1])
    assert client.reply().cookie == cookie
    assert client.reply().payload == data
    other.close()


def test_a_command_does_not_wait_for_a_client_that_stops_in_the_middle_of_a_large_write(
    serving: Serving, client: Client
) -> None:
    """The snapshot has what had come by then, and nothing that comes later."""
    data = os.urandom(MIB)
    _, message = client.request(WRITE, 0, MIB, data)
    client.sock.sendall(message[: 28 + MIB // 2])
    other = Client(serving.socket, "web")
    until(lambda: other.read(0, MIB // 2) == data[: MIB // 2])
    serving.run(serving.live.execute([Snapshot("web", "web@middle")]))
    client.sock.sendall(message[28 + MIB // 2 :])
    assert client.reply().error == 0
    assert client.read(0, MIB) == data
    frozen = Client(serving.socket, "web@middle")
    assert frozen.read(0, MIB) == data[: MIB // 2] + bytes(MIB // 2)
    for each in (other, frozen):
        each.close()


def test_a_client_that_goes_in_the_middle_of_a_large_write_holds_nothing_up(serving: Serving, client: Client) -> None:
    rude = Client(serving.socket, "web")
    rude.sock.sendall(rude.request(WRITE, 0, MIB)[1] + bytes(MIB // 2))
    until(lambda: bool(serving.live.open("web")._coming))
    rude.close()
    until(lambda: not serving.live.open("web")._coming)
    assert client.write(0, bytes(MIB)) == 0


def test_a_large_write_that_fails_in_the_middle_is_consumed_and_refused(
    serving: Serving, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = serving.live.pool.data.pwrite

    def pwrite(fd: int, data: memoryview, position: int) -> int:
        if bytes(data[:4]) == b"BAD!":
            raise OSError(EIO, "no such luck")
        return real(fd, data, position)

    monkeypatch.setattr(serving.live.pool.data, "pwrite", pwrite)
    data = bytes(MIB // 2) + b"BAD!" + bytes(MIB // 2 - 4)
    assert client.write(0, data) == EIO
    assert client.write(0, bytes(MIB)) == 0
    assert client.read(0, MIB) == bytes(MIB)


def test_shutting_down_answers_what_was_received_and_loses_nothing(serving: Serving, client: Client) -> None:
    message = b"".join(client.request(WRITE, index * 4096, 4096, bytes([index]) * 4096)[1] for index in range(64))
    client.sock.sendall(message)
    first = client.reply()
    serving.stop()
    answered = [first]
    try:
        while True:
            answered.append(client.reply())
    except (EOFError, ConnectionResetError):
        pass
    assert all(chunk.error == 0 for chunk in answered)
    with Pool.open(serving.path) as pool:
        for chunk in answered:
            index = chunk.cookie - 1
            assert pool.volume("web").read(index * 4096, 4096) == bytes([index]) * 4096


def test_shutting_down_answers_everything_that_had_been_received(serving: Serving, structured: Client) -> None:
    """Also what lies behind a request that lets the loop turn first."""
    message = b""
    for index in range(30):
        message += structured.request(BLOCK_STATUS, 0, MIB, flags=REQ_ONE)[1]
        message += structured.request(WRITE, index * 4096, 4096, b"x" * 4096)[1]
    sent = threading.Event()
    serving.loop.call_soon_threadsafe(sent.wait)
    structured.sock.sendall(message)
    sent.set()
    structured.reply()  # the whole message was received with its first request
    serving.stop()
    answered = {1}
    try:
        while True:
            answered.add(structured.reply().cookie)
    except EOFError:
        assert answered == set(range(1, 61))


def shutting_down(serving: Serving) -> Future[None]:
    """Begin to shut the server down; returns when it accepts nobody any more."""
    ending = asyncio.run_coroutine_threadsafe(serving.server.shutdown(5), serving.loop)
    while not serving.run(_stopping(serving)):
        pass
    serving.run(asyncio.sleep(0))  # whoever was accepted in the last moment has been announced
    return ending


async def _stopping(serving: Serving) -> bool:
    return serving.server.stopping


@pytest.mark.parametrize("received", ["nothing", "greeting", "half an option"])
def test_a_handshake_is_finished_before_a_stopping_server_closes(serving: Serving, received: str) -> None:
    """A client that comes back after a lost connection gives up for good when it is refused, not when it is cut off."""
    client = Client(serving.socket)
    if received != "nothing":
        assert client.receive(18)[:8] == b"NBDMAGIC"
    if received == "half an option":
        client.sock.sendall(struct.pack(">I", 3) + b"IHAVEOPT\0\0\0\x07")
    serving.run(asyncio.sleep(0))  # it was accepted
    ending = shutting_down(serving)
    if received == "half an option":
        client.sock.sendall(struct.pack(">II", 9, 3) + b"web" + bytes(2))
        assert client.option_replies(7)[-1] == (1, b"")
    elif received == "greeting":
        client.sock.sendall(struct.pack(">I", 3))
        assert client.option(7, b"\0\0\0\x03web\0\0")[-1] == (1, b"")
    else:
        client.handshake("web", True, ())
    assert client.closed()
    client.close()
    ending.result()


def test_what_is_sent_with_the_last_option_to_a_stopping_server_is_answered(serving: Serving) -> None:
    client = Client(serving.socket)
    client.receive(18)
    ending = shutting_down(serving)
    option = b"IHAVEOPT" + struct.pack(">II", 7, 9) + b"\0\0\0\x03web\0\0"
    client.sock.sendall(struct.pack(">I", 3) + option + client.request(WRITE, 0, 4096, b"w" * 4096)[1])
    assert client.option_replies(7)[-1] == (1, b"")
    assert client.reply().error == 0
    assert client.closed()
    client.close()
    ending.result()
    assert serving.run(_read(serving, "web", 4096)) == b"w" * 4096


async def _read(serving: Serving, name: str, length: int) -> bytes:
    return bytes(serving.live.pool.volume(name).read(0, length))


def test_a_silent_handshake_does_not_keep_a_stopping_server(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdthin.connection.LAST_HANDSHAKES", 0.05)
    silent, slow = Client(serving.socket), Client(serving.socket)
    for each in (silent, slow):
        each.receive(18)
    ending = shutting_down(serving)
    slow.sock.sendall(struct.pack(">I", 3))
    with contextlib.suppress(ConnectionError, EOFError):  # options do not give it more time
        while True:
            slow.option(3, b"")
    assert silent.closed() and slow.closed()
    ending.result()
    assert serving.server.connections == 0
    for each in (silent, slow):
        each.close()


def test_whoever_comes_while_a_server_with_inherited_sockets_stops_waits_in_the_queue(
    serving: Serving, client: Client
) -> None:
    """The listening socket is someone else's too, as under systemd: nobody is accepted who would then be closed."""
    late = [Client(serving.socket) for _ in range(20)]  # all of them, or the first few, are accepted
    ending = shutting_down(serving)
    late += [Client(serving.socket) for _ in range(20)]
    accepted = 0
    for each in late:
        each.sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            each.sock.recv(18, socket.MSG_PEEK)
            accepted += 1
    for each in late[:accepted]:
        each.sock.settimeout(None)
        each.handshake("web", False, ())
        assert each.closed()
    ending.result()
    serving.run(_serve_again(serving))
    for each in late[accepted:]:
        each.sock.settimeout(None)
        each.handshake("web", False, ())
        assert each.read(0, 512) == bytes(512)
    for each in late:
        each.close()


async def _serve_again(serving: Serving) -> None:
    serving.server = Server(serving.live)
    await serving.server.listen([serving.listener.dup()])


def test_a_snapshot_under_load_holds_what_had_been_answered_and_a_prefix_of_the_rest(serving: Serving) -> None:
    """Each round writes its number to two places, the second only once the first is answered."""
    stop = threading.Event()
    answered = [0]

    def load() -> None:
        client = Client(serving.socket, "web")
        number = 0
        while not stop.is_set():
            number += 1
            stamp = number.to_bytes(8, "big") * 512
            client.write(0, stamp)
            client.write(10 * MIB, stamp * 80)  # large enough for a thread
            answered[0] = number
        client.close()

    writer = threading.Thread(target=load)
    writer.start()
    for index in range(30):
        before = answered[0]
        serving.run(serving.live.execute([Snapshot("web", f"web@{index}")]))
        frozen = Client(serving.socket, f"web@{index}")
        first = int.from_bytes(frozen.read(0, 8), "big")
        second = {int.from_bytes(frozen.read(10 * MIB + at, 8), "big") for at in range(0, 320 * KIB, 32 * KIB)}
        assert len(second) == 1, "a single write is whole or absent where the snapshot waited for it"
        assert before <= min(second) and first - 1 <= min(second) <= first
        frozen.close()
    stop.set()
    writer.join()


def test_the_handshake_is_given_up_when_the_client_says_nothing(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdthin.connection.HANDSHAKE_TIMEOUT", 0.05)
    silent = Client(serving.socket)
    silent.receive(18)
    assert silent.closed()
    silent.close()


def test_where_trimming_is_not_wanted_clients_are_not_told_of_it_and_refused(serving: Serving, client: Client) -> None:
    serving.run(serving.live.execute([Create("kept", MIB)]))
    kept = Client(serving.socket, "kept")
    assert client.flags & ~kept.flags == 1 << 5  # SEND_TRIM
    assert kept.write(0, b"x" * 4096) == 0
    assert kept.call(TRIM, 0, 4096) == EINVAL
    assert kept.read(0, 4096) == b"x" * 4096
    kept.close()


def test_exports_are_listed_with_their_descriptions(serving: Serving) -> None:
    serving.run(serving.live.execute([Create("golden/a", MIB)]))
    client = Client(serving.socket)
    client.receive(18)
    client.sock.sendall(struct.pack(">I", 3))
    listed = [data for kind, data in client.option(3, b"") if kind == 2]
    assert listed == [b"\0\0\0\3web", b"\0\0\0\x08golden/ado not touch"]
    client.close()
