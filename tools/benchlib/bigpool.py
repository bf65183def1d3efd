"""A pool with millions of mapped blocks and no data, made in seconds: for what depends on the mapping's size alone.

The mapping is written as a pool's own checkpoint, by the engine's own encoder, so that whoever opens it reads what a
pool of that size would have left behind. The data file is a hole: every block of every volume is mapped, and reads as
zeroes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from nbdthin.pool.journal import Journal
from nbdthin.pool.layers import FULL, Words
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import LEAF_BLOCKS, Counter, End, Layer, Leaf, Name, Record, encode
from nbdthin.units import KiB

BLOCK_SIZE = 64 * KiB
FULL_VOLUME = "full"
VOLUMES = 16  # that share the blocks; each stands on a snapshot, which owns half of what it reads
RUN = 16  # blocks that lie together: what a volume is given at a time
STEP = VOLUMES * 2 * LEAF_BLOCKS  # blocks: a leaf of each volume and one of each snapshot
_RUNS = LEAF_BLOCKS // RUN  # of a leaf
_FREE = 4  # for so many mapped blocks one is free
_FRAME = 128  # leaves


def make(path: Path, blocks: int) -> None:
    """A pool at `path` with `blocks` mapped blocks, in volumes `v0` to `v15` and snapshots `s0` to `s15`.

    `blocks` is a multiple of STEP. Odd leaves are the volume's, even ones the snapshot's below it.
    """
    assert blocks and blocks % STEP == 0
    _write(path, blocks, _names(blocks), _leaves(blocks))


def make_full(path: Path, size: int) -> None:
    """A pool at `path` with one volume, FULL_VOLUME, of `size` bytes, every block of it mapped, in ascending order.

    `size` is a multiple of 32 MiB, what a leaf maps.
    """
    _write_one(path, size, FULL_VOLUME, False, np.arange(size // BLOCK_SIZE // RUN, dtype=np.uint64))


def make_image(path: Path, size: int, name: str) -> None:
    """A pool at `path` with one snapshot, every block of it mapped, in runs of no order. `size` as for `make_full`."""
    _write_one(path, size, name, True, _shuffled(size // BLOCK_SIZE))


def _write_one(path: Path, size: int, name: str, snapshot: bool, runs: Words) -> None:
    blocks = size // BLOCK_SIZE
    assert blocks and blocks % LEAF_BLOCKS == 0
    names: list[Record] = [Counter(2), Layer(1, 0), Name(name, snapshot, 1, size, time.time(), {})]
    _write(path, blocks, names, (_leaf(1, leaf, runs, leaf) for leaf in range(blocks // LEAF_BLOCKS)))


def _write(path: Path, blocks: int, names: Iterable[Record], leaves: Iterable[Record]) -> None:
    Pool.init(path, size=(1 + blocks + blocks // _FREE) * BLOCK_SIZE, block_size=BLOCK_SIZE)
    journal = Journal(path / "journal")
    journal.load(lambda _: None)
    journal.write_checkpoint(journal.start_segment(), _payloads(names, leaves))
    journal.close()


def volume_size(blocks: int) -> int:
    """Bytes of each volume."""
    return blocks // VOLUMES * BLOCK_SIZE


def _payloads(names: Iterable[Record], leaves: Iterable[Record]) -> Iterator[bytes]:
    first = list(names)
    yield encode(first)
    count = len(first)
    part: list[Record] = []
    for leaf in leaves:
        part.append(leaf)
        if len(part) == _FRAME:
            yield encode(part)
            count += len(part)
            part = []
    yield encode([*part, End(count + len(part))])


def _names(blocks: int) -> Iterator[Record]:
    yield Counter(2 * VOLUMES + 1)
    for number in range(VOLUMES):
        sealed, head = 2 * number + 1, 2 * number + 2
        yield Layer(sealed, 0)
        yield Layer(head, sealed)
    created = time.time()
    for number in range(VOLUMES):
        yield Name(f"s{number}", True, 2 * number + 1, volume_size(blocks), created, {})
        yield Name(f"v{number}", False, 2 * number + 2, volume_size(blocks), created, {})


def _leaves(blocks: int) -> Iterator[Record]:
    """The physical blocks are those of volumes that were written at the same time: runs, in no order."""
    runs = _shuffled(blocks)
    each = blocks // VOLUMES // LEAF_BLOCKS  # leaves of a volume
    for number in range(VOLUMES):
        for below in (1, 0):
            for leaf in range(1 - below, each, 2):
                yield _leaf(2 * number + 2 - below, leaf, runs, number * each + leaf)


def _shuffled(blocks: int) -> Words:
    return np.random.default_rng(1).permutation(blocks // RUN).astype(np.uint64)


def _leaf(layer: int, leaf: int, runs: Words, number: int) -> Leaf:
    """Whole blocks, in those runs that are the `number`th leaf's; physical block 0 is the header's."""
    mine = runs[number * _RUNS : (number + 1) * _RUNS, None]
    within: Words = np.arange(1, RUN + 1, dtype=np.uint64)
    physical = (mine * np.uint64(RUN) + within).reshape(-1)
    return Leaf(layer, leaf, (physical << np.uint64(32) | np.uint64(FULL)).tobytes())
