"""How a large read of what is cached is answered over a unix socket: lent (lent.py), or copied.

Lending saves the daemon a copy, and its client copies from pages that no processor has in its cache. Which is faster
depends on the machine: 1 MiB at depth 8 is 1.5 times as fast lent on one, and twice as fast copied on another. So it is
measured, for each connection, as sizes and depths differ too: SPAN bytes are answered one way, and now and then the
other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from nbdthin.units import MiB

SPAN: Final = 8 * MiB  # bytes
SLOW: Final = 0.1  # seconds for a span from which on it says nothing: the client had other things to do
AGAIN: Final = 64  # spans after which the other way is tried
MARGIN: Final = 1.1  # times as fast: less is no reason to copy
_SMOOTH: Final = 1 / 4  # weight of the latest span


class Ways:
    """Of one connection."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lends = True  # now
        self._clock = clock
        self._begun = 0.0  # the span
        self._bytes = 0  # that were asked for in it
        self._changed = False  # with it: what is answered meanwhile was asked for before
        self._spans = 0  # since the other way was tried
        self._lent = 0.0  # bytes a second; 0: not known
        self._copied = 0.0

    def asked(self, length: int) -> None:
        """A read of `length` bytes is here. May change `lends`, for it and what follows."""
        self._bytes += length
        if self._bytes > SPAN:
            self._judge(length)

    def _judge(self, length: int) -> None:
        now = self._clock()
        took, self._begun = now - self._begun, now
        answered, self._bytes = self._bytes - length, length
        if self._changed:
            self._changed = False
            return
        if not 0 < took < SLOW:
            return
        before, rate = self._lent if self.lends else self._copied, answered / took
        rate = before + (rate - before) * _SMOOTH if before else rate
        if self.lends:
            self._lent = rate
        else:
            self._copied = rate
        self._spans += 1
        known = self._lent > 0 and self._copied > 0
        lends = not known or self._copied < MARGIN * self._lent
        if self._spans >= (AGAIN if known else 1):
            self._spans = 0
            lends = not self.lends
        self._changed = lends is not self.lends
        self.lends = lends
