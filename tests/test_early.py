"""Replies that begin before their request is handled: to whom, what comes between, and what never may."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nbdthin import connection as connection_module
from nbdthin import polling
from nbdthin.outbox import Outbox
from nbdthin.pool.commands import Clone, Create, Snapshot
from nbdthin.pool.data import DataFile
from nbdthin.pool.policy import QUEUE, Policy
from nbdthin.pool.pool import Pool
from tests.rawclient import (
    BLOCK_STATUS,
    EINVAL,
    EIO,
    ENOSPC,
    FLUSH,
    READ,
    TRIM,
    WRITE,
    Chunk,
    Client,
    Serving,
    calls,
    until,
)
from tests.slowdisk import SlowDisk

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
SIMPLE, STRUCTURED = 0x67446698, 0x668E33EF
NONE = 0

pytestmark = pytest.mark.interpreted("module constants are set, and functions replaced")


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    Pool.init(tmp_path / "pool", size="1G")
    policy = Policy(no_space=QUEUE, min_free=0, auto_extend=False)
    with Serving(tmp_path / "pool", tmp_path / "nbd.sock", policy=policy) as serving:
        serving.run(serving.live.execute([Create("web", 64 * MIB)]))
        yield serving


@pytest.fixture(params=[False, True], ids=["simple", "structured"])
def client(request: pytest.FixtureRequest, serving: Serving) -> Iterator[Client]:
    with closing(Client(serving.socket, "web", structured=request.param)) as client:
        client.sock.settimeout(60)
        yield client


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has one request with us is taken for one who waits for each answer."""
    monkeypatch.setattr(connection_module, "LONE", -1)
    monkeypatch.setattr(connection_module, "ALONE", -1)


class Disk:
    """Small reads and writes are held until `free` is set, then done; writes fail with `of_writes`."""

    def __init__(self, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.of_writes = 0
        data = serving.live.pool.data
        pwrite, preadv = data.pwrite, connection_module._preadv

        def write(fd: int, payload: Any, position: int) -> int:
            self._wait()
            if self.of_writes:
                raise OSError(self.of_writes, os.strerror(self.of_writes))
            return pwrite(fd, payload, position)

        def read(*arguments: Any) -> int:
            self._wait()
            return preadv(*arguments)

        monkeypatch.setattr(data, "pwrite", write)
        monkeypatch.setattr(connection_module, "_preadv", read)

    def _wait(self) -> None:
        assert self.free.wait(60)


@pytest.fixture
def disk(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(serving, monkeypatch)
    yield disk
    disk.of_writes = 0
    disk.free.set()


def magic(client: Client) -> int:
    (found,) = struct.unpack(">I", client.receive(4))
    return int(found)


def rest(client: Client, begun: int) -> Chunk:
    """The reply of which `magic` was received."""
    received = client.receive
    parts = [struct.pack(">I", begun)]

    def receive(length: int) -> bytes:
        return parts.pop() if parts else received(length)

    client.receive = receive  # type: ignore[method-assign]
    try:
        return client.reply()
    finally:
        del client.receive


def test_the_answer_to_a_write_begins_before_it_is_written(
    serving: Serving, client: Client, disk: Disk, always: None
) -> None:
    cookie = client.send(WRITE, 0, 4 * KIB, bytes(4 * KIB))
    begun = magic(client)
    assert begun == (STRUCTURED if client.structured else SIMPLE)
    assert serving.live.pool.volume("web").layer.blocks == 0, "nothing is said to be there yet"
    disk.free.set()
    assert rest(client, begun)[:4] == (cookie, NONE if client.structured else -1, True, 0)
    assert client.read(0, 4 * KIB) == bytes(4 * KIB)


@pytest.mark.parametrize("length", [4 * KIB, 64 * KIB])
def test_the_answer_to_a_read_begins_before_it_is_read(
    client: Client, disk: Disk, always: None, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.free.set()
    data = random.Random(1).randbytes(length)
    client.write(0, data)
    assert client.read(0, length) == data
    disk.free.clear()
    mapped = DataFile.mapped

    def held(file: DataFile, position: int, length: int) -> memoryview | None:
        assert disk.free.wait(60)
        return mapped(file, position, length)

    monkeypatch.setattr(DataFile, "mapped", held)  # what is large is read when it is sent
    cookie = client.send(READ, 0, length)
    begun = magic(client)
    disk.free.set()
    reply = rest(client, begun)
    assert begun == (STRUCTURED if client.structured else SIMPLE)
    assert (reply.cookie, reply.done, reply.payload[8:] if client.structured else reply.payload) == (cookie, True, data)


def test_an_error_follows_what_has_begun(client: Client, disk: Disk, always: None) -> None:
    disk.of_writes = errno.EIO
    disk.free.set()
    assert client.write(0, bytes(4 * KIB)) == EIO
    disk.of_writes = 0
    assert client.write(0, b"w" * 4 * KIB) == 0
    assert client.read(0, 4 * KIB) == b"w" * 4 * KIB


def test_a_write_that_has_begun_and_waits_for_space_keeps_nobody_from_making_it(
    serving: Serving, client: Client, disk: Disk, always: None
) -> None:
    disk.free.set()
    assert client.write(0, b"a" * BLOCK) == 0
    disk.of_writes = errno.ENOSPC
    write = client.send(WRITE, BLOCK, 4 * KIB, b"b" * 4 * KIB)
    until(lambda: serving.live._space.count > 0)
    assert client.read(0, 4 * KIB) == b"a" * 4 * KIB
    assert client.call(TRIM, 4 * BLOCK, BLOCK) == client.call(FLUSH, 0, 0) == 0
    assert client.call(77, 0, 0) == EINVAL
    disk.of_writes = 0
    serving.loop.call_soon_threadsafe(serving.live.space_came)
    assert client.reply()[:4] == (write, -1, True, 0)
    assert client.read(BLOCK, 4 * KIB) == b"b" * 4 * KIB


@pytest.mark.parametrize("first", ["read", "trim", "flush", "refused", "status"])
def test_any_reply_may_be_what_has_begun(
    serving: Serving, client: Client, disk: Disk, always: None, first: str
) -> None:
    disk.free.set()
    disk.of_writes = errno.ENOSPC
    write = client.send(WRITE, BLOCK, 4 * KIB, b"b" * 4 * KIB)
    until(lambda: serving.live._space.count > 0)
    match first:
        case "read":
            assert client.read(0, 4 * KIB) == bytes(4 * KIB)
        case "trim":
            assert client.call(TRIM, 4 * BLOCK, BLOCK) == 0
        case "flush":
            assert client.call(FLUSH, 0, 0) == 0
        case "refused":
            assert client.write(64 * MIB, bytes(4 * KIB)) == ENOSPC
        case "status":
            assert client.call(BLOCK_STATUS, 0, 4 * KIB) == EINVAL, "no context was agreed"
    disk.of_writes = 0
    serving.loop.call_soon_threadsafe(serving.live.space_came)
    assert client.reply()[:4] == (write, -1, True, 0)


def test_what_comes_behind_a_read_that_has_begun_and_is_not_cached_is_answered(
    serving: Serving, client: Client, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(2).randbytes(MIB)
    client.write(0, data)
    assert client.read(0, 4 * KIB) == data[: 4 * KIB]
    slow_disk = SlowDisk(monkeypatch)
    first = client.send(READ, BLOCK, 4 * KIB)
    until(lambda: bool(serving.live.pool._readers))
    second = client.send(READ, 2 * BLOCK, 4 * KIB)
    write = client.send(WRITE, 3 * BLOCK, 4 * KIB, bytes(4 * KIB))
    flush = client.send(FLUSH, 0, 0)
    time.sleep(0.05)
    slow_disk.free.set()
    replies = {reply.cookie: reply for reply in (client.reply() for _ in range(4))}
    assert [replies[each].error for each in (first, second, write, flush)] == [0] * 4
    assert replies[first].payload.endswith(data[BLOCK:][: 4 * KIB])
    assert replies[second].payload.endswith(data[2 * BLOCK :][: 4 * KIB])


def test_a_stopping_server_completes_what_has_begun(serving: Serving, client: Client, disk: Disk, always: None) -> None:
    cookie = client.send(WRITE, 0, 4 * KIB, bytes(4 * KIB))
    begun = magic(client)
    serving.loop.call_soon_threadsafe(serving._end.set)
    disk.free.set()
    assert rest(client, begun)[:4] == (cookie, NONE if client.structured else -1, True, 0)
    assert client.closed()


def test_every_reply_of_a_mixture_is_whole(serving: Serving, client: Client, always: None) -> None:
    """One to four requests at a time, some of which are refused, against what a plain buffer says."""
    chance = random.Random(3)
    model = bytearray(4 * MIB)
    for _ in range(600):
        if chance.random() < 0.05:
            os.posix_fadvise(serving.live.pool.data.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        expected: dict[int, tuple[int, bytes]] = {}
        message = b""
        for region in chance.sample(range(4), chance.choice((1, 1, 1, 2, 4))):  # none depends on another
            length = chance.choice((512, 4 * KIB, 64 * KIB, 300 * KIB))
            offset = region * MIB + chance.randrange(0, MIB - length, 512)
            kind = chance.choice((READ, READ, WRITE, WRITE, FLUSH, TRIM, 77))
            if kind == READ:
                cookie, part = client.request(READ, offset, length)
                expected[cookie] = 0, bytes(model[offset : offset + length])
            elif kind == WRITE:
                payload = chance.randbytes(length)
                cookie, part = client.request(WRITE, offset, length, payload)
                model[offset : offset + length] = payload
                expected[cookie] = 0, b""
            elif kind == TRIM:
                offset &= -BLOCK
                cookie, part = client.request(TRIM, offset, BLOCK)
                model[offset : offset + BLOCK] = bytes(BLOCK)
                expected[cookie] = 0, b""
            else:
                cookie, part = client.request(kind, 0, 0)
                expected[cookie] = EINVAL if kind == 77 else 0, b""
            message += part
        client.sock.sendall(message)
        got: dict[int, bytes] = {}
        while expected:
            reply = client.reply()
            error, data = expected[reply.cookie]
            assert reply.error == error
            got[reply.cookie] = got.get(reply.cookie, b"") + _payload(reply)
            if reply.done:
                assert got[reply.cookie] == data
                del expected[reply.cookie]


def _payload(reply: Chunk) -> bytes:
    """Of a READ, chunks in order."""
    if reply.kind == 1:
        return reply.payload[8:]
    return bytes(struct.unpack(">I", reply.payload[8:])[0]) if reply.kind == 2 else reply.payload


def test_it_is_for_who_waits_for_each_answer_and_for_nobody_else(
    serving: Serving, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "WINDOW", 0.05)  # however busy the machine is
    monkeypatch.setattr(polling, "LONG", 60.0)
    begun = calls(monkeypatch, Outbox, "begin")
    client.write(0, bytes(BLOCK))
    for _ in range(200):  # two at a time
        client.sock.sendall(client.request(READ, 0, 4 * KIB)[1] + client.request(READ, 0, 4 * KIB)[1])
        client.reply(), client.reply()
    assert not begun

    def wait_for_each() -> None:
        deadline = time.monotonic() + 60
        while not begun and time.monotonic() < deadline:
            assert client.read(0, 4 * KIB) == bytes(4 * KIB)
        assert begun
        del begun[:]

    wait_for_each()
    for _ in range(100):  # a sync takes longer than to wake somebody
        assert client.write(0, bytes(4 * KIB)) == client.call(FLUSH, 0, 0) == 0
    assert len(begun) <= 2
    del begun[:]
    wait_for_each()
    with closing(Client(serving.socket, "web")) as other:
        for _ in range(100):
            assert client.read(0, 4 * KIB) == other.read(0, 4 * KIB) == bytes(4 * KIB)
    assert len(begun) <= 1


def test_a_first_write_on_a_clone_begins_when_it_has_its_block(
    serving: Serving, client: Client, disk: Disk, always: None
) -> None:
    disk.free.set()
    client.write(0, b"s" * BLOCK)
    serving.run(serving.live.execute([Snapshot("web", "s"), Clone("s", "c")]))
    with closing(Client(serving.socket, "c")) as clone:
        disk.free.clear()
        cookie = clone.send(WRITE, 0, 4 * KIB, b"c" * 4 * KIB)
        begun = magic(clone)
        disk.free.set()
        assert rest(clone, begun)[:4] == (cookie, -1, True, 0)
        assert clone.read(0, BLOCK) == b"c" * 4 * KIB + b"s" * (BLOCK - 4 * KIB)
