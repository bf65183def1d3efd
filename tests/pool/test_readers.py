"""Reads that wait for the disk: each ends by itself, whatever the others do, and what they read stays in place."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import uvloop

from nbdthin.pool import readers as readers_module
from nbdthin.pool.data import DataFile
from nbdthin.pool.readers import MOST_ASKED, MOST_STALLED, SWEPT, Readers
from nbdthin.pool.threads import Threads

PAGE = 4096
COUNT = 64  # pages
CONTENT = bytes(os.urandom(COUNT * PAGE))

pytestmark = pytest.mark.interpreted("a class of ours cannot inherit from a compiled one")


class Disk(DataFile):
    """A real file, on a disk that does not begin what it refuses; some places fail, or hang until `free`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, COUNT * PAGE)
        self.bad: set[int] = set()
        self.stuck: set[int] = set()
        self.free = threading.Event()

    def read_into(self, view: memoryview, position: int, flags: int = 0) -> None:
        if flags:
            raise BlockingIOError(errno.EAGAIN, "not cached")
        if position in self.stuck:
            self.free.wait()
        if position in self.bad:
            raise OSError(errno.EIO, "injected")
        super().read_into(view, position)


class Beginning(Disk):
    """One that begins what it refuses: what is asked for again is there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: set[int] = set()

    def read_into(self, view: memoryview, position: int, flags: int = 0) -> None:
        if position in self.asked and position not in self.stuck | self.bad:
            flags = 0
        self.asked.add(position)
        super().read_into(view, position, flags)


class Bench:
    """Readers of a disk, and what has entered."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.entered = 0
        self.threads = Threads(asyncio.get_running_loop(), 16, "test-io")
        self.readers = Readers(asyncio.get_running_loop(), self.threads, disk, self._enter, self._leave)

    def _enter(self) -> int:
        self.entered += 1
        return 7

    def _leave(self, epoch: int) -> None:
        assert epoch == 7
        self.entered -= 1

    def read(self, page: int, pages: int = 2) -> asyncio.Future[bytes | int]:
        """As two segments; an error's number in place of what they hold."""
        future: asyncio.Future[bytes | int] = asyncio.get_running_loop().create_future()
        view = memoryview(bytearray(pages * PAGE))

        def ended(error: Exception | None) -> None:
            future.set_result(bytes(view) if error is None else getattr(error, "errno", 0) or 0)

        self.readers.expect([(page * PAGE, PAGE), ((page + 1) * PAGE, (pages - 1) * PAGE)], view, ended)
        return future

    def end(self) -> None:
        self.disk.free.set()
        self.readers.close()
        self.threads.end()


def content(page: int, pages: int = 2) -> bytes:
    return CONTENT[page * PAGE : (page + pages) * PAGE]


@pytest.fixture(params=[Disk, Beginning])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "data").write_bytes(CONTENT)
    disk: Disk = request.param(tmp_path / "data")
    yield disk
    disk.close()


def test_each_gets_what_it_asked_for_and_nothing_stays_entered(disk: Disk) -> None:
    async def main() -> None:
        bench = Bench(disk)
        pages = list(range(0, COUNT - 1)) * 3
        reads = [bench.read(page) for page in pages]
        assert bench.entered > 0
        assert await asyncio.gather(*reads) == [content(page) for page in pages]
        assert bench.entered == 0
        bench.end()

    uvloop.run(main())


def test_others_have_their_turn_between_large_reads_that_have_come(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "data").write_bytes(CONTENT)
        disk = Beginning(tmp_path / "data")
        disk.asked |= set(range(0, COUNT * PAGE, PAGE))
        bench = Bench(disk)
        pages = 16
        reads = [bench.read(page, pages) for page in range(0, COUNT, pages)]
        ended = [0]
        while ended[-1] < len(reads):
            await asyncio.sleep(0)
            ended.append(sum(read.done() for read in reads))
        assert max(after - before for before, after in itertools.pairwise(ended)) == SWEPT // (pages * PAGE)
        assert [read.result() for read in reads] == [content(page, pages) for page in range(0, COUNT, pages)]
        bench.end()
        disk.close()

    uvloop.run(main())


class Paced(Disk):
    """One whose reads take so long."""

    seconds = 0.0

    def read_into(self, view: memoryview, position: int, flags: int = 0) -> None:
        time.sleep(self.seconds)
        super().read_into(view, position, flags)


def test_the_loop_itself_waits_for_a_quick_disk_and_not_for_a_slow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers_module, "QUICK", 0.2)  # more than a busy machine takes

    async def main() -> None:
        (tmp_path / "data").write_bytes(CONTENT)
        disk = Paced(tmp_path / "data")
        bench = Bench(disk)
        view = memoryview(bytearray(2 * PAGE))

        def waited_for(page: int) -> bool:
            return bench.readers.wait_for([(page * PAGE, len(view))], view) and view == content(page)

        assert not waited_for(3), "nothing is known of the disk"
        await bench.read(3)
        assert waited_for(4) and waited_for(5)
        disk.bad = {6 * PAGE}
        assert not waited_for(6), "who finds out why is not the loop"
        disk.seconds = 0.3
        assert waited_for(7), "once"
        assert not waited_for(8)
        await bench.read(8)
        assert not waited_for(9)
        disk.seconds = 0.0
        await bench.read(9)
        assert waited_for(10)
        much = memoryview(bytearray(readers_module.TAKEN + PAGE))
        assert not bench.readers.wait_for([(0, len(much))], much)
        bench.end()
        disk.close()

    uvloop.run(main())


class Asked(Disk):
    """One that has to be asked for long."""

    def prefetch(self, segments: Sequence[tuple[int, int]]) -> None:
        self.free.wait()


def test_a_read_does_not_wait_for_many_that_only_ask_the_disk(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "data").write_bytes(CONTENT)
        disk = Asked(tmp_path / "data")
        bench = Bench(disk)
        assert all(bench.readers.prefetch([(0, PAGE)]) for _ in range(MOST_ASKED))
        assert not bench.readers.prefetch([(0, PAGE)])
        assert await bench.read(3) == content(3)
        disk.free.set()
        await asyncio.gather(*(bench.read(page) for page in range(20)))  # and those have ended before
        assert bench.readers.prefetch([(0, PAGE)])
        bench.end()
        disk.close()

    uvloop.run(main())


def test_an_error_reaches_its_request_alone(disk: Disk) -> None:
    async def main() -> None:
        bench = Bench(disk)
        disk.bad |= {0, 20 * PAGE, 40 * PAGE}
        reads = [bench.read(page) for page in range(0, COUNT, 2)]
        for page, found in zip(range(0, COUNT, 2), await asyncio.gather(*reads), strict=True):
            assert found == (errno.EIO if page * PAGE in disk.bad else content(page))
        assert bench.entered == 0
        bench.end()

    uvloop.run(main())


def test_reads_that_hang_hold_up_no_others_and_stay_entered(disk: Disk) -> None:
    async def main() -> None:
        bench = Bench(disk)
        disk.stuck |= {page * PAGE for page in range(0, 2 * (MOST_STALLED - 1), 2)}
        reads = {page: bench.read(page) for page in range(0, COUNT, 2)}
        stuck = [reads.pop(page) for page in range(0, 2 * (MOST_STALLED - 1), 2)]
        assert await asyncio.gather(*reads.values()) == [content(page) for page in reads]
        later = bench.read(COUNT - 2)
        assert await later == content(COUNT - 2)
        assert not any(read.done() for read in stuck)
        assert bench.entered == 1, "they came in one turn"
        disk.free.set()
        assert await asyncio.gather(*stuck) == [content(2 * number) for number in range(len(stuck))]
        assert bench.entered == 0
        bench.end()

    uvloop.run(main())


def test_a_read_that_comes_later_than_the_only_one_that_hangs_does_not_wait_for_it(disk: Disk) -> None:
    async def main() -> None:
        bench = Bench(disk)
        disk.stuck.add(0)
        stuck = bench.read(0)
        await asyncio.sleep(0.02)
        assert await bench.read(10) == content(10)
        assert not stuck.done()
        disk.free.set()
        assert await stuck == content(0)
        assert bench.entered == 0
        bench.end()

    uvloop.run(main())


def test_where_no_thread_can_be_started_its_requests_fail_and_later_ones_do_not(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        bench = Bench(disk)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", _refused)
            assert await bench.read(0) in (0, content(0))  # what the disk has begun comes without a thread
        assert await bench.read(10) == content(10)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", _refused)
            assert await asyncio.gather(*map(bench.read, (0, 20, 30))) == [content(0), content(20), content(30)]
        assert bench.entered == 0
        bench.end()

    uvloop.run(main())


def _refused(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_what_has_come_is_taken_even_where_all_that_may_be_waited_for_hang(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "data").write_bytes(CONTENT)
        disk = Beginning(tmp_path / "data")
        bench = Bench(disk)
        hanging = range(0, 2 * 2 * MOST_STALLED, 2)
        disk.stuck |= {page * PAGE for page in hanging}
        stuck = [bench.read(page) for page in hanging]
        assert await bench.read(COUNT - 2) == content(COUNT - 2)
        assert not any(read.done() for read in stuck)
        disk.free.set()
        assert await asyncio.gather(*stuck) == [content(page) for page in hanging]
        bench.end()
        disk.close()

    uvloop.run(main())


def test_pages_that_are_not_cached_come_from_a_real_disk(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "data").write_bytes(CONTENT)
        data = DataFile(tmp_path / "data", COUNT * PAGE)
        data.sync()
        os.posix_fadvise(data.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        loop = asyncio.get_running_loop()
        threads = Threads(loop, 16, "test-io")
        readers = Readers(loop, threads, data, lambda: 0, lambda epoch: None)
        views = [memoryview(bytearray(PAGE)) for _ in range(COUNT)]
        futures: list[asyncio.Future[Exception | None]] = [loop.create_future() for _ in range(COUNT)]
        for page in range(COUNT):
            readers.expect([(page * PAGE, PAGE)], views[page], futures[page].set_result)
        assert await asyncio.gather(*futures) == [None] * COUNT
        assert b"".join(views) == CONTENT
        readers.close()
        threads.end()
        data.close()

    uvloop.run(main())


def test_a_thread_hands_back_what_was_returned_or_raised_and_the_end_waits() -> None:
    async def main() -> None:
        threads = Threads(asyncio.get_running_loop(), 2, "test")
        assert await threads.run(lambda: 5) == 5
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0)
        begun, go = threading.Barrier(3), threading.Event()

        def work() -> None:
            begun.wait()
            go.wait()

        running = [threads.run(work) for _ in range(2)]
        third = threads.run(lambda: 3)
        await asyncio.to_thread(begun.wait)
        assert not third.done(), "there are two of them"
        assert sum(each.name == "test" for each in threading.enumerate()) == 2
        go.set()
        threads.end()
        assert third.done() and all(each.done() for each in running)

    uvloop.run(main())
