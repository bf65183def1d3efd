"""Reads of 4 KiB, so many at once, each timed and each compared with what must be there.

The process that reads is put before all others, where it may be: with an ordinary priority it would measure how long it
waits for a processor itself, up to a tick of 4 ms where two clients and a server share two of them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import images
from .client import Client
from .errors import BenchError

_NICE = -10  # of the process that reads

Times = NDArray[np.float64]


class Span(NamedTuple):
    """What went on beside the reads: moments of time.monotonic."""

    prepared: float
    begun: float
    ended: float


class Timings:
    """When each read was sent and when its answer was there, by time.monotonic, in seconds."""

    def __init__(self, sent: Times, answered: Times) -> None:
        self.sent = sent
        self.answered = answered

    def split(self, spans: list[Span]) -> tuple[Times, Times]:
        """The durations of reads that fall into one of `spans` at least in part, and those of reads far from any.

        Reads beside the preparation of one are in neither, nor those behind the end of the last: the next may have
        begun.
        """
        with_it, beside = np.zeros((2, len(self.sent)), dtype=np.bool_)
        for span in spans:
            with_it |= (self.sent < span.ended) & (self.answered > span.begun)
            beside |= (self.sent < span.begun) & (self.answered > span.prepared)
        known = self.answered < max((span.ended for span in spans), default=0.0)
        durations = self.answered - self.sent
        return durations[with_it], durations[known & ~with_it & ~beside]


def read(path: Path, export: str, size: int, depth: int, seconds: float) -> Timings:
    """Random blocks of the first `size` bytes, which `images.fill` has filled. Raises BenchError for other data."""
    rows = images.content(np.arange(size // images.BLOCK, dtype=np.uint64), images.blank(size))
    expected = [row.tobytes() for row in rows]
    places = np.random.default_rng(depth).integers(0, len(expected), 1 << 16).tolist()
    sent: list[float] = []
    answered: dict[int, float] = {}  # by number, as answers may come in any order
    clock = time.monotonic
    with Client(path, export) as client, _first():
        gc.disable()  # a collection in the client would look like a slow read of the server
        try:
            deadline = clock() + seconds
            while len(answered) < len(sent) or clock() < deadline:
                while len(sent) < len(answered) + depth and clock() < deadline:
                    number = len(sent)
                    sent.append(clock())
                    client.ask(number, places[number & 0xFFFF] * images.BLOCK, images.BLOCK)
                if len(answered) == len(sent):
                    break
                number, data = client.answer(images.BLOCK)
                answered[number] = clock()
                if data != expected[places[number & 0xFFFF]]:
                    raise BenchError(f"block {places[number & 0xFFFF]} is not what was written there")
        finally:
            gc.enable()
    return Timings(np.array(sent), np.array([answered[number] for number in range(len(sent))]))


@contextmanager
def _first() -> Iterator[None]:
    """Put before others inside, as root."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)
