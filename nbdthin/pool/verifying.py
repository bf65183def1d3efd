"""Checksums in an open pool: computing those that are missing, scrubbing, and telling of damage, once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from nbdthin.pool import events, sums
from nbdthin.pool.layers import SUBBLOCKS, Layer
from nbdthin.pool.rows import Finding, Scrubbed
from nbdthin.pool.scrub import Scrub
from nbdthin.units import MiB

if TYPE_CHECKING:
    from nbdthin.pool.live import LivePool

SCRUB_RATE = 64 * MiB  # bytes a second: a tenth of a disk or less, and a terabyte in five hours
PACE_SLACK = 0.1  # seconds of work that may be caught up on after a hold-up
SUM_AGAIN = 30.0  # seconds until the next try to write checksums
PROGRESS = 0.2  # seconds between two reports of a scrub
MOST_DAMAGED = 1000  # places told of, of those that readers meet


class Pace:
    """Holds background work to `rate` bytes a second, by pauses after each piece of it, until `stopped`."""

    def __init__(self, rate: int, stopped: asyncio.Event) -> None:
        self._rate = rate
        self._stopped = stopped
        self._free_at = time.monotonic()  # when what has been done was due to be done

    async def keep(self, done: int) -> None:
        """`done` more bytes are done."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now - PACE_SLACK) + done / self._rate
        if self._free_at > now and not self._stopped.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), self._free_at - now)


class Verifier:
    """One for an open pool, in its event loop."""

    def __init__(self, live: LivePool, rate: int) -> None:
        """`rate` is bytes a second, for scrubs and for computing the checksums that are missing."""
        self._live = live
        self._pool = live.pool
        self._rate = rate
        self.summing: asyncio.Task[None] | None = None  # computes missing checksums, while there are any
        self._sum_at = 0.0  # by time.monotonic
        self._damaged: set[int] = set()  # positions of damage that readers met, as was told
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Begin nothing more, and let what is under way end soon."""
        self._stopped.set()

    def sum_soon(self) -> None:
        """Compute what is missing, in the background, unless that is being done."""
        if self.summing is None and self._pool.sums.todo and not self._stopped.is_set() and self._pool.failed is None:
            if time.monotonic() >= self._sum_at:
                self.summing = self._live.spawn(self._sum())

    async def _sum(self) -> None:
        """Compute the checksums that sealed layers lack."""
        pace = Pace(self._rate, self._stopped)
        try:
            for work in sums.missing(self._pool):
                await pace.keep(await self._live.in_upkeep(work.run))
                if self._stopped.is_set() or self._pool.failed is not None:
                    return
        finally:
            if self._pool.sums.failed:
                self._sum_at = time.monotonic() + SUM_AGAIN
            self.summing = None

    async def scrub(self, names: Sequence[str] = (), rate: int | None = None) -> AsyncIterator[Scrubbed]:
        """Compare the data that `names` show, or all, with its checksums, as the disk has it. Raises NotFound.

        `rate` is bytes a second, the configured one by default. Only sealed layers have checksums.
        """
        scrub = Scrub(self._pool, names)
        pace = Pace(rate or self._rate, self._stopped)
        done = unsummed = 0
        told = time.monotonic()
        for check in scrub.checks():
            await self._live.in_thread(check.read)
            done, unsummed = done + check.bytes, unsummed + check.unsummed
            for finding in check.findings(scrub.names):
                self._tell_finding(finding)
                yield Scrubbed(min(done, scrub.total), scrub.total, unsummed, finding)
            if time.monotonic() - told > PROGRESS:
                told = time.monotonic()
                yield Scrubbed(min(done, scrub.total), scrub.total, unsummed, None)
            await pace.keep(check.bytes)
        yield Scrubbed(scrub.total, scrub.total, unsummed, None)

    def _tell_finding(self, finding: Finding) -> None:
        what = "unreadable" if finding.unreadable else "damaged"
        line = f"{what} data at byte {finding.offset} of {', '.join(finding.affected) or 'no volume'}"
        self._tell_damage(line, finding.name, finding.offset, finding.length, finding.position, finding.affected)

    def tell_damage(self, name: str, layer: Layer, error: sums.Damage) -> None:
        """A client that reads `name` met it; told once."""
        if error.position in self._damaged or len(self._damaged) >= MOST_DAMAGED:
            return
        self._damaged.add(error.position)
        size = self._pool.block_size
        block, sub = error.offset // size, error.offset % size // (size // SUBBLOCKS)
        owner: Layer | None = layer
        while owner is not None and owner.entry(block) >> 32 != error.position // size:
            owner = owner.parent
        affected = tuple(sums.showing(owner, block, sub)) if owner is not None else (name,)
        line = f"damaged data at byte {error.offset} of {name} was read: refused (affected: {', '.join(affected)})"
        self._tell_damage(line, name, error.offset, error.length, error.position, affected)

    def _tell_damage(
        self, line: str, name: str, offset: int, length: int, position: int, affected: tuple[str, ...]
    ) -> None:
        where = f"{line}; at byte {position} of {self._pool.data.path}"
        self._live.events.notify(
            events.DAMAGE, where, name=name, offset=offset, length=length, position=position, affected=affected
        )
