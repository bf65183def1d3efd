"""Disks that fail: each call that the engine makes of its files refuses once, in histories that use all of them.

What must hold is the same everywhere: a request or command whose data the disk refused gets the error and nobody else;
a sync, or a journal write, that fails is the last word (the pool is read-only, reads go on, everybody is told); what
serves tidiness (checkpoints, punching, the next segment, old files) may fail at no cost. Afterwards the pool opens with
all that was answered.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType

import pytest
import uvloop
from simulatelib import directed
from simulatelib import run as simulate
from simulatelib.judge import contents
from simulatelib.livework import LiveWork
from simulatelib.record import Recorder
from simulatelib.run import BLOCK
from simulatelib.watched import WatchedPool
from simulatelib.work import Work

from nbdthin.errors import NotFound, PoolFailed
from nbdthin.pool.check import check
from nbdthin.pool.commands import Create
from nbdthin.pool.data import DataFile
from nbdthin.pool.files import Files
from nbdthin.pool.journal import Journal
from nbdthin.pool.live import LivePool
from nbdthin.pool.pool import Batch, Pool
from nbdthin.pool.unsynced import Unsynced
from tests.rawclient import EIO, ENOSPC, Client, Serving

Buffer = bytes | bytearray | memoryview
WRITES = ("short", "nothing", "EIO", "ENOSPC")
OTHERS = ("EIO",)


class Faulty(Recorder):
    """Real files; one call refuses, or writes half or nothing. Which: `fail_at`, counted from `arm` on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._kind = ""
        self.calls: list[str] = []  # since `arm`: what each was
        self.fail_at = -1
        self.fault = ""
        self.hit = ""  # the call that failed
        self.final = False  # it was part of a commit, and nothing that can be done without or later

    def arm(self, fail_at: int, fault: str, kind: str = "") -> None:
        """With `kind`, only calls of that kind are counted."""
        self.calls, self.fail_at, self.fault, self._kind = [], fail_at, fault, kind

    def _due(self, what: str) -> bool:
        with self._lock:
            if self._kind not in ("", what):
                return False
            self.calls.append(what)
            if len(self.calls) - 1 != self.fail_at:
                return False
            self.hit = what
            stack = set(_callers(sys._getframe(2)))
            harmless = {Journal._mark.__code__, Unsynced.publish.__code__}
            if self.fault == "ENOSPC":  # no room for another segment, and nothing is written yet
                harmless |= {Journal._prepare.__code__, Journal._lengthen.__code__}
                harmless |= {Journal._rotate.__code__} if what == "rename" else set()
            self.final |= Batch.sync.__code__ in stack and not stack & harmless
            return True

    def _refuse(self, what: str) -> None:
        if self._due(what):
            raise self._error()

    def _error(self) -> OSError:
        code = getattr(errno, self.fault)
        return OSError(code, os.strerror(code))

    def write(self, fd: int, data: Buffer, position: int) -> int:  # type: ignore[override]
        if not self._due("write"):
            return super().write(fd, data, position)
        if self.fault == "nothing":
            return 0
        if self.fault == "short":
            return super().write(fd, data[: (len(data) + 1) // 2], position)
        raise self._error()

    def open(self, path: Path, flags: int) -> int:
        self._refuse("open")
        return super().open(path, flags)

    def sync(self, fd: int) -> None:
        self._refuse("sync")
        super().sync(fd)

    def sync_directory(self, path: Path) -> None:
        self._refuse("sync_directory")
        super().sync_directory(path)

    def truncate(self, fd: int, size: int) -> None:
        self._refuse("truncate")
        super().truncate(fd, size)

    def punch(self, fd: int, position: int, length: int) -> None:
        self._refuse("punch")
        super().punch(fd, position, length)

    def rename(self, old: Path, new: Path) -> None:
        self._refuse("rename")
        super().rename(old, new)

    def unlink(self, path: Path) -> None:
        self._refuse("unlink")
        super().unlink(path)


def _callers(frame: FrameType | None) -> Iterator[CodeType]:
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _faults(what: str) -> tuple[str, ...]:
    if what == "write":
        return WRITES
    return ("EIO", "ENOSPC") if what in ("open", "rename", "sync") else OTHERS


def _history(root: Path, history: Callable[[Work], None], fail_at: int, fault: str) -> Faulty:
    """Run a history with one fault, and hold the pool to what it must be then and when it is opened again."""
    root.mkdir()
    Pool.init(root / "pool", size=24 * BLOCK, block_size=BLOCK)
    files = Faulty(root)
    pool = simulate.start(files, root / "pool")
    work = Work(random.Random(0), files, pool, nested=False)
    directed._prepare(work)
    files.arm(fail_at, fault)
    try:
        work.run_one(history)
    except NotFound:  # a command of the history was refused, and another one needs it
        assert work.errors
        work.finish()
    pool = work.pool
    oracle = work.oracle
    if fault in ("EIO", "ENOSPC") and files.hit:
        assert (pool.failed is not None) == files.final
    if pool.failed is not None:
        assert files.final and files.fault != "short"
        assert pool.info().failed == pool.failed
        with pytest.raises(PoolFailed):
            pool.create("late", BLOCK)
        for name in pool.state.names:
            if not pool.volume(name).read_only:
                with pytest.raises(PoolFailed):
                    pool.volume(name).write(0, b"x")
    assert len(work.errors) <= 1
    pool.close()
    with Pool.open(root / "pool") as again:
        assert check(again) == []
        oracle.judge(oracle.bounds(len(files.log)), again.journal.sequence, contents(again))
        again.create("late", BLOCK)
        assert check(again) == []
    return files


HISTORIES = ("delete", "merge_with_copies", "resize", "trim", "checkpoint", "rotation")


@pytest.mark.interpreted("which call it was is looked up in frames, of which compiled code has none")
@pytest.mark.parametrize("name", HISTORIES)
def test_each_call_of_a_history_may_fail_once(name: str) -> None:
    history = directed.HISTORIES[name]
    with simulate.small(), simulate.scratch() as directory:
        calls = _history(directory / "sound", history, -1, "").calls
        assert {"write", "sync"} <= set(calls)
        for index, what in enumerate(calls):
            for fault in _faults(what):
                files = _history(directory / f"{index}{fault}", history, index, fault)
                assert files.hit == what, "the history was another one before the fault"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_init_is_all_or_nothing_whatever_fails(code: int) -> None:
    with simulate.small(), simulate.scratch() as directory:
        for fail_at in range(100):
            root = directory / str(fail_at)
            root.mkdir()
            files = Faulty(root)
            files.arm(fail_at, errno.errorcode[code])
            try:
                Pool.init(root / "above" / "pool", size=24 * BLOCK, block_size=BLOCK, files=files)
            except Exception:
                assert list(root.iterdir()) == []
                Pool.init(root / "above" / "pool", size=24 * BLOCK, block_size=BLOCK)
            else:
                assert not files.hit
            with Pool.open(root / "above" / "pool") as pool:
                assert check(pool) == []
            if not files.hit:
                return
    pytest.fail("no call of init failed")


# -- the live pool


def _live(root: Path, fail_at: int, fault: str, kind: str = "") -> tuple[Faulty, LiveWork]:
    """Writers and commands with one fault; the pool must end as it says it does."""
    root.mkdir()
    Pool.init(root / "pool", size=72 * BLOCK, block_size=BLOCK)
    files = Faulty(root)
    pool: WatchedPool = simulate.start(files, root / "pool", exact=False)
    work = LiveWork(1, files, pool, steps=12)
    files.arm(fail_at, fault, kind)

    async def at_end(live: LivePool) -> None:
        if pool.failed is None:
            return
        refused: list[Callable[[], Awaitable[None]]] = [live.commit, lambda: live.execute([Create("late", BLOCK)])]
        if "a" in pool.state.names:
            volume = live.open("a")
            refused.append(lambda: volume.write(0, memoryview(b"x")))
            with pytest.raises(PoolFailed):
                volume.write_now(0, memoryview(b"x"))
        for each in refused:
            with pytest.raises(PoolFailed):
                await each()

    try:
        uvloop.run(work.run(at_end))
    except PoolFailed:  # the last commit of all: whoever closes is told
        assert pool.failed is not None
    with Pool.open(root / "pool") as again:
        assert check(again) == []
        oracle = work._oracle
        oracle.judge(oracle.bounds(len(files.log)), again.journal.sequence, contents(again))
    return files, work


@pytest.mark.interpreted("which call it was is looked up in frames, of which compiled code has none")
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "short", "nothing"])
def test_any_call_of_a_live_pool_may_fail_once(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(fault)
    with simulate.small(), simulate.scratch() as directory:
        calls = _live(directory / "sound", -1, "")[0].calls
        assert {"write", "sync", "rename", "unlink", "punch", "sync_directory"} <= set(calls)
        kinds = ["write"] if fault in ("short", "nothing") else sorted(set(calls))
        for what in kinds:
            count = calls.count(what)
            for index in sorted(chance.sample(range(count), min(12, count))):
                caplog.clear()
                files, work = _live(directory / f"{what}{index}", index, fault, what)
                failed = work.pool.failed is not None
                if fault in ("EIO", "ENOSPC") and files.hit:
                    assert failed == files.final
                assert len(work.errors) <= 1
                said = [record for record in caplog.records if record.levelno >= logging.ERROR]
                assert len(said) == failed, [record.getMessage() for record in said]
                assert not any(record.exc_info for record in caplog.records)


# -- through the server


class Failing(Files):
    """Real files; while `code` is set, writes of data at or behind a position of the data file are refused."""

    def __init__(self) -> None:
        self.code = 0
        self.syncs = True

    def write(self, fd: int, data: Buffer, position: int) -> int:  # type: ignore[override]
        if self.code and position >= BLOCK:
            raise OSError(self.code, os.strerror(self.code))
        return os.pwrite(fd, data, position)

    def sync(self, fd: int) -> None:
        if not self.syncs:
            raise OSError(errno.EIO, "injected")
        super().sync(fd)


FUA, FLUSH = 1, 3


@pytest.fixture
def served(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    Pool.init(path, size=64 * BLOCK, block_size=BLOCK)
    with Pool.open(path) as pool:
        pool.create("web", 8 * BLOCK)
        pool.volume("web").write(0, b"a" * BLOCK)
        pool.volume("web").write(2 * BLOCK, b"c" * BLOCK)
        pool.snapshot("web", "web@1")
    return path


@pytest.mark.parametrize(("code", "answer"), [(errno.EIO, EIO), (errno.ENOSPC, ENOSPC)])
@pytest.mark.parametrize("length", [4096, BLOCK, 40 * 1024])
def test_an_error_of_a_data_write_reaches_its_request_alone(
    served: Path, tmp_path: Path, code: int, answer: int, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    files = Failing()
    with Serving(served, tmp_path / "sock", files=files) as serving:
        client, other = Client(tmp_path / "sock", "web"), Client(tmp_path / "sock", "web@1")
        files.code = code
        assert client.write(BLOCK * 4, b"x" * length) == answer
        assert client.write(BLOCK * 4 + 100, b"x" * length, FUA) == answer
        assert client.call(FLUSH, 0, 0) == 0
        assert other.read(0, BLOCK) == b"a" * BLOCK
        files.code = 0
        assert client.write(BLOCK * 4, b"y" * length, FUA) == 0
        assert client.read(BLOCK * 4, length) == b"y" * length
        assert serving.live.pool.failed is None
        client.close()
        other.close()
    assert not any(record.exc_info for record in caplog.records)
    with Pool.open(served) as pool:
        assert pool.volume("web").read(BLOCK * 4, length) == b"y" * length


@pytest.mark.parametrize("short", [False, True])
def test_an_error_of_a_data_read_reaches_its_request_alone(
    served: Path, tmp_path: Path, short: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A short read is an error too: what is missing is never made up."""
    bad: set[int] = set()
    real = DataFile.read_into

    def read_into(self: DataFile, view: memoryview, position: int, flags: int = 0) -> None:
        if position in bad:
            if not short:
                raise OSError(errno.EIO, "injected")
            position = os.fstat(self.fd).st_size - len(view) // 2  # its end is in the middle of the range
        real(self, view, position, flags)

    monkeypatch.setattr(DataFile, "read_into", read_into)
    with Serving(served, tmp_path / "sock") as serving:
        volume = serving.live.open("web").volume
        bad.add(volume.segments(0, BLOCK)[0][0])
        client, other = Client(tmp_path / "sock", "web"), Client(tmp_path / "sock", "web@1")
        cookie = client.send(0, 0, 3 * BLOCK)  # of two segments and a hole: not what the server reads by itself
        reply = client.reply()
        assert (reply.cookie, reply.error) == (cookie, EIO)
        assert client.read(2 * BLOCK - 512, BLOCK) == bytes(512) + b"c" * (BLOCK - 512)
        bad.clear()
        assert other.read(0, 3 * BLOCK) == b"a" * BLOCK + bytes(BLOCK) + b"c" * BLOCK
        assert client.write(BLOCK * 4, b"y" * 512, FUA) == 0
        client.close()
        other.close()
    assert not any(record.exc_info for record in caplog.records)


def test_a_failed_sync_is_told_to_every_waiter_and_reads_go_on(
    served: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Failing()
    with Serving(served, tmp_path / "sock", files=files) as serving:
        clients = [Client(tmp_path / "sock", "web") for _ in range(4)]
        assert clients[0].write(0, b"b" * 4096) == 0
        files.syncs = False
        cookies = [client.send(FLUSH, 0, 0) for client in clients]
        replies = [client.reply() for client in clients]
        assert [(reply.cookie, reply.error) for reply in replies] == [(cookie, EIO) for cookie in cookies]
        files.syncs = True  # as Linux has it: the next one would succeed
        assert clients[1].call(FLUSH, 0, 0) == EIO
        assert clients[1].write(0, b"z" * 4096) == EIO
        assert clients[2].read(0, 4096) == b"b" * 4096
        clients.append(Client(tmp_path / "sock", "web@1"))
        assert clients[4].read(0, 4096) == b"a" * 4096
        assert serving.live.pool.info().failed is not None
        for client in clients:
            client.close()
    said = [record for record in caplog.records if "a sync failed" in record.getMessage()]
    assert len(said) == 1 and not any(record.exc_info for record in caplog.records)
    with Pool.open(served) as pool:
        assert check(pool) == []
