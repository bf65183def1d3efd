"""The pool in an event loop: commits are shared, and everything that runs at once stays apart."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from nbdthin.errors import Exists, NoSpace, PoolFailed
from nbdthin.pool import live as live_module
from nbdthin.pool import livevolume as volume_module
from nbdthin.pool.check import check
from nbdthin.pool.commands import Clone, Create, Remove, Rollback, Snapshot
from nbdthin.pool.live import LivePool
from nbdthin.pool.livevolume import LiveVolume
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import LEAF_BLOCKS
from tests.pool.conftest import kill
from tests.rawclient import REFUSING

KIB, MIB = 1 << 10, 1 << 20


def run(path: Path, work: Callable[[LivePool], Awaitable[None]], size: str = "64M") -> None:
    """Run `work` on a new pool, then check the pool, live and loaded again."""

    async def main() -> None:
        live = LivePool(Pool.open(path, autocommit=False, policy=REFUSING))
        try:
            await work(live)
            if live.pool.failed is None:
                await live.commit()
            assert check(live.pool) == []
        finally:
            if live.pool.failed is None:
                await live.close()
            else:
                with pytest.raises(PoolFailed):
                    live.pool.check_writable()
                await live.close()

    Pool.init(path, size=size, block_size="16K")
    uvloop.run(main())
    with Pool.open(path) as pool:
        assert check(pool) == []


async def write(volume: LiveVolume, offset: int, data: bytes) -> None:
    view = memoryview(data)
    if not (volume.write_small(offset, view) or volume.write_now(offset, view)):
        await volume.write(offset, view)


async def read(volume: LiveVolume, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    segments = volume.volume.segments(offset, length)
    if not volume.read_now(segments, view):
        ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        volume.read(segments, view, ended.set_result, ask=True)
        assert await ended is None
    return bytes(view)


async def merged(live: LivePool) -> None:
    """Return when the background has merged all that there is to merge."""
    while live.merging is not None:
        await live.merging


def test_writers_that_flush_at_once_share_their_commits(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 8 * MIB)])
        volume = live.open("web")
        before = live.commits

        async def writer(index: int) -> None:
            for turn in range(10):
                await write(volume, (index * 10 + turn) * 4096, b"x" * 4096)
                await live.commit()

        await asyncio.gather(*(writer(index) for index in range(16)))
        assert 10 <= live.commits - before <= 40, "160 flushes"

    run(tmp_path / "pool", work)


def test_a_flush_of_an_overwrite_writes_no_journal(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 8 * MIB)])
        volume = live.open("web")
        await write(volume, 0, b"a" * 4096)
        await live.commit()
        sequence = live.pool.journal.sequence
        await write(volume, 0, b"b" * 4096)
        await live.commit()
        assert live.pool.journal.sequence == sequence
        assert not live.pool.has_changes

    run(tmp_path / "pool", work)


def test_a_thousand_clones_are_one_commit_and_no_data(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 8 * MIB)])
        await write(live.open("web"), 0, b"a" * MIB)
        await live.execute([Snapshot("web", "web@1")])
        used, sequence = live.pool.allocator.used, live.pool.journal.sequence
        await live.execute([Clone("web@1", f"clone-{index}") for index in range(1000)])
        assert (live.pool.allocator.used, live.pool.journal.sequence) == (used, sequence + 1)
        assert await read(live.open("clone-999"), 0, MIB) == b"a" * MIB

    run(tmp_path / "pool", work)


def test_a_batch_with_one_refusal_changes_nothing(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 8 * MIB)])
        with pytest.raises(Exists):
            await live.execute([Create("new", MIB), Snapshot("web", "s"), Create("web", MIB)])
        assert set(live.pool.state.names) == {"web"}

    run(tmp_path / "pool", work)


def test_what_a_removed_volume_held_can_be_written_again_at_once(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("a", 16 * MIB), Create("b", 16 * MIB)])
        room = live.pool.allocator.capacity * 16 * KIB
        data = random.Random(1).randbytes(room)
        for offset in range(0, room, 512 * KIB):
            await write(live.open("a"), offset, data[offset : offset + 512 * KIB])
        with pytest.raises(NoSpace):
            await write(live.open("b"), 0, b"x")
        await live.execute([Remove("a")])
        for offset in range(0, room, 512 * KIB):
            await write(live.open("b"), offset, data[offset : offset + 512 * KIB])
        assert await read(live.open("b"), 0, room) == data

    run(tmp_path / "pool", work, size="4M")


def test_a_failed_sync_is_final_and_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 8 * MIB)])
        volume = live.open("web")
        await write(volume, 0, b"a" * 4096)

        def fail() -> None:
            raise OSError(5, "injected")

        monkeypatch.setattr(live.pool.data, "sync", fail)
        results = await asyncio.gather(*(live.commit() for _ in range(4)), return_exceptions=True)
        assert [type(result) for result in results] == [PoolFailed] * 4
        monkeypatch.undo()
        with pytest.raises(PoolFailed):
            await live.commit()
        with pytest.raises(PoolFailed):
            await write(volume, 0, b"b")
        with pytest.raises(PoolFailed):
            await live.execute([Create("new", MIB)])
        assert await read(volume, 0, 4096) == b"a" * 4096

    run(tmp_path / "pool", work)


def test_an_overwrite_is_synced_at_once_where_that_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And left to the thread when there is metadata, or much data, or the disk was slow, or a commit is under way."""

    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 8 * MIB)])
        volume = live.open("web")
        syncs: list[str] = []
        real = live.pool.data.sync

        def sync() -> None:
            syncs.append(threading.current_thread().name)
            real()

        monkeypatch.setattr(live.pool.data, "sync", sync)
        monkeypatch.setattr(live, "_sync_took", 0.0001)
        assert not live.commit_now(), "nothing has changed"
        await write(volume, 0, b"a" * 4096)
        assert not live.commit_now(), "a new block"
        await live.commit()
        assert syncs == ["nbdthin-sync"]
        await write(volume, 0, b"b" * 4096)
        monkeypatch.setattr(live, "_sync_took", 0.002)
        assert not live.commit_now(), "a slow disk"
        monkeypatch.setattr(live, "_sync_took", 0.0001)
        assert live.commit_now()
        assert syncs == ["nbdthin-sync", "MainThread"]
        assert not live.pool.has_changes
        await write(volume, 0, b"c" * 4096)
        under_way = live.durable()
        assert not live.commit_now(), "a commit is under way"
        assert under_way is not None
        await under_way
        for _ in range(65):
            await write(volume, 0, b"d" * 4096)
        monkeypatch.setattr(live, "_sync_took", 0.0001)
        assert not live.commit_now(), "more than a little"
        await live.commit()
        assert syncs == ["nbdthin-sync", "MainThread", "nbdthin-sync", "nbdthin-sync"]

    run(tmp_path / "pool", work)


def test_those_who_flush_after_each_write_share_one_sync_of_a_slow_disk_however_they_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, many = 20, 8

    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 8 * MIB)])
        volume = live.open("web")
        await write(volume, 0, bytes(many * 16 * KIB))
        await live.commit()
        syncs = 0
        real = live.pool.data.sync

        def sync() -> None:
            nonlocal syncs
            syncs += 1
            real()
            time.sleep(0.02)

        async def writer(number: int) -> None:
            await asyncio.sleep(0.01 * (number % 2))  # so that half of them come during the first sync
            for _ in range(rounds):
                await write(volume, number * 16 * KIB, bytes(4096))
                await live.commit()

        monkeypatch.setattr(live.pool.data, "sync", sync)
        monkeypatch.setattr(live, "_sync_took", 1.0)
        monkeypatch.setattr(live_module, "MOST_GATHERING", 60.0)
        await asyncio.gather(*map(writer, range(many)))
        assert rounds <= syncs <= rounds + 2

    run(tmp_path / "pool", work)


@pytest.mark.parametrize(("many", "begins"), [(8, True), (4, False)])
def test_the_disk_begins_with_what_many_flush_while_the_rest_of_them_is_heard_who_share_the_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int, begins: bool
) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 8 * MIB)])
        volume = live.open("web")
        await write(volume, 0, bytes(MIB))
        await live.commit()
        monkeypatch.setattr(live_module, "QUICK_SYNC", 60.0)  # this disk is
        monkeypatch.setattr(live_module, "SLOW_SYNC", 60.0)
        calls: list[str] = []

        def watch(name: str) -> None:
            real = getattr(live.pool.data, name)

            def called() -> None:
                calls.append(name)
                real()

            monkeypatch.setattr(live.pool.data, name, called)

        watch("begin_sync")
        watch("sync")

        async def flush(turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            await write(volume, 0, bytes(4096))
            await live.commit()

        live.flushes = 100
        await asyncio.gather(*(flush(0) for _ in range(many)))
        assert calls == ["sync"]
        calls.clear()
        await asyncio.gather(*(flush(2 * (number >= many / 2)) for number in range(many)))
        assert calls == (["begin_sync", "sync"] if begins else ["sync", "sync"])
        calls.clear()
        await asyncio.gather(*(flush(0) for _ in range(many)))
        assert calls == ["sync"], "nobody is missing"
        calls.clear()
        live.flushes = 0
        await asyncio.gather(*(flush(0) for _ in range(many // 8 + 1)))
        assert calls == ["sync"], "somebody does something else, too"

    run(tmp_path / "pool", work)


def test_a_sync_waits_for_nobody_who_is_not_expected_and_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 8 * MIB)])
        volume = live.open("web")

        async def change_and_commit() -> None:
            monkeypatch.setattr(live, "_sync_took", 1.0)  # this disk is slow
            await write(volume, 0, bytes(4096))
            await live.commit()

        await change_and_commit()
        monkeypatch.setattr(live_module, "MOST_GATHERING", 3600.0)
        for _ in range(3):
            await change_and_commit()  # alone
        await asyncio.gather(change_and_commit(), change_and_commit())
        monkeypatch.setattr(live_module, "MOST_GATHERING", 0.001)
        await change_and_commit()  # the other one has gone
        monkeypatch.setattr(live_module, "MOST_GATHERING", 3600.0)
        for _ in range(3):
            await change_and_commit()

    run(tmp_path / "pool", work)


def test_a_sync_that_fails_in_the_loop_is_as_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 8 * MIB)])
        volume = live.open("web")
        await write(volume, 0, b"a" * 4096)
        await live.commit()
        await write(volume, 0, b"b" * 4096)

        def fail() -> None:
            raise OSError(5, "injected")

        monkeypatch.setattr(live.pool.data, "sync", fail)
        monkeypatch.setattr(live, "_sync_took", 0.0001)
        with pytest.raises(PoolFailed):
            live.commit_now()
        monkeypatch.undo()
        with pytest.raises(PoolFailed):
            await live.commit()
        with pytest.raises(PoolFailed):
            await write(volume, 0, b"c" * 4096)

    run(tmp_path / "pool", work)


@pytest.mark.parametrize("cloned", [False, True])
@pytest.mark.parametrize("how", ["trim", "zero"])
def test_a_discard_of_many_leaves_lets_others_run_and_keeps_what_surrounds_it(
    tmp_path: Path, cloned: bool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = LEAF_BLOCKS * 16 * KIB
    size = (volume_module.DROPPED + 8) * leaf
    monkeypatch.setattr(volume_module, "DISCARDING", 0)  # seconds: every piece takes longer

    async def work(live: LivePool) -> None:
        await live.execute([Create("web", size)])
        volume = live.open("web")
        places = [number * leaf + 5000 * number for number in range(size // leaf)]
        for place in places:
            await write(volume, place, b"x" * 9000)
        if cloned:
            await live.execute([Snapshot("web", "s")])
            for place in places[::2]:
                await write(volume, place, b"y" * 9000)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        start, end = places[1], places[-2] + 9000  # the ends within a subblock
        counting = asyncio.create_task(count())
        if how == "trim":
            assert not volume.trim_now(start, end - start)
            await volume.trim(start, end - start)
        else:
            assert not volume.zero_now(start, end - start)
            await volume.write_zeroes(start, end - start, False)
        counting.cancel()
        assert turns > (size // leaf - 4 if cloned else 1)
        for place in places[2:-2]:
            assert await read(volume, place, 9000) == bytes(9000)
        for place in (places[0], places[-1]):
            assert set(await read(volume, place, 9000)) <= {*b"xy"}
        if cloned:
            assert await read(live.open("s"), places[3], 9000) == b"x" * 9000

    run(tmp_path / "pool", work)


REGION = 40_000  # bytes: neighbours share a subblock and a block
REGIONS = 6


class Region:
    """A part of the volume that one task writes, with all states it has been in."""

    def __init__(self, volume: LiveVolume, index: int, seed: int) -> None:
        self.volume = volume
        self.base = index * REGION + 13
        self.random = random.Random(seed * 100 + index)
        self.content = bytearray(REGION)
        self.history = [bytes(REGION)]  # the last is what an operation under way will leave

    async def step(self) -> None:
        start = self.random.randrange(REGION)
        length = min(self.random.choice((1, 512, 4096, 9000, 30_000)), REGION - start)
        kind = self.random.random()
        if kind < 0.7:
            data = self.random.randbytes(length)
            await self._change(start, data, write(self.volume, self.base + start, data))
        elif kind < 0.85:
            work = self.volume.write_zeroes(self.base + start, length, self.random.random() < 0.3)
            await self._change(start, bytes(length), work)
        else:
            assert await read(self.volume, self.base, REGION) == self.content

    async def _change(self, start: int, data: bytes, work: Awaitable[None]) -> None:
        self.content[start : start + len(data)] = data
        self.history.append(bytes(self.content))
        await work


@pytest.mark.parametrize("seed", range(4))
def test_writes_snapshots_removals_and_merges_at_once_stay_apart(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every snapshot holds, of each region, a state between what was answered before and what was asked after."""
    monkeypatch.setattr(volume_module, "INLINE_WRITE", 5000)  # so that many writes spend time in threads

    async def work(live: LivePool) -> None:
        chance = random.Random(seed)
        await live.execute([Create("web", 8 * MIB)])
        volume = live.open("web")
        regions = [Region(volume, index, seed) for index in range(REGIONS)]
        running = True

        async def writer(region: Region) -> None:
            while running:
                await region.step()
                if region.random.random() < 0.1:
                    await live.commit()
                await asyncio.sleep(0)

        async def evict() -> None:
            while running:
                await live.commit()
                os.posix_fadvise(live.pool.data.fd, 0, 0, os.POSIX_FADV_DONTNEED)
                await asyncio.sleep(0.002)

        tasks = [asyncio.create_task(writer(region)) for region in regions]
        tasks.append(asyncio.create_task(evict()))
        taken: dict[str, list[tuple[int, int]]] = {}
        for index in range(40):
            name = f"s{index}"
            before = [len(region.history) - 2 for region in regions]
            await live.execute([Snapshot("web", name)])
            taken[name] = [(max(first, 0), len(region.history)) for first, region in zip(before, regions, strict=True)]
            if chance.random() < 0.3:
                await live.execute([Clone(name, f"c{index}")])
                await write(live.open(f"c{index}"), 70_000, b"clone")
            while len(taken) > 3 and chance.random() < 0.7:
                gone = chance.choice(list(taken))
                del taken[gone]
                await live.execute([Remove(gone)])
            for kept, bounds in taken.items():
                for region, (first, last) in zip(regions, bounds, strict=True):
                    found = await read(live.open(kept), region.base, REGION)
                    assert found in region.history[first:last], f"{kept} at {region.base}"
            clones = [other for other in live.pool.state.names if other.startswith("c")]
            if clones and chance.random() < 0.3:
                await live.execute([Remove(chance.choice(clones))])
        running = False
        await asyncio.gather(*tasks)
        for region in regions:
            assert await read(volume, region.base, REGION) == region.content
        keep = next(iter(taken))
        expected = await read(live.open(keep), 0, REGION * REGIONS)
        await live.execute([Rollback("web", keep)])
        assert await read(volume, 0, REGION * REGIONS) == expected
        await live.execute([Remove(name) for name in live.pool.state.names if name != "web"])
        await merged(live)
        assert await read(volume, 0, REGION * REGIONS) == expected

    run(tmp_path / "pool", work)


def test_whoever_holds_several_ranges_and_whoever_wants_all_of_them_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("web", 64 * MIB)])
        volume = live.open("web")
        leaf = LEAF_BLOCKS * live.pool.block_size

        async def merge() -> None:
            async with volume.hold_leaves([0, 2]):
                await asyncio.sleep(0)

        async with volume.hold_leaves([0]):
            merging = asyncio.create_task(merge())
            await asyncio.sleep(0)
            writing = asyncio.create_task(volume.write(0, memoryview(bytes(3 * leaf))))
            await asyncio.sleep(0)
        done, waiting = await asyncio.wait((merging, writing), timeout=60)
        assert (len(done), waiting) == (2, set())
        await writing

    run(tmp_path / "pool", work)


def test_a_removal_waits_a_moment_where_very_many_layers_are_to_be_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "MERGE_MOST", 0)
    monkeypatch.setattr(live_module, "MERGE_WAIT", 3600.0)

    async def work(live: LivePool) -> None:
        await live.execute([Create("web", MIB)])
        volume = live.open("web")
        for name in ("first", "second"):
            await write(volume, 0, name.encode() * 100)
            await live.execute([Snapshot("web", name)])
        await write(volume, 0, b"third" * 100)
        async with volume.hold_leaves([0]):  # so that the layer of `second` cannot be merged into the volume's
            await live.execute([Remove("second")])
            removal = asyncio.create_task(live.execute([Remove("first")]))
            await live.execute([Create("another", MIB)])
            assert not removal.done()
            assert live.pool.state.mergeable
        await removal
        await merged(live)
        assert not live.pool.state.mergeable

    run(tmp_path / "pool", work)


def test_what_a_crash_left_in_free_blocks_goes_back_to_the_file_system(tmp_path: Path) -> None:
    """The process ended between a write and the commit that would have made it so."""
    path = tmp_path / "pool"
    Pool.init(path, size="256M", block_size="64K")
    pool = Pool.open(path, autocommit=False)
    pool.unsynced.start(pool.journal.sequence + 1)
    pool.create("kept", 8 * MIB)
    pool.volume("kept").write(0, b"kept" * 64 * KIB)
    pool.commit()
    pool.create("lost", 128 * MIB)
    pool.volume("lost").write(0, b"lost" * 25 * MIB)
    kill(pool)
    taken = (path / "data").stat().st_blocks * 512
    assert taken > 100 * MIB

    async def main() -> None:
        live = LivePool(Pool.open(path, autocommit=False))
        while live._tasks:
            await asyncio.wait(list(live._tasks))
        assert check(live.pool) == []
        assert live.pool.allocator.pending == 0
        assert await read(live.open("kept"), 0, 256 * KIB) == b"kept" * 64 * KIB
        await live.close()

    uvloop.run(main())
    assert (path / "data").stat().st_blocks * 512 < 2 * MIB
