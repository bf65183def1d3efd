"""What a server is to the bench: something that opens images in one of a few states and says what settings it has.

peers.py and ours.py hold the servers themselves. All of one bench stand on a common `Ground`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import numpy as np

from . import images, slowdisk
from .client import Client

CHAIN = 100  # snapshots in the long chain
CHAIN_WRITES = 16  # blocks of 4 KiB written before each snapshot of it


class State(Enum):
    """What an image has behind it when its work begins."""

    FULL = "full"  # every block written, and owned by the image itself
    SLOW = "full, slow sync"  # the same, on a disk whose sync takes longer (slowdisk.py)
    CLONE = "clone"  # nothing of its own, over a full parent; a fresh one for each run of a bounded work
    CHAIN_1 = "chain of 1"  # a clone with one snapshot below, a few blocks written before it
    CHAIN_100 = f"chain of {CHAIN}"  # the same with many

    @property
    def depth(self) -> int:
        """Snapshots below."""
        return {State.CHAIN_1: 1, State.CHAIN_100: CHAIN}.get(self, 0)


@dataclass(frozen=True, slots=True)
class Setting:
    arguments: tuple[str, ...]
    reason: str
    state: State | None = None  # only for images in this state; None: for all


@dataclass(frozen=True, slots=True)
class Export:
    """An image being served. `close` ends what was opened for it alone, and forgets the image."""

    socket: Path
    name: str
    pid: int  # the process whose tree is charged
    generations: images.Words  # what its blocks hold, but for what fio writes
    close: Callable[[], None]

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{quote(self.name, safe='')}?socket={quote(str(self.socket))}"

    @contextmanager
    def client(self) -> Iterator[Client]:
        with Client(self.socket, self.name) as client:
            yield client


@dataclass(frozen=True)
class Ground:
    """What all servers of one bench stand on: a directory, a size, and a full raw image as everyone's parent."""

    directory: Path
    size: int
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @cached_property
    def base(self) -> Path:
        path = self.directory / "base.raw"
        images.fill_file(path, self.size)
        return path

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

    def lacks(self, state: State) -> str | None:
        """Why it has no image in this state; None when it has."""

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
