"""The requests over long ranges, which fio does not send: TRIM, and BLOCK_STATUS by libnbd."""

from __future__ import annotations

import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from nbdthin.units import GiB, KiB

from . import images
from .errors import BenchError
from .images import Words
from .servers import Export

_TRIM = 1 * GiB  # of one request
_SPRINKLED = 64  # blocks written before a TRIM, to see them go
_PART = 64 * KiB  # every second one is written
_ASKED = 1 * GiB  # of one BLOCK_STATUS
_MAP_SECONDS = 0.2  # the map is read again and again for so long
_DEBIAN = "/usr/lib/python3/dist-packages"  # has libnbd's binding, for Debian's own Python
_HOLE_OR_ZERO = np.uint64(3)


@contextmanager
def trim(export: Export) -> Iterator[Callable[[], float]]:
    """Of all of it, a GiB at a time, and a flush. The rate counts GiB."""
    blocks = np.random.default_rng(1).choice(len(export.generations), _SPRINKLED, replace=False).astype(np.uint64)
    before = export.generations.copy()
    with export.client() as client:
        images.write_blocks(client, before, blocks, 1)
        client.flush()
        for number, row in zip(blocks.tolist(), images.content(blocks, before[blocks]), strict=True):
            if client.read(number * images.BLOCK, images.BLOCK) != row.tobytes():
                raise BenchError(f"block {number} is not what was written before the TRIM")

        def go() -> float:
            for offset in range(0, client.size, _TRIM):
                client.trim(offset, min(_TRIM, client.size - offset))
            client.flush()
            return client.size / GiB

        yield go
        for number in blocks.tolist():
            if any(client.read(number * images.BLOCK, images.BLOCK)):
                raise BenchError(f"block {number} is still there after the TRIM")


def map_missing() -> str | None:
    try:
        _nbd()
    except ImportError:
        return "needs libnbd's Python binding, of this Python (apt-get install python3-libnbd)"
    return None


def _nbd() -> ModuleType:
    """From where Debian has it, and nothing else from there."""
    if "nbd" not in sys.modules:
        sys.path.append(_DEBIAN)
        try:
            importlib.import_module("nbd")
        finally:
            sys.path.remove(_DEBIAN)
    return sys.modules["nbd"]


def fragment(export: Export) -> None:
    """Writes every second 64 KiB."""
    with export.client() as client:
        for offset in range(0, client.size, 2 * _PART):
            client.write(offset, bytes([images.WRITTEN_BYTE]) * _PART)
        client.flush()


@contextmanager
def block_status(export: Export) -> Iterator[Callable[[], float]]:
    """The whole map of a fragmented volume, once and again. The rate counts extents."""
    handle = _nbd().NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(export.uri)
    size = handle.get_size()
    maps: list[Words] = []

    def go() -> float:
        deadline = time.monotonic() + _MAP_SECONDS
        while not maps or time.monotonic() < deadline:
            maps.append(_whole_map(handle, size))
        return sum(len(each) for each in maps)

    try:
        yield go
    finally:
        handle.shutdown()
    for each in maps:
        check_map(each, size)


def _whole_map(handle: Any, size: int) -> Words:
    """A row for each extent: length, flags."""
    answers: list[list[int]] = []

    def took(context: str, offset: int, extents: list[int], error: object) -> None:
        answers.append(extents)

    offset = 0
    while offset < size:
        handle.block_status(min(_ASKED, size - offset), offset, took)
        offset += sum(answers[-1][::2])
    return np.array(list(itertools.chain.from_iterable(answers)), dtype=np.uint64).reshape(-1, 2)


def check_map(extents: Words, size: int) -> None:
    """Data and holes in turn, each of 64 KiB, but where an answer ended in between; BenchError for any other."""
    ends = np.cumsum(extents[:, 0])
    starts = ends - extents[:, 0]
    first, last = starts // _PART, (ends - np.uint64(1)) // _PART
    is_hole = (extents[:, 1] & _HOLE_OR_ZERO) != 0
    wrong = np.flatnonzero((first != last) | (is_hole != (first % 2 == 1)))
    if len(wrong):
        raise BenchError(f"BLOCK_STATUS: {len(wrong)} wrong extents, the first at byte {int(starts[wrong[0]])}")
    if ends[-1] < size:
        raise BenchError(f"BLOCK_STATUS: it ends at byte {int(ends[-1])} of {size}")
