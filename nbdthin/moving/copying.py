"""Copies what is not zero from one disk to another, whatever they are made of: a volume, a raw file, an image.

What reads as zeroes is left alone in a target that is zeroes anyway, whether the source knows it for a hole or has it
written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from nbdthin.pool.rows import Extent
from nbdthin.units import KiB

BLOCK = 4 * KiB  # bytes: zeroes are looked for in whole ones, as a pool keeps them apart

Progress = Callable[[int, int], None]
"""Called with how many bytes are done, and of how many: 0 where nobody knows."""


class Source(Protocol):
    @property
    def size(self) -> int: ...
    def extents(self) -> Iterator[Extent]: ...
    def read_many(self, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]: ...


class Target(Protocol):
    def pipelined(self) -> AbstractContextManager[object]: ...
    def write(self, offset: int, data: memoryview) -> None: ...
    def zero(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...


def unseen(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def copy(
    source: Source, target: Target, extents: Iterable[Extent], *, fresh: bool = True, progress: Progress = unseen
) -> None:
    """Make `target` what `source` is within `extents`, which ascend, and durable. `fresh`: it is all zeroes before."""
    ranges = list(extents)
    total = sum(extent.length for extent in ranges if extent.data)
    done = 0
    with target.pipelined():
        if not fresh:
            for extent in ranges:
                if not extent.data:
                    target.zero(extent.offset, extent.length)
        for offset, data in source.read_many((extent.offset, extent.length) for extent in ranges if extent.data):
            if fresh:
                write_data(target, offset, data)
            else:
                target.write(offset, data)
            done += len(data)
            progress(done, total)
    target.flush()


def within(extents: Iterable[Extent], start: int, end: int) -> Iterator[Extent]:
    """What of `extents` lies in the bytes from `start` to `end`."""
    for extent in extents:
        first, last = max(start, extent.offset), min(end, extent.offset + extent.length)
        if first < last:
            yield Extent(first, last - first, extent.data)


def write_data(target: Target, offset: int, data: memoryview, *, over: bool = False) -> None:
    """What of `data` is more than zeroes; `over`: the target is not all zeroes there, so they are made."""
    zeroes = 0  # where they begin, if they do
    for start, end in [*data_runs(data), (len(data), len(data))]:
        if over and start > zeroes:
            target.zero(offset + zeroes, start - zeroes)
        if end > start:
            target.write(offset + start, data[start:end])
        zeroes = end


def data_runs(data: memoryview) -> list[tuple[int, int]]:
    """Where `data` is more than zeroes: starts and ends, in whole blocks counted from its beginning."""
    whole = len(data) // BLOCK
    words = np.frombuffer(data, np.uint64, whole * BLOCK // 8).reshape(whole, BLOCK // 8)
    # Most blocks that are not zeroes say so with their first word: only the others are read.
    doubtful = np.flatnonzero(words[:, 0] == 0)
    kept = np.ones(whole + 3, dtype=np.bool_)  # between two that are not there: the blocks, and what is no whole block
    kept[0] = kept[-1] = False
    kept[1 + doubtful] = words[doubtful].any(axis=1)
    kept[-2] = any(data[whole * BLOCK :])
    edges = np.flatnonzero(kept[1:] != kept[:-1]) * BLOCK
    return [(start, min(stop, len(data))) for start, stop in edges.reshape(-1, 2).tolist()]
