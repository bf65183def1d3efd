"""Threads that do for the event loop what may block.

Not a ThreadPoolExecutor: a future of its, another of the loop's and a wake-up for each call take 40 us more, where a
quick disk's sync takes 100 and a read of it less. Here whatever has ended wakes the loop once, until it has looked.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

Ended = Callable[[Exception | None], None]  # called in the loop with what was raised


class Threads:
    """Up to `most` of them, each started when all others have work."""

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int, name: str) -> None:
        self._loop = loop
        self._most = most
        self._name = name
        self._threads: list[threading.Thread] = []
        self._busy = 0  # calls that have not ended, as the loop knows
        self._work: SimpleQueue[tuple[Callable[[], object], Ended] | None] = SimpleQueue()
        self._done: deque[tuple[Ended, Exception | None]] = deque()
        self._told = False  # the loop will look

    def call(self, function: Callable[[], object], ended: Ended) -> None:
        """Have `function` called in a thread; those that wait for one are taken in turn."""
        if self._busy >= len(self._threads) < self._most:
            thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system gives no more: those that there are do it
                if not self._threads:
                    raise
            else:
                self._threads.append(thread)
        self._busy += 1
        self._work.put((function, ended))

    def run(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Done when `function` has returned, with what it returned or raised."""
        future: asyncio.Future[T] = self._loop.create_future()
        result: list[T] = []

        def ended(error: Exception | None) -> None:
            if future.done():  # nobody waits any more
                return
            if error is None:
                future.set_result(result[0])
            else:
                future.set_exception(error)

        self.call(lambda: result.append(function()), ended)
        return future

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            function, ended = work
            error: Exception | None = None
            try:
                function()
            except Exception as raised:
                error = raised
            self._done.append((ended, error))
            del work, function, ended, error  # kept alive by nobody who waits
            if not self._told:
                self._told = True
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._told = False  # first: what ends from now on tells again
        done = self._done
        while done:
            ended, error = done.popleft()
            self._busy -= 1
            ended(error)

    def end(self) -> None:
        """Wait until all that was asked for has ended."""
        for _ in self._threads:
            self._work.put(None)
        for each in self._threads:
            each.join()
        self._look()
