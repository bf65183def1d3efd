"""What is measured: the table of works, whom each is measured against, and how far ahead nbdthin shall be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from .servers import State

KiB = 1 << 10
MiB = 1 << 20

FIRST_WRITE_SHARE = 64 * KiB  # one first write for each 64 KiB of the image, the block that CoW servers copy


@dataclass(frozen=True, slots=True)
class Load:
    """What fio does. `bounded`: each place is written once, on a fresh image, so the amount is fixed, not the time."""

    rw: str
    block: int
    depth: int  # of each connection
    connections: int = 1
    bounded: bool = False
    flushes: bool = False  # each write is followed by a flush, and both count as one request
    cold: bool = False  # nothing of the image is in the page cache when it begins, and no place is read twice

    @property
    def writes(self) -> bool:
        return self.rw != "randread"


class Task(Enum):
    """What fio cannot do; tree.py and ranges.py say how."""

    COPY_IN = "nbdcopy of a root file system's image into a fresh clone"
    COPY_OUT = "nbdcopy of it from there into a file"
    UNPACK = "tar of a root file system onto ext4 on a fresh clone"
    TRIM = "TRIM of a full volume"
    MAP = "BLOCK_STATUS of a fragmented volume"


TREE_TASKS = (Task.COPY_IN, Task.COPY_OUT, Task.UNPACK)


@dataclass(frozen=True, slots=True)
class Peers:
    """Whom a work is measured against: the best that there is for it. What is no faster anywhere is left out."""

    title: str
    names: tuple[str, ...]
    over: tuple[str, ...] = ()  # those that a bar is over; (): all of them. The others are shown all the same
    beside: tuple[str, ...] = ()  # no peers: shown for comparison


@dataclass(frozen=True, slots=True)
class Bar:
    """What nbdthin's rate shall be, over the best peer's on an image in the same state, or over its own in `own`."""

    least: float
    aim: float
    cpu: float | None = None  # the aim for its CPU time per request, over that peer's
    state: State = State.FULL
    own: State | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """`title` may have {root}, {trimmed} and {fragmented} in it, for what depends on how long the bench may take."""

    key: str
    title: str
    job: Load | Task
    against: Peers
    bars: tuple[Bar, ...] = ()
    states: tuple[State, ...] = (State.FULL,)
    one: str | None = None  # the work of one such writer, by its key: what many are compared with
    unit: str = "requests"  # what its rate counts


_MEMORY = ("nbdkit memory",)
_ANY = Peers("raw, or an overlay that is full", ("nbdkit file", "nbdkit cow 4K", "qemu-nbd qcow2", "nbd-server"))
_RAW = replace(_ANY, title="raw; full overlays are shown, too", over=("nbdkit file", "nbd-server"), beside=_MEMORY)
# nbdkit's cow ignores a FLUSH.
_SYNC = Peers("any that syncs", ("nbdkit file", "qemu-nbd qcow2", "nbd-server"), beside=_MEMORY)
_LARGE = Peers("any", ("nbdkit file", "nbdkit cow 64K", "qemu-nbd qcow2", "nbd-server"), beside=_MEMORY)
_COW = Peers("CoW", ("nbdkit cow 4K", "qemu-nbd qcow2", "qemu-nbd ext_l2", "nbd-server"))
_THIN = Peers("thin or raw sparse", ("nbdkit file", *_COW.names), beside=_MEMORY)
_QCOW2 = ("qemu-nbd qcow2", "qemu-nbd ext_l2")
_KEEPS = Peers("CoW that stays", ("nbdkit cow 64K", "nbdkit cow 4K", *_QCOW2), beside=_MEMORY)
# A file system flushes.
_UNPACK = replace(_KEEPS, title="CoW that syncs; the others are shown, too", over=_QCOW2)
_CHAIN = Peers("CoW with chains", ("qemu-nbd qcow2",))  # with extended_l2 a chain of 100 has two thirds of its rate
_FILE = Peers("nbdkit over the same", ("nbdkit file",))
_RANGES = Peers("any that has them", ("nbdkit file", "qemu-nbd qcow2"))

_CLONE = (State.CLONE,)
_TCP = (State.TCP,)
_SLOW = (State.SLOW,)
_READ, _WRITE = "randread", "randwrite"


def _bar(least: float, aim: float, state: State = State.FULL, cpu: float | None = None) -> tuple[Bar, ...]:
    return (Bar(least, aim, cpu, state),)


WORKS = (
    Work("read-4k-d1", "4 KiB random read, depth 1", Load(_READ, 4 * KiB, 1), _RAW, _bar(1.1, 1.5, cpu=0.6)),
    Work("read-4k-d32", "4 KiB random read, depth 32", Load(_READ, 4 * KiB, 32), _RAW, _bar(1.2, 1.5, cpu=0.6)),
    Work("write-4k-d1", "4 KiB random overwrite, depth 1", Load(_WRITE, 4 * KiB, 1), _RAW, _bar(1.0, 1.5, cpu=0.6)),
    Work("write-4k-d32", "4 KiB random overwrite, depth 32", Load(_WRITE, 4 * KiB, 32), _RAW, _bar(1.1, 1.5, cpu=0.6)),
    Work(
        "mixed-4k-d16-c4",
        "4 KiB random, 70 % read, depth 16, four connections",
        *(Load("randrw", 4 * KiB, 16, connections=4), _RAW, _bar(1.1, 1.5)),
    ),
    Work(
        "first-4k-d1",
        "4 KiB first write on a clone of a full volume, depth 1",
        *(Load(_WRITE, 4 * KiB, 1, bounded=True), _COW, _bar(1.3, 3, State.CLONE), _CLONE),
    ),
    Work(
        "first-4k-d32",
        "4 KiB first write on a clone of a full volume, depth 32",
        *(Load(_WRITE, 4 * KiB, 32, bounded=True), _COW, _bar(2, 3, State.CLONE), _CLONE),
    ),
    Work(
        "empty-4k-d32",
        "4 KiB first write into an empty volume, depth 32",
        *(Load(_WRITE, 4 * KiB, 32, bounded=True), _THIN, _bar(1.5, 3, State.EMPTY), (State.EMPTY,)),
    ),
    Work("clone-4k-d32", "4 KiB random read of a clone's parent, depth 32", Load(_READ, 4 * KiB, 32), _COW, (), _CLONE),
    Work(
        "chain-4k-d32",
        "4 KiB random read on a chain, depth 32",
        *(Load(_READ, 4 * KiB, 32), _CHAIN),
        (Bar(5, 10, state=State.CHAIN_100), Bar(0.95, 1, state=State.CHAIN_1000, own=State.CHAIN_1)),
        (State.CHAIN_1, State.CHAIN_100, State.CHAIN_1000),
    ),
    Work("read-64k-d8", "64 KiB random read, depth 8", Load(_READ, 64 * KiB, 8), _LARGE, _bar(1.5, 2)),
    Work("write-64k-d8", "64 KiB random overwrite, depth 8", Load(_WRITE, 64 * KiB, 8), _LARGE, _bar(1, 1.3)),
    Work("read-1m-d8", "1 MiB random read, depth 8", Load(_READ, MiB, 8), _LARGE, _bar(1.7, 2.5)),
    Work("write-1m-d8", "1 MiB random overwrite, depth 8", Load(_WRITE, MiB, 8), _LARGE, _bar(1, 1.3)),
    *(
        Work(
            f"tcp-{verb}-{size >> 10}k-d{depth}" if size < MiB else f"tcp-{verb}-1m-d{depth}",
            f"{'4 KiB' if size < MiB else '1 MiB'} random {verb} over TCP, depth {depth}",
            *(Load(rw, size, depth), replace(_FILE, beside=_MEMORY), _bar(1, 1.5, State.TCP), _TCP),
        )
        for size, depth in ((4 * KiB, 1), (4 * KiB, 32), (MiB, 8))
        for verb, rw in (("read", _READ), ("overwrite", _WRITE))
    ),
    Work(
        "fsync-4k", "4 KiB overwrite and flush, 1 writer", Load(_WRITE, 4 * KiB, 1, flushes=True), _SYNC, _bar(0.9, 1)
    ),
    Work(
        "fsync-4k-w16",
        "4 KiB overwrite and flush, 16 writers",
        *(Load(_WRITE, 4 * KiB, 1, connections=16, flushes=True), _SYNC, _bar(2, 4)),
        one="fsync-4k",
    ),
    Work(
        "slow-4k",
        "4 KiB overwrite and flush, sync + 1 ms, 1 writer",
        *(Load(_WRITE, 4 * KiB, 1, flushes=True), _FILE, (), _SLOW),
    ),
    Work(
        "slow-4k-w16",
        "4 KiB overwrite and flush, sync + 1 ms, 16 writers",
        *(Load(_WRITE, 4 * KiB, 1, connections=16, flushes=True), _FILE, (), _SLOW),
        one="slow-4k",
    ),
    Work(
        "copy-in",
        "nbdcopy of {root} into a clone",
        *(Task.COPY_IN, _KEEPS, _bar(1.2, 2, State.CLONE), _CLONE),
        unit="MiB",
    ),
    Work(
        "copy-out",
        "nbdcopy of {root} out of a clone",
        *(Task.COPY_OUT, _KEEPS, _bar(1.2, 2, State.CLONE), _CLONE),
        unit="MiB",
    ),
    Work(
        "unpack",
        "tar of {root} onto ext4 on a clone, by nbdfuse",
        *(Task.UNPACK, _UNPACK, _bar(1.2, 2, State.CLONE), _CLONE),
        unit="MiB",
    ),
    Work(
        "trim",
        "TRIM of a full volume, {trimmed}",
        *(Task.TRIM, _RANGES, _bar(1, 10, State.MAPPED), (State.MAPPED,)),
        unit="GiB",
    ),
    Work(
        "map",
        "BLOCK_STATUS of {fragmented}, every second 64 KiB written",
        *(Task.MAP, _RANGES, _bar(1, 10, State.EMPTY), (State.EMPTY,)),
        unit="extents",
    ),
    Work(
        "cold-4k-d32",
        "4 KiB random read, cold cache, depth 32",
        *(Load(_READ, 4 * KiB, 32, cold=True), _ANY, _bar(1, 1.2, State.COLD), (State.COLD,)),
    ),
)
