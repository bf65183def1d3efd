"""What is measured: the table of works."""

from __future__ import annotations

from dataclasses import dataclass

from .servers import State

KiB = 1 << 10
MiB = 1 << 20

FIRST_WRITE_SHARE = 64 * KiB  # one first write for each 64 KiB of the image, the block that CoW servers copy


@dataclass(frozen=True, slots=True)
class Work:
    """One fio job. `bounded`: each place is written once, on a fresh clone, so the amount is fixed, not the time."""

    key: str
    title: str
    rw: str
    block: int
    depth: int
    states: tuple[State, ...] = (State.FULL,)
    bounded: bool = False
    flushes: bool = False  # each write is followed by a flush, and both count as one request
    writers: int = 1  # connections, each of `depth`
    one: str | None = None  # the work of one such writer, by its key: what many are compared with

    @property
    def writes(self) -> bool:
        return self.rw == "randwrite"


_SLOW = (State.SLOW,)
_CLONE = (State.CLONE,)
_CHAINS = (State.CHAIN_1, State.CHAIN_100)

WORKS = (
    Work("read-4k-d1", "4 KiB random read, depth 1", "randread", 4 * KiB, 1),
    Work("read-4k-d32", "4 KiB random read, depth 32", "randread", 4 * KiB, 32),
    Work("write-4k-d1", "4 KiB random overwrite, depth 1", "randwrite", 4 * KiB, 1),
    Work("write-4k-d32", "4 KiB random overwrite, depth 32", "randwrite", 4 * KiB, 32),
    Work("first-4k-d1", "4 KiB first write on a clone, depth 1", "randwrite", 4 * KiB, 1, _CLONE, bounded=True),
    Work("first-4k-d32", "4 KiB first write on a clone, depth 32", "randwrite", 4 * KiB, 32, _CLONE, bounded=True),
    Work("clone-4k-d32", "4 KiB random read of a clone's parent, depth 32", "randread", 4 * KiB, 32, _CLONE),
    Work("chain-4k-d32", "4 KiB random read on a chain, depth 32", "randread", 4 * KiB, 32, _CHAINS),
    Work("read-64k-d8", "64 KiB random read, depth 8", "randread", 64 * KiB, 8),
    Work("write-64k-d8", "64 KiB random overwrite, depth 8", "randwrite", 64 * KiB, 8),
    Work("read-1m-d8", "1 MiB random read, depth 8", "randread", MiB, 8),
    Work("write-1m-d8", "1 MiB random overwrite, depth 8", "randwrite", MiB, 8),
    Work("fsync-4k", "4 KiB overwrite and flush, 1 writer", "randwrite", 4 * KiB, 1, flushes=True),
    Work(
        "fsync-4k-w16",
        "4 KiB overwrite and flush, 16 writers",
        *("randwrite", 4 * KiB, 1),
        flushes=True,
        writers=16,
        one="fsync-4k",
    ),
    Work("slow-4k", "4 KiB overwrite and flush, sync + 1 ms, 1 writer", "randwrite", 4 * KiB, 1, _SLOW, flushes=True),
    Work(
        "slow-4k-w16",
        "4 KiB overwrite and flush, sync + 1 ms, 16 writers",
        *("randwrite", 4 * KiB, 1, _SLOW),
        flushes=True,
        writers=16,
        one="slow-4k",
    ),
)
