"""A snapshot taken out of the middle of a chain: what that costs, over what the chain is and over what it holds."""

from __future__ import annotations

import time
from pathlib import Path

from benchlib.client import Client
from benchlib.errors import BenchError

from nbdthin.pool.records import LEAF_BLOCKS
from nbdthin.units import GiB, KiB, TiB

from .model import Bound, Curve, Measured, Scale
from .served import BLOCK, Served, serving

_SPREAD = 8 * BLOCK  # bytes between two blocks that the snapshot holds: 64 of them in a leaf
_ELSEWHERE = 3 * GiB  # from where on the others write
_HELD = 256  # blocks, where that is not what grows
_LEAF = 0.06  # seconds in which one leaf is merged, with the pause behind it
_MERGED = 60.0  # seconds beyond that
_SAME = 3.0  # times; CPU time comes in steps of 10 ms


def measure(place: Path, scale: Scale) -> Measured:
    lengths = (10, 30) if scale.quick else (10, 100, 1000)
    sizes = (TiB,) if scale.quick else (4 * GiB, 256 * GiB, 16 * TiB)
    held = (16,) if scale.quick else (16, 256, 4096)
    clones = (10, 1000) if scale.quick else (10, 1000, 100_000)
    by_clones = Curve("delete-below", "Deleting what an image stands on", "clones of the image", "ms")
    middle = f"Deleting the middle of a chain of {lengths[1]}"
    by_length = Curve("delete-length", "Deleting the middle of a chain", "snapshots in the chain", "ms")
    by_size = Curve("delete-size", middle, "GiB of the volume", "ms")
    by_held = Curve("delete-held", middle, "blocks that it alone holds", "ms")
    journal = Curve("delete-journal", "The same: journal", "blocks that it alone holds", "KiB")
    for number, length in enumerate(lengths):
        answered, cpu, _ = _delete(place / f"l{number}", length, 64 * GiB, _HELD)
        by_length.add("until it is answered", length, answered)
        by_length.add("CPU in all", length, cpu)
    for number, size in enumerate(sizes):
        answered, cpu, _ = _delete(place / f"s{number}", lengths[1], size, _HELD)
        by_size.add("until it is answered", size / GiB, answered)
        by_size.add("CPU in all", size / GiB, cpu)
    for number, count in enumerate(clones):
        answered, cpu = _delete_below(place / f"c{number}", count, scale.choose(64, 4))
        by_clones.add("until it is answered", count, answered)
        by_clones.add("CPU in all", count, cpu)
    for number, blocks in enumerate(held):
        answered, cpu, grown = _delete(place / f"h{number}", lengths[1], 64 * GiB, blocks)
        by_held.add("until it is answered", blocks, answered)
        by_held.add("CPU in all", blocks, cpu)
        journal.add("journal", blocks, grown)
    curves = [by_length, by_size, by_clones, by_held, journal]
    return Measured(curves, [*map(_flat, curves[:3]), _answered(by_held)])


def _flat(curve: Curve) -> Bound:
    """CPU time, which comes in steps of 10 ms: at least one of them is taken for granted."""
    taken = [max(value, 10.0) for value in curve.values("CPU in all")]
    return Bound(f"CPU over {curve.x}: most / least", max(taken) / min(taken), _SAME, "times")


def _answered(curve: Curve) -> Bound:
    return Bound("until it is answered, the worst", max(curve.values("until it is answered")), 50.0, "ms")


def _delete(place: Path, length: int, size: int, held: int) -> tuple[float, float, float]:
    """Milliseconds until the removal is answered and of CPU until all is merged, and KiB of journal.

    The middle one holds `held` blocks, all others one; the one behind it has one of these again.
    """
    place.mkdir()
    middle = length // 2
    with serving(place, GiB) as served:
        pool = served.pool
        pool.create("v", size)
        with served.client("v") as client:
            for number in range(length):
                _write(client, number, middle, held)
                pool.snapshot("v", f"s{number}")
            client.flush()
            served.settle()
            before, cpu, began = pool.info().pool, served.cpu, time.perf_counter()
            pool.remove(f"s{middle}")
            answered = time.perf_counter() - began
            _merged(served, before.layers - 1, held * _SPREAD // (LEAF_BLOCKS * BLOCK))
            client.flush()
            after, used = pool.info().pool, served.cpu - cpu
            _check(client, held)
    return 1000 * answered, 1000 * used, max(after.journal - before.journal, 0) / KiB


def _delete_below(place: Path, clones: int, leaves: int) -> tuple[float, float]:
    """The same of a snapshot that holds a block in each of `leaves`, below an image with so many clones."""
    place.mkdir()
    with serving(place, GiB) as served:
        pool = served.pool
        pool.create("v", leaves * LEAF_BLOCKS * BLOCK)
        with served.client("v") as client:
            for leaf in range(leaves):
                client.write(leaf * LEAF_BLOCKS * BLOCK, _content(leaf))
            pool.snapshot("v", "below")
            client.write(BLOCK, _content(leaves))
            pool.snapshot("v", "image")
        with pool.batch():
            for number in range(clones):
                pool.clone("image", f"c{number}")
        served.settle()
        before, cpu, began = pool.info().pool, served.cpu, time.perf_counter()
        pool.remove("below")
        answered = time.perf_counter() - began
        _merged(served, before.layers - 1, leaves)
        used = served.cpu - cpu
        with served.client(f"c{clones - 1}") as client:
            for leaf in range(leaves):
                if client.read(leaf * LEAF_BLOCKS * BLOCK, 4 * KiB) != _content(leaf):
                    raise BenchError(f"leaf {leaf} of a clone is not what was written")
    return 1000 * answered, 1000 * used


def _write(client: Client, number: int, middle: int, held: int) -> None:
    if number == middle:
        for block in range(held):
            client.write(block * _SPREAD, _content(block))
    else:
        client.write(_ELSEWHERE + number * BLOCK, _content(number))
        if number == middle + 1:
            client.write(0, _content(held))


def _content(number: int) -> bytes:
    return number.to_bytes(4, "little") * KiB


def _merged(served: Served, layers: int, leaves: int) -> None:
    """Return when that many layers are left. Seldom asks: to ask costs the daemon more than the merge of a leaf."""
    time.sleep(_LEAF * leaves)
    deadline = time.monotonic() + _MERGED
    while served.pool.info().pool.layers != layers:
        if time.monotonic() > deadline:
            raise BenchError(f"the removed snapshot is not merged after {_MERGED:.0f} s")
        time.sleep(0.3)


def _check(client: Client, held: int) -> None:
    for block in range(held):
        if client.read(block * _SPREAD, 4 * KiB) != _content(block or held):
            raise BenchError(f"block {block} is not what was written")
