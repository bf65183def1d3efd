"""What a server is to the bench: something that opens images in one of a few states and says what settings it has.

peers.py and ours.py hold the servers themselves. All of one bench stand on a common `Ground`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import numpy as np

from . import images, slowdisk
from .client import Address, Client

CHAIN, LONG_CHAIN = 100, 1000  # snapshots
CHAIN_WRITES = 16  # blocks of 4 KiB written before each snapshot of a chain


class State(Enum):
    """What an image has behind it when its work begins."""

    FULL = "full"  # every block written, and owned by the image itself
    SLOW = "full, slow sync"  # the same, on a disk whose sync takes longer (slowdisk.py)
    TCP = "full, over TCP"  # the same, at a port of 127.0.0.1
    COLD = "full, cold"  # the same, and nothing has read it but in small parts: what a server has mapped stays cached
    MAPPED = "full, fallocated"  # the same as far as the mapping goes: its space is allocated, and was never written
    EMPTY = "empty"  # thin, with nothing behind it; a fresh one as with clones
    CLONE = "clone"  # nothing of its own, over a full parent; a fresh one for each run of a bounded work
    CHAIN_1 = "chain of 1"  # a clone with one snapshot below, a few blocks written before it
    CHAIN_100 = f"chain of {CHAIN}"  # the same with many
    CHAIN_1000 = f"chain of {LONG_CHAIN}"  # nbdthin's alone: as a chain of qcow2 files it would take minutes to open

    @property
    def depth(self) -> int:
        """Snapshots below."""
        return {State.CHAIN_1: 1, State.CHAIN_100: CHAIN, State.CHAIN_1000: LONG_CHAIN}.get(self, 0)

    @property
    def is_full(self) -> bool:
        """Whether each block of such an image is written before its works begin, and is overwritten by them."""
        return self in (State.FULL, State.SLOW, State.TCP, State.COLD)


@dataclass(frozen=True, slots=True)
class Setting:
    arguments: tuple[str, ...]
    reason: str
    state: State | None = None  # only for images in this state; None: for all


@dataclass(frozen=True, slots=True)
class Export:
    """An image being served. `close` ends what was opened for it alone, and forgets the image."""

    address: Address
    name: str
    pid: int  # the process whose tree is charged
    generations: images.Words  # what its blocks hold, but for what fio writes
    close: Callable[[], None]

    @property
    def uri(self) -> str:
        export = quote(self.name, safe="")
        if isinstance(self.address, tuple):
            host, port = self.address
            return f"nbd://{host}:{port}/{export}"
        return f"nbd+unix:///{export}?socket={quote(str(self.address))}"

    @contextmanager
    def client(self) -> Iterator[Client]:
        with Client(self.address, self.name) as client:
            yield client


@dataclass(frozen=True)
class Ground:
    """What all servers of one bench stand on: a directory, a size, and a full raw image as everyone's parent."""

    directory: Path
    size: int
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def base(self) -> Path:
        path = self.directory / f"base-{self.size}.raw"
        if not path.exists():
            images.fill_file(path, self.size)
        return path

    def sized(self, size: int) -> Ground:
        """The same for images of another size."""
        return self if size == self.size else Ground(self.directory, size, self._numbers)

    def environment(self, state: State) -> dict[str, str]:
        """What the process of a server needs for an image in `state`."""
        return slowdisk.environment(self.directory) if state is State.SLOW else {}

    def place(self, name: str) -> Path:
        """A new directory; its name is short because a socket's path has at most 107 bytes."""
        path = self.directory / f"{name.replace(' ', '-')}.{next(self._numbers)}"
        path.mkdir()
        return path


class Server(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def programs(self) -> tuple[str, ...]: ...
    @property
    def settings(self) -> tuple[Setting, ...]: ...

    def is_raw(self, state: State) -> bool:
        """Whether such an image is a plain file: without copy-on-write, snapshots or clones."""

    def keeps(self, state: State) -> bool:
        """Whether what was written to such an image can be read over another connection."""

    def open(self, state: State, ground: Ground) -> Export: ...

    def check_parents(self, ground: Ground) -> None:
        """Raises BenchError when what the clones were made of is not what it was."""


def write_some(client: Client, generations: images.Words, generation: int, random: np.random.Generator) -> None:
    """The few writes between two snapshots of a chain."""
    count = min(CHAIN_WRITES, len(generations))
    numbers = random.choice(len(generations), count, replace=False).astype(np.uint64)
    images.write_blocks(client, generations, numbers, generation)
