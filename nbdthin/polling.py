"""Adaptive polling: for some microseconds after a request the daemon looks for the next one without going to sleep.

A client that waits for each answer before it asks again sends its next request some 15 us later. A loop that sleeps
meanwhile is woken by the kernel, and in a virtual machine by the hypervisor, which takes longer than the request
itself. As halt-polling hypervisors do, this polls only as long as it has paid lately: where requests have come quickly
one after the other, and nobody else wanted the processor.

There are two ways. Where one connection is alone, it looks at its own socket (`wait`), which takes a tenth of a turn of
the loop; else the loop turns without sleeping.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable

WINDOW = 100e-6  # seconds without a request after which the loop sleeps
REST = 0.1  # seconds without polling after somebody else wanted the processor
_SMOOTH = 1 / 8  # weight of the latest gap between requests


class Poller:
    """One for an event loop. Costs an idle one nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self._loop = asyncio.get_running_loop()
        self._gap = 2 * WINDOW if enabled else float("inf")  # seconds between an answer and the next request, lately
        self.time = 0.0  # when all that came was answered, by time.monotonic
        self._polling = False
        self._preempted = 0  # how often others took the processor, when polling began
        self._rest_until = 0.0

    def came(self) -> None:
        """A request is here."""
        gap = time.monotonic() - self.time
        self._gap += (min(gap, 4 * WINDOW) - self._gap) * _SMOOTH

    def wait(self, ready: Callable[[int], object]) -> bool:
        """Ask `ready(0)` again and again, for as long as it may pay, until it says that the next request is here."""
        if not self._polling:
            return False
        until = self.time + WINDOW
        while not ready(0):
            if time.monotonic() >= until:
                return False
        self.came()
        return True

    def answered(self) -> None:
        """All that came is done with: the next may come at once."""
        now = self.time = time.monotonic()
        if not self._polling and self._gap < WINDOW and now >= self._rest_until:
            self._polling = True
            self._preempted = _preempted()
            self._loop.call_soon(self._poll)

    def _poll(self) -> None:
        now = time.monotonic()
        if now - self.time < WINDOW:
            self._loop.call_soon(self._poll)
            return
        self._polling = False
        if _preempted() != self._preempted:
            self._rest_until = now + REST


def _preempted() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
