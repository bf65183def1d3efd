"""Clones of a large image: the first read, the memory of the map, of a clone, of a client."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from pathlib import Path

from nbdthin.units import GiB, KiB, MiB

from .model import Bound, Curve, Measured, Scale
from .served import IMAGE, Served, make_image, read_all_over, serving

_CLONES = 16  # of each image, of which memory is the mean
_IDLE_DESCRIPTORS = 64


def measure_one(place: Path, scale: Scale) -> Measured:
    """A clone of an image of 1 GiB, 32 GiB, 1 TiB, fully written."""
    first = Curve("clone-first-read", "The first read on a clone", "GiB of its image, fully written", "ms")
    memory = Curve("clone-memory", "What a further clone takes", "GiB of its image, fully written", "KiB")
    maps = Curve("map-memory", "What the map takes", "GiB of the image, fully written", "MiB")
    largest = scale.choose(1024, 32)
    empty = place / "empty"
    empty.mkdir()
    with serving(empty, GiB) as served:
        without = served.memory
    size = 1
    while size <= largest:
        ground = place / str(size)
        ground.mkdir()
        make_image(ground, size * GiB)
        with serving(ground) as served:
            maps.add("the map and the free map", size, served.grown(without) / MiB)
            with contextlib.ExitStack() as clients:
                took = [_first_read(served, each, size * GiB, clients) for each in range(_CLONES)]
            first.add("worst of 16", size, 1000 * max(took))
            first.add("median", size, 1000 * statistics.median(took))
            unread, read = _clone_memory(served, size * GiB)
            memory.add("read nowhere", size, unread / KiB)
            memory.add("read all over", size, read / KiB)
        size *= 32
    return Measured(
        [first, memory, maps],
        [
            Bound("first read on a clone, median of the largest", first.values("median")[-1], 1.0, "ms"),
            Bound(f"the map of {largest:,} GiB", maps.series["the map and the free map"][-1][1], 200, "MiB"),
            Bound("a further clone, read nowhere", max(memory.values("read nowhere")), 64, "KiB"),
            Bound("a further clone, read all over", max(memory.values("read all over")), 64, "KiB"),
        ],
    )


def _first_read(served: Served, number: int, size: int, clients: contextlib.ExitStack) -> float:
    """Seconds from the request to its data, on a connection that has just been opened."""
    served.pool.clone(IMAGE, f"a{number}")
    client = clients.enter_context(served.client(f"a{number}"))
    place = number * size // _CLONES + 4 * KiB
    began = time.perf_counter()
    client.read(place, 4 * KiB)
    return time.perf_counter() - began


def _clone_memory(served: Served, size: int) -> tuple[float, float]:
    """Bytes of each of some clones, by what the daemon's memory has grown: before, and after reading all over."""
    with served.client(IMAGE) as client:
        read_all_over(client, size)  # what is the image's own is not the clones'
    count = 20 * _CLONES
    before = served.memory
    with served.pool.batch():
        for number in range(count):
            served.pool.clone(IMAGE, f"b{number}")
    unread = served.grown(before) / count
    before = served.memory
    for number in range(_CLONES):
        with served.client(f"b{number}") as client:
            read_all_over(client, size)
    return unread, unread + served.grown(before) / _CLONES


def measure_open(place: Path, scale: Scale) -> Measured:
    """So many clones of one image of 10 GiB, each with a client that has read all over."""
    size, most = 10 * GiB, scale.choose(1000, 100)
    curve = Curve("open-clones", "Open clones of one 10 GiB image", "clones, each with a client", "MiB more")
    make_image(place, size)
    _raise_file_limit(most + _IDLE_DESCRIPTORS)
    with serving(place) as served, contextlib.ExitStack() as clients:
        before = served.memory
        count = 0
        for wanted in sorted({1, 10, 100, most}):
            with served.pool.batch():
                for number in range(count, wanted):
                    served.pool.clone(IMAGE, f"c{number}")
            more = [clients.enter_context(served.client(f"c{number}")) for number in range(count, wanted)]
            curve.add("connected", wanted, served.grown(before) / MiB)
            for client in more:
                read_all_over(client, size)
            curve.add("and read all over", wanted, served.grown(before) / MiB)
            count = wanted
    return Measured(
        [curve], [Bound(f"{most:,} open clones, read all over", curve.values("and read all over")[-1], 100, "MiB")]
    )


def _raise_file_limit(wanted: int) -> None:
    """One descriptor a client; the daemon raises its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
