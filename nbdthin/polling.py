"""Adaptive polling: for some microseconds after a request the daemon looks for the next one without going to sleep.

A client that waits for each answer before it asks again sends its next request some 15 us later. A loop that sleeps
meanwhile is woken by the kernel, and in a virtual machine by the hypervisor, which takes longer than the request
itself. As halt-polling hypervisors do, this polls only as long as it has paid lately: where requests have come quickly
one after the other, and nobody else wanted the processor. Between two looks it offers that to others (sched_yield(2)):
as often as not the client takes it, woken by the answer on the processor that sent it. If somebody else does, for more
than an interrupt or a hypervisor takes now and then, polling rests, the longer the oftener: a process that sleeps is
put before one that computes, and one that polls is not.

There are two ways. Where one connection is alone, it looks at its own socket (`wait`), which takes a tenth of a turn of
the loop; else the loop turns without sleeping.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Final

WINDOW = 200e-6  # seconds without a request after which the loop sleeps
TAKEN = 30e-6  # seconds of an offer from which on somebody had the processor
LONG = 300e-6  # seconds, of such offers lately, from which on it was not the client alone, nor an interrupt
REST: Final = 0.005  # seconds without polling after somebody else had it; twice as many each time, up to
LONGEST_REST = 0.2
_RECOVERY: Final = 0.99  # of that is left after each request that polling has brought
_FORGIVEN: Final = 0.9  # and of what somebody else had of the processor
_SMOOTH: Final = 1 / 8  # weight of the latest gap between requests
_give_way: Final = os.sched_yield
_now: Final = time.monotonic


class Poller:
    """One for an event loop. Costs an idle one nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self._loop = asyncio.get_running_loop()
        self._gap = 2 * WINDOW if enabled else float("inf")  # seconds between an answer and the next request, lately
        self.time = 0.0  # when all that came was answered, by time.monotonic
        self._polling = False
        self._taken = 0.0  # seconds that somebody else had the processor, lately
        self._rest = REST  # seconds, the next time
        self._rest_until = 0.0

    def came(self) -> None:
        """A request is here."""
        gap = _now() - self.time
        self._gap += (min(gap, 4 * WINDOW) - self._gap) * _SMOOTH

    def wait(self, ready: Callable[[int], object]) -> bool:
        """Ask `ready(0)` again and again, for as long as it may pay, until it says that the next request is here."""
        if not self._polling:
            return False
        until = self.time + WINDOW
        before = self.time
        while not ready(0):
            _give_way()
            now = _now()
            if now - before > TAKEN and (now - before > LONG or not ready(0)):
                self._taken += now - before
                if self._taken > LONG:
                    self._begin_rest(now)
                    return False
            if now >= until:
                return False
            before = now
        self._rest = max(self._rest * _RECOVERY, REST)
        self._taken *= _FORGIVEN
        self.came()
        return True

    def answered(self) -> None:
        """All that came is done with: the next may come at once."""
        now = self.time = _now()
        if not self._polling and self._gap < WINDOW and now >= self._rest_until:
            self._polling = True
            self._loop.call_soon(self._poll)

    def _poll(self) -> None:
        now = _now()
        self._polling = self._polling and now - self.time < WINDOW
        if self._polling:
            _give_way()
            if (after := _now()) - now > LONG:
                self._begin_rest(after)
            else:
                self._loop.call_soon(self._poll)

    def _begin_rest(self, now: float) -> None:
        self._polling = False
        self._taken = 0.0
        self._rest_until = now + self._rest
        self._rest = min(2 * self._rest, LONGEST_REST)
