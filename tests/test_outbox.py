"""Replies on their way: in order, large ones read when they are sent, and a peer that takes nothing harms nobody."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvloop

from nbdthin import connection
from nbdthin.lent import Lent
from nbdthin.outbox import ARENA, HIGH, Outbox
from nbdthin.pool.live import LivePool
from nbdthin.pool.pool import Pool
from nbdthin.units import KiB, MiB
from nbdthin.ways import Ways
from tests.pagecache import is_cached
from tests.rawclient import FLUSH, READ, REFUSING, TRIM, Client, Serving, until

BLOCK = 64 * KiB

Pair = Callable[[], tuple[socket.socket, socket.socket]]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    Pool.init(tmp_path / "pool", size=16 * MiB)
    with Pool.open(tmp_path / "pool", policy=REFUSING) as pool:
        pool.create("mine", 8 * MiB)
        pool.create("theirs", 16 * MiB)
    with Serving(tmp_path / "pool", tmp_path / "s") as serving:
        yield serving


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the ranges that are put."""
    lengths = []
    real = Outbox.put_range

    def put_range(self: Outbox, position: int, length: int) -> None:
        lengths.append(length)
        real(self, position, length)

    monkeypatch.setattr(Outbox, "put_range", put_range)
    return lengths


@dataclass
class Boxed:
    """An outbox on one end of a socket pair, and what it has said."""

    live: LivePool
    box: Outbox
    theirs: socket.socket
    changed: list[bool]
    lost: list[OSError]


def tcp_pair(address: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    with socket.create_server((address, 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        return listener.accept()[0], theirs


@pytest.fixture
def lent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether large replies over unix sockets are lent: as it happens, only where more is read than these tests do."""
    lends: bool = request.param
    if lends:
        monkeypatch.setattr(Ways, "lends_next", lambda *_: True)
    return lends


LENDING = pytest.mark.interpreted("what is measured is told instead")
LENT_OR_NOT = pytest.mark.parametrize("lent", [pytest.param(True, marks=LENDING), False], indirect=True)
WAYS = pytest.mark.parametrize(
    ("lent", "pair"),
    [pytest.param(True, socket.socketpair, marks=LENDING), (False, socket.socketpair), (False, tcp_pair)],
    indirect=["lent"],
)


@asynccontextmanager
async def boxed(path: Path, pair: Pair = socket.socketpair) -> AsyncIterator[Boxed]:
    """On a new pool with a volume `v` of 8 MiB."""
    Pool.init(path, size=16 * MiB)
    with Pool.open(path) as pool:
        pool.create("v", 8 * MiB)
    live = LivePool(Pool.open(path, autocommit=False, policy=REFUSING))
    ours, theirs = pair()
    ours.setblocking(False)
    changed: list[bool] = []
    lost: list[OSError] = []
    arena = memoryview(bytearray(ARENA))
    box = Outbox(live, ours.fileno(), arena, lambda: changed.append(box.slow), lost.append)
    with ours, theirs:
        yield Boxed(live, box, theirs, changed, lost)
        box.close()
    await live.close()


async def comes_true(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - what it waits for has no event
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("structured", [False, True])
def test_a_large_read_is_read_when_it_is_sent_wherever_its_blocks_are(
    serving: Serving, ranges: list[int], structured: bool
) -> None:
    expected = bytearray(8 * MiB)
    with closing(Client(serving.socket, "mine", structured=structured)) as client:
        for number, block in enumerate((5, 3, 4, 40, 41, 42, 2, 9)):  # out of order on disk, with holes between
            part = os.urandom(BLOCK - number * 4 * KiB)
            expected[block * BLOCK : block * BLOCK + len(part)] = part
            assert client.write(block * BLOCK, part) == 0
        for offset, length in ((0, MiB), (40 * BLOCK, 3 * BLOCK), (3 * BLOCK + 512, BLOCK), (2 * BLOCK + 7, 3 * BLOCK)):
            assert client.read(offset, length) == expected[offset : offset + length]
    assert max(ranges) == BLOCK


@LENT_OR_NOT
def test_what_is_read_slowly_is_never_what_someone_else_has_written_there_since(serving: Serving, lent: bool) -> None:
    """Half of it is in the socket, and half of it waits, when its blocks are freed."""
    mine = os.urandom(MiB) * 8
    with (
        closing(Client(serving.socket, "mine")) as slow,
        closing(Client(serving.socket, "mine")) as remover,
        closing(Client(serving.socket, "theirs")) as other,
    ):
        for offset in range(0, 8 * MiB, MiB):
            assert remover.write(offset, mine[offset : offset + MiB]) == 0
        asked = [offset for _ in range(4) for offset in range(0, 8 * MiB, MiB)]
        slow.sock.sendall(b"".join(slow.request(READ, offset, MiB)[1] for offset in asked))
        until(lambda: any(each._outbox.slow for each in list(serving.server._connections)))
        assert remover.call(TRIM, 0, 8 * MiB) == 0
        # More than was ever free: it takes the blocks of `mine` once what waits has been copied, but for those few of
        # which the socket holds the pages.
        refused = [offset for offset in range(0, 15 * MiB, MiB) if other.write(offset, b"\xee" * MiB)]
        assert 1 <= len(refused) <= 3 if lent else not refused
        # What was asked for and not even begun when the blocks were freed reads as zeroes.
        got = [slow.reply() for _ in asked]
        for offset in refused:
            until(lambda at=offset: other.write(at, b"\xee" * MiB) == 0)  # type: ignore[misc]
    whole = [mine[:MiB], bytes(MiB)]
    assert [each.payload in whole for each in got] == [True] * len(asked)
    assert got[0].payload == mine[:MiB]


@pytest.mark.parametrize("structured", [False, True])
def test_small_replies_of_which_the_socket_takes_a_part_are_whole_in_the_end(
    serving: Serving, structured: bool
) -> None:
    data = os.urandom(8 * MiB)
    with closing(Client(serving.socket, "mine", structured=structured)) as client:
        for offset in range(0, len(data), MiB):
            assert client.write(offset, data[offset : offset + MiB]) == 0
        lengths = [512, 4096, 20000, 4096, 7, 31 * KiB]
        asked = [(number * 4111 % (7 * MiB), lengths[number % len(lengths)]) for number in range(2400)]
        requests = [client.request(READ, offset, length) for offset, length in asked]
        sender = threading.Thread(target=client.sock.sendall, args=(b"".join(each for _, each in requests),))
        sender.start()
        until(lambda: any(each._outbox.slow for each in list(serving.server._connections)))
        wanted = {cookie: data[o : o + n] for (cookie, _), (o, n) in zip(requests, asked, strict=True)}
        for _ in asked:
            reply = client.reply()
            assert reply.payload[8 * structured :] == wanted.pop(reply.cookie)
        sender.join()
    assert not wanted


@LENT_OR_NOT
def test_what_had_to_wait_leaves_in_the_order_in_which_it_was_put(tmp_path: Path, lent: bool) -> None:
    data = os.urandom(BLOCK)

    async def main() -> None:
        async with boxed(tmp_path / "pool") as it:
            box = it.box
            assert it.live.open("v").write_now(0, memoryview(data))
            ((position, _),) = it.live.open("v").volume.segments(0, BLOCK)
            wanted = bytearray()
            for _ in range(1024):  # with the range behind them, more than one system call takes
                wanted += b"-"
                box.put(b"-")
            for number in range(60):
                if number:
                    wanted += bytes([number]) * 5000
                    box.put(bytes([number]) * 5000)
                wanted += data
                box.put_range(position, BLOCK)
                if number % 3 == 0:
                    box.flush()
            box.flush()
            assert box.pending and box.slow
            got = await asyncio.to_thread(_receive, it.theirs, len(wanted))
            assert got == wanted
            await asyncio.sleep(0)
            assert (box.pending, box.slow, it.lost) == (0, False, [])
            assert not it.live.pool._readers

    uvloop.run(main())


def test_a_peer_that_catches_up_while_more_is_put_is_not_held_to_be_slow(tmp_path: Path) -> None:
    async def main() -> None:
        async with boxed(tmp_path / "pool") as it:
            box = it.box
            box.put(bytes(2 * HIGH))
            box.flush()
            assert it.changed == [True]
            box.put(bytes(HIGH // 2))  # of a request that ends just now: flushed a turn of the loop later
            await asyncio.to_thread(_receive, it.theirs, 2 * HIGH)
            await comes_true(lambda: box.pending == HIGH // 2)
            reading = asyncio.create_task(asyncio.to_thread(_receive, it.theirs, HIGH // 2))
            box.flush()
            await reading
            await comes_true(lambda: not box.pending)
            await asyncio.sleep(0)
            assert not box.slow
            assert it.changed[-1] is False

    uvloop.run(main())


def test_a_peer_that_is_gone_is_told_of_once_and_holds_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with boxed(tmp_path / "pool") as it:
            assert it.live.open("v").write_now(0, memoryview(bytes(range(256)) * 256))
            ((position, _),) = it.live.open("v").volume.segments(0, BLOCK)
            for _ in range(100):
                it.box.put_range(position, BLOCK)
            it.box.flush()
            assert it.live.pool._readers, "what waits has entered the pool"
            it.theirs.close()
            await comes_true(lambda: bool(it.lost))
            it.box.put(b"more")
            it.box.flush()
            assert (len(it.lost), it.box.pending, it.live.pool._readers) == (1, 0, {})

    uvloop.run(main())


@WAYS
def test_what_is_not_cached_any_more_when_it_is_sent_comes_from_the_disk(
    tmp_path: Path, lent: bool, pair: Pair
) -> None:
    data = os.urandom(32 * BLOCK)

    async def main() -> None:
        async with boxed(tmp_path / "pool", pair) as it:
            volume = it.live.open("v")
            for offset in range(0, len(data), BLOCK):
                assert volume.write_now(offset, memoryview(data[offset : offset + BLOCK]))
            await it.live.commit()
            it.box.put(b"|")
            for position, length in volume.volume.segments(0, len(data)):
                it.box.put_range(position, length)
            it.box.flush()
            assert it.box.pending or pair is tcp_pair
            os.posix_fadvise(it.live.pool.data.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            got = await asyncio.to_thread(_receive, it.theirs, len(data) + 1)
            assert got == b"|" + data
            await comes_true(lambda: not it.live.pool._readers)

    uvloop.run(main())


@WAYS
def test_a_disk_that_fails_while_a_range_is_sent_ends_the_connection_and_not_the_daemon(
    tmp_path: Path, lent: bool, pair: Pair
) -> None:
    async def main() -> None:
        async with boxed(tmp_path / "pool", pair) as it:
            assert it.live.open("v").write_now(0, memoryview(bytes(range(256)) * 256))
            ((position, _),) = it.live.open("v").volume.segments(0, BLOCK)
            assert it.live.pool.data.mapped(position, BLOCK) is not None
            os.truncate(it.live.pool.data.fd, position + BLOCK // 2)  # what is mapped behind it can be read no more
            it.box.put(b"-")
            it.box.put_range(position, BLOCK)
            it.box.flush()
            await comes_true(lambda: bool(it.lost))
            assert [each.errno for each in it.lost] == [errno.EIO]
            assert not it.live.pool._readers
            os.truncate(it.live.pool.data.fd, 16 * MiB)

    uvloop.run(main())


@WAYS
def test_after_a_failed_sync_nothing_that_the_disk_may_not_have_stays_mapped(
    tmp_path: Path, lent: bool, pair: Pair
) -> None:
    async def main() -> None:
        async with boxed(tmp_path / "pool", pair) as it:
            data = it.live.pool.data
            assert it.live.open("v").write_now(0, memoryview(bytes(range(256)) * 256))
            await it.live.commit()
            ((position, _),) = it.live.open("v").volume.segments(0, BLOCK)
            assert data.is_cached(position, BLOCK) and is_cached(data.fd, position, BLOCK)
            it.box.put_range(position, BLOCK)
            it.box.flush()
            assert await asyncio.to_thread(_receive, it.theirs, BLOCK) == bytes(range(256)) * 256
            await asyncio.to_thread(data.drop_cache)
            assert not is_cached(data.fd, position, BLOCK)
            assert data.mapped(position, BLOCK) is None

    uvloop.run(main())


def _tries(serving: Serving, client: Client, data: bytes, ranges: list[int]) -> Iterator[None]:
    """With nothing cached: a look at what is not cached asks the disk, which now and then has answered before the look
    is over.
    """
    assert client.write(0, data) == 0
    assert client.call(FLUSH, 0, 0) == 0
    for _ in range(20):
        ranges.clear()
        os.posix_fadvise(serving.live.pool.data.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        yield


def test_what_is_not_cached_is_read_in_a_thread(serving: Serving, ranges: list[int]) -> None:
    data = os.urandom(MiB)
    with closing(Client(serving.socket, "mine")) as client:
        for _ in _tries(serving, client, data, ranges):
            assert client.read(0, MiB) == data
            if not ranges:
                break
        assert ranges == []


def test_what_is_cached_is_told_from_what_is_so_in_part_right_after_something_was_not(
    serving: Serving, ranges: list[int]
) -> None:
    data = os.urandom(MiB)
    with closing(Client(serving.socket, "mine")) as client:
        for _ in _tries(serving, client, data, ranges):
            for start, length in ((2 * BLOCK, 2 * BLOCK), (0, BLOCK)):
                assert client.read(start, length) == data[start : start + length]
            assert client.read(0, 4 * BLOCK) == data[: 4 * BLOCK]  # of which the second block is not there
            if not ranges:
                break
        assert ranges == []
        assert client.read(0, 4 * BLOCK) == data[: 4 * BLOCK]
        assert ranges == [4 * BLOCK]


@pytest.mark.parametrize("lent", [pytest.param(True, marks=LENDING)], indirect=True)
def test_a_peer_that_goes_without_reading_gives_back_what_it_was_lent(tmp_path: Path, lent: bool) -> None:
    data = os.urandom(BLOCK)

    async def main() -> None:
        async with boxed(tmp_path / "pool") as it:
            live = it.live
            volume = live.open("v")
            assert volume.write_now(0, memoryview(data))
            await live.commit()
            ((position, _),) = volume.volume.segments(0, BLOCK)
            it.box.put_range(position, BLOCK)
            it.box.flush()
            used = live.pool.allocator.used
            assert volume.trim_now(0, BLOCK)
            await live.commit()
            await asyncio.sleep(0.2)
            assert (live.pool.allocator.used, live.pool.allocator.pending) == (used - 1, 1)
            it.box.close()
            await asyncio.sleep(0.2)
            assert live.pool.allocator.pending == 1  # the peer can still read it
            assert await asyncio.to_thread(it.theirs.recv, 100) == data[:100]
            it.theirs.close()
            await comes_true(lambda: not live.pool.allocator.pending)
            await comes_true(lambda: not live.lenders)

    uvloop.run(main())


def test_what_has_been_read_is_lent_no_more_nor_what_more_than_the_buffer_has_followed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        lent = Lent(ours)
        ours.send(b"unread")
        for number in range(100):
            lent.add(number * MiB, MiB)
        first = lent.unread()[0][0]
        held = (100 - first // MiB) * MiB
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < held < 3 * MiB
        assert lent.unread()[-1] == (99 * MiB, MiB)
        assert theirs.recv(100) == b"unread"
        assert lent.unread() == []


def test_over_tcp_within_the_machine_the_send_buffer_is_small() -> None:
    """Another address of this machine is taken for another one."""
    for address, size in (("127.0.0.1", connection.LOCAL_SEND_BUFFER), ("127.0.0.2", connection.SEND_BUFFER)):
        ours, theirs = tcp_pair(address)
        with ours, theirs:
            assert connection._send_buffer(theirs) == size


def _receive(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        data += sock.recv(min(length - len(data), MiB))
    return bytes(data)
