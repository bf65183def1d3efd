"""Those who wait for syncs: whether to wait a little for more of them before the next one begins.

Who flushes after each write comes back at once when the sync that it waited for has ended. Where a sync takes longer
than that, those who came during it would have the next one for themselves, and the others the one after that: two
groups that take turns, each waiting for two syncs. So the next one waits until as many are there as there are, and only
where they have come back lately.
"""

from __future__ import annotations

import asyncio

MOST_SKIPPED = 64  # syncs for which it is not tried again


class Crowd:
    """Of one event loop. A sync is for those who have asked before it began."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting = 0  # for the next sync
        self._served = 0  # by the one under way
        self._known = 0  # who were served by the last one, or were waiting when it ended
        self._misses = 0
        self._skip = 0  # syncs
        self._all: asyncio.Future[None] | None = None

    def ask(self) -> None:
        """One more waits for the next sync."""
        self._waiting += 1
        if self._all is not None and self._waiting >= self._known:
            self._enough()

    @property
    def missing(self) -> int:
        """How many who may come back have not asked yet."""
        return max(0, self._known - self._waiting)

    async def gather(self, patience: float) -> None:
        """Return when as many wait as there are, or after `patience` seconds."""
        if not (missing := self.missing):
            return
        if self._skip:
            self._skip -= 1
            return
        self._all = self._loop.create_future()
        timer = self._loop.call_later(patience, self._enough)
        await self._all
        timer.cancel()
        self._all = None
        if self.missing * 2 > missing:
            self._misses = self._skip = min(self._misses * 2 + 1, MOST_SKIPPED)
        else:
            self._misses = 0

    def _enough(self) -> None:
        if self._all is not None and not self._all.done():
            self._all.set_result(None)

    def begin(self) -> None:
        """A sync begins, for all who wait."""
        self._served, self._waiting = self._waiting, 0

    def end(self) -> None:
        """It has ended; those whom it served are not told yet."""
        self._known = self._served + self._waiting
