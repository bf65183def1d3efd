"""Those who wait for space: woken when there may be some, to try again; they hold nothing meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AbstractContextManager
from typing import Protocol


class GivenUp(Exception):
    """Nobody waits any more: the request was not carried out, and must not be answered either.

    A client that comes back after a restart sends again what had no answer; an error would reach its user.
    """


class Asker(Protocol):
    """Whoever asked for what may have to wait."""

    @property
    def gone(self) -> bool:
        """Nobody is there any more to be answered."""

    def waiting(self, length: int) -> AbstractContextManager[None]:
        """Entered while a request of `length` bytes of payload waits for space, and is no work."""


class _Patient:
    gone = False

    def waiting(self, length: int) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


PATIENT: Asker = _Patient()  # stays, and asks for nothing else meanwhile


class Waiting:
    """Wake-ups for any number of tasks of the running event loop."""

    def __init__(self) -> None:
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._came: asyncio.Future[None] = self._loop.create_future()
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, deadline: float) -> bool:
        """Return True when it is worth another try, False at `deadline` (loop time). Raises GivenUp."""
        came = self._came
        left = deadline - self._loop.time()
        if not self._closed and left > 0:
            self.count += 1
            try:
                await asyncio.wait((came,), timeout=left)
            finally:
                self.count -= 1
        if self._closed:
            raise GivenUp
        return came.done()

    def wake(self) -> None:
        if self.count and not self._came.done():
            self._came.set_result(None)
            self._came = self._loop.create_future()

    def wake_in(self, seconds: float) -> None:
        """For what nobody tells: room that others make on the file system."""
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(seconds, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.wake()

    def close(self) -> None:
        """Whoever waits, or is about to, gives up."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.wake()
