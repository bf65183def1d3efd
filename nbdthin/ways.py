"""How a large read of what is cached is answered over a unix socket: copied into it once, or lent (lent.py).

Lending saves the daemon that copy, and its client copies from pages that no processor has in its cache. Which is faster
depends on the machine: 1 MiB at depth 8 is half as fast again lent on one, and 1.2 to 1.8 times as fast copied on
another. So it is measured, for each connection, as sizes and depths differ too: SPAN bytes are answered one way, and
now and then the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from nbdthin.units import MiB

SPAN: Final = 16 * MiB  # bytes; a client has 8 MiB and more under way, which all come at once
SLOW: Final = 0.2  # seconds for a span from which on it says nothing: the client had other things to do
FIRST: Final = 4  # spans after which the other way is tried
AGAIN: Final = 256  # the same once it has been the slower one each time
MARGIN: Final = 1.1  # times as fast: less is no reason to lend, for which blocks have to be kept from others
_SMOOTH: Final = 1 / 4  # weight of the latest span


class Ways:
    """Of one connection."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lends = False  # now
        self._clock = clock
        self._begun = 0.0  # the span
        self._bytes = 0  # that were asked for in it
        self._changed = False  # with it: what is answered meanwhile was asked for before
        self._lent = 0.0  # bytes a second; 0: not known
        self._copied = 0.0
        self._faster = False  # lending
        self._spans = 0  # since the other way was tried
        self._again = 1  # spans until it is

    def lends_next(self, length: int) -> bool:
        """What is to be done with `length` bytes that are here to be answered."""
        self._bytes += length
        if self._bytes > SPAN:
            self._judge(length)
        return self._lends

    def _judge(self, length: int) -> None:
        now = self._clock()
        took, self._begun = now - self._begun, now
        answered, self._bytes = self._bytes - length, length
        if self._changed:
            self._changed = False
            return
        if not 0 < took < SLOW:
            return
        before, rate = self._lent if self._lends else self._copied, answered / took
        rate = before + (rate - before) * _SMOOTH if before else rate
        if self._lends:
            self._lent = rate
        else:
            self._copied = rate
        lends = self._lent > MARGIN * self._copied
        if lends is not self._faster:
            self._faster, self._again = lends, FIRST
        elif self._lends is not lends:  # the other way was tried
            self._again = min(4 * self._again, AGAIN)
        self._spans += 1
        if self._spans >= self._again:
            self._spans = 0
            lends = not self._lends
        self._changed = lends is not self._lends
        self._lends = lends
