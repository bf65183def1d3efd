"""How late the event loop comes to what is due: the time that a request waits while the loop is at something else.

Sampled: a timer of the loop says how much later than asked it is called. While the loop works it is asked for every
BUSY seconds, otherwise every IDLE, so that a daemon without clients is woken once a second. What holds up the loop for
less than a period is met by some of the samples only, as by some of the requests: the percentile is that of a request
at any moment, and the longest hold-up of a minute may be missed.

A loop's timers are some 0.3 ms late by themselves (uvloop, whose clock has steps of a millisecond).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from math import ceil

from nbdthin.control.rows import LoopFacts

BUSY = 0.1  # seconds between samples
IDLE = 1.0
WORKS = 0.01  # of the time, from which on a loop counts as one that works
WINDOW = 60.0  # seconds that are looked back on


class Lag:
    """Of the running loop, from now until `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._samples: deque[tuple[float, float]] = deque()  # when, by time.monotonic, and how late
        self._ask(IDLE)

    def _ask(self, period: float) -> None:
        self._asked = time.monotonic()
        self._cpu = time.thread_time()
        self._period = period
        self._timer = self._loop.call_later(period, self._sample)

    def _sample(self) -> None:
        now = time.monotonic()
        took = now - self._asked
        self._samples.append((now, max(took - self._period, 0.0)))
        self._forget(now)
        self._ask(BUSY if time.thread_time() - self._cpu > WORKS * took else IDLE)

    def _forget(self, now: float) -> None:
        while self._samples and self._samples[0][0] < now - WINDOW:
            self._samples.popleft()

    def facts(self) -> LoopFacts:
        """Of the last WINDOW seconds; all 0 where there is no sample yet."""
        self._forget(time.monotonic())
        late = sorted(lag for _, lag in self._samples)
        if not late:
            return LoopFacts(0.0, 0.0, 0)
        return LoopFacts(late[ceil(0.99 * len(late)) - 1], late[-1], len(late))

    def stop(self) -> None:
        self._timer.cancel()
