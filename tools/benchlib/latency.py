"""Reads of 4 KiB, so many at once, each timed and each compared with what must be there."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import images
from .client import Client
from .errors import BenchError

Times = NDArray[np.float64]


class Timings:
    """When each read was sent and when its answer was there, by time.monotonic, in seconds."""

    def __init__(self, sent: Times, answered: Times) -> None:
        self.sent = sent
        self.answered = answered

    def split(self, spans: list[tuple[float, float]]) -> tuple[Times, Times]:
        """The durations of reads that fall into one of `spans` at least in part, and those of the others."""
        inside = np.zeros(len(self.sent), dtype=np.bool_)
        for begin, end in spans:
            inside |= (self.sent < end) & (self.answered > begin)
        durations = self.answered - self.sent
        return durations[inside], durations[~inside]


def read(path: Path, export: str, size: int, depth: int, seconds: float) -> Timings:
    """Random blocks of the first `size` bytes, which `images.fill` has filled. Raises BenchError for other data."""
    rows = images.content(np.arange(size // images.BLOCK, dtype=np.uint64), images.blank(size))
    expected = [row.tobytes() for row in rows]
    places = np.random.default_rng(depth).integers(0, len(expected), 1 << 16).tolist()
    sent: list[float] = []
    answered: dict[int, float] = {}  # by number, as answers may come in any order
    clock = time.monotonic
    with Client(path, export) as client:
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
