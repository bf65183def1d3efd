"""Checksums and scrubs in the live pool: beside everything else that goes on, and without false alarms."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from nbdthin.errors import NotFound
from nbdthin.pool import live as live_module
from nbdthin.pool import sums
from nbdthin.pool.check import check
from nbdthin.pool.commands import Clone, Command, Create, Remove, Rollback, Snapshot
from nbdthin.pool.live import LivePool
from nbdthin.pool.pool import Pool
from nbdthin.pool.rows import Finding, Scrubbed
from nbdthin.pool.verifying import Pace
from nbdthin.units import GiB, KiB, MiB
from tests.pool.conftest import flip
from tests.rawclient import REFUSING

BLOCK, SUB = 16 * KiB, KiB


def run(path: Path, work: Callable[[LivePool], Awaitable[None]], rate: int = 64 * GiB) -> None:
    async def main() -> None:
        live = LivePool(Pool.open(path, autocommit=False, policy=REFUSING), rate)
        try:
            await work(live)
            assert check(live.pool) == []
        finally:
            await live.close()

    if not path.exists():
        Pool.init(path, size="64M", block_size="16K")
    uvloop.run(main())


async def scrub(live: LivePool, *names: str) -> tuple[list[Finding], Scrubbed]:
    steps = [step async for step in live.verifier.scrub(names, 64 * GiB)]
    return [step.finding for step in steps if step.finding is not None], steps[-1]


async def summed(live: LivePool) -> None:
    """Return when the background has nothing to do."""
    while live.merging is not None or live.verifier.summing is not None:
        await (live.merging or live.verifier.summing or asyncio.sleep(0))


async def prepare(live: LivePool) -> int:
    """Snapshot s of v, and clone c, with sums; where block 0 of it is in the data file."""
    await live.execute([Create("v", MiB)])
    live.open("v").write_now(0, memoryview(b"x" * 4 * BLOCK))
    await live.execute([Snapshot("v", "s"), Clone("s", "c")])
    await summed(live)
    return live.pool.volume("s").segments(0, 1)[0][0]


def test_what_is_sealed_gets_its_checksums_by_itself(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        await prepare(live)
        assert await scrub(live) == ([], Scrubbed(4 * BLOCK, 4 * BLOCK, 0, None))

    run(tmp_path / "pool", work)


def test_at_the_next_start_what_is_missing_is_computed(tmp_path: Path) -> None:
    async def without(live: LivePool) -> None:
        await prepare(live)

    async def again(live: LivePool) -> None:
        await summed(live)
        assert (await scrub(live))[1].unsummed == 0

    run(tmp_path / "pool", without)
    (tmp_path / "pool/sums").unlink()
    run(tmp_path / "pool", again)


def test_a_finding_is_an_event(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        where = await prepare(live)
        flip(live.pool.data.path, where + 3 * SUB)
        listener = live.events.listen()
        found, _ = await scrub(live, "v")
        assert found == [Finding("v", 3 * SUB, SUB, where + 3 * SUB, False, ("c", "s", "v"))]
        event = await anext(listener)
        assert (event.kind, event.facts["affected"], event.facts["offset"]) == ("damage", ("c", "s", "v"), 3 * SUB)

    run(tmp_path / "pool", work)


def test_damage_that_is_read_again_and_again_is_told_once(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        flip(live.pool.data.path, await prepare(live))
        listener = live.events.listen()
        for name in ("c", "s", "c"):
            device = live.open(name)
            with pytest.raises(sums.Damage):
                await device.read_checked(0, device.volume.segments(0, SUB), memoryview(bytearray(SUB)))
        live.events.close()
        (event,) = [event async for event in listener]
        assert (event.facts["name"], event.facts["affected"]) == ("c", ("c", "s", "v"))

    run(tmp_path / "pool", work)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        with pytest.raises(NotFound):
            await scrub(live, "nobody")

    run(tmp_path / "pool", work)


def test_a_slow_scrub_ends_with_its_reader_and_computing_with_the_pool(tmp_path: Path) -> None:
    async def work(live: LivePool) -> None:
        await live.execute([Create("v", 8 * MiB)])
        await live.open("v").write(0, memoryview(bytes(8 * MiB)))
        await live.execute([Snapshot("v", "s")])
        assert live.verifier.summing is not None  # at a byte a second, for months
        scrubbing = live.verifier.scrub(rate=1)
        reading = asyncio.ensure_future(anext(scrubbing))
        for _ in range(3):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        assert reading.cancelled()

    run(tmp_path / "pool", work, rate=1)


def test_work_is_held_to_its_rate() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        pace = Pace(10 * MiB, asyncio.Event())
        begun = loop.time()
        for _ in range(10):
            await pace.keep(MiB // 2)
        assert loop.time() - begun > 0.3  # 0.5 s of work, less what may be caught up on: never faster, however slow

    uvloop.run(main())


def test_beside_everything_else_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "MERGE_PAUSES", 0)
    generator = random.Random(1)
    ended = False

    async def change(live: LivePool) -> None:
        nonlocal ended
        try:
            for number in range(120):
                await live.execute([command(live, number)])
                for name in [row.name for row in live.pool.list() if row.kind == "volume"]:
                    offset = generator.randrange(MiB - 30000)
                    await live.open(name).write(offset, memoryview(generator.randbytes(generator.choice((100, 30000)))))
        finally:
            ended = True

    def command(live: LivePool, number: int) -> Command:
        rows = live.pool.list()
        volumes = [row.name for row in rows if row.kind == "volume"]
        snapshots = [row.name for row in rows if row.kind == "snapshot"]
        if not volumes:
            return Create(f"n{number}", MiB)
        if len(rows) > 9:
            return Remove(generator.choice(volumes + snapshots))
        if snapshots and generator.random() < 0.5:
            made = Clone(generator.choice(snapshots), f"n{number}")
            return (
                made if generator.random() < 0.5 else Rollback(generator.choice(volumes), generator.choice(snapshots))
            )
        return Snapshot(generator.choice(volumes), f"n{number}")

    async def look(live: LivePool) -> int:
        count = 0
        while not ended:
            found, _ = await scrub(live)
            assert found == []
            count += 1
            await asyncio.sleep(0)  # where nothing is sealed, a scrub waits for nothing
        return count

    async def read(live: LivePool) -> int:
        count = 0
        while not ended:
            for row in live.pool.list():
                if row.name in live.pool.state.names:
                    device = live.open(row.name)
                    view = memoryview(bytearray(row.size))
                    await device.read_checked(0, device.volume.segments(0, row.size), view)
                    count += 1
            await asyncio.sleep(0)
        return count

    async def work(live: LivePool) -> None:
        _, scrubs, reads = await asyncio.gather(change(live), look(live), read(live))
        assert scrubs > 3 and reads > 20
        await live.commit()
        await summed(live)
        assert (await scrub(live))[1].unsummed == 0

    run(tmp_path / "pool", work)
