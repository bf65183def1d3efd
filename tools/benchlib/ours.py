"""nbdthin as one of the servers: one daemon with one pool, in which every image is a name; and one on a slow disk."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import nbdthin
from nbdthin.errors import Error
from nbdthin.units import GiB, MiB

from . import images, slowdisk
from .client import Client
from .errors import BenchError
from .process import Daemon
from .servers import Export, Ground, Setting, State, write_some

_GOLDEN = "golden"
_IMAGE = "golden@1"
_TREE = MiB  # bytes that the file system may keep for its tree of extents
_SPACE_BACK = 60.0  # seconds; a file system mounted with `discard` takes several for a GiB

_CONFIG = """\
[pool]
path = "pool"
size = "{size}"

[server]
listen = ["unix:s"]

[control]
socket = "control"
"""


class Nbdthin:
    """The daemon starts with the first image asked for; clones are made and removed while it runs, as users do."""

    name = "nbdthin"
    programs: tuple[str, ...] = ()
    settings = (Setting((), "its defaults"),)

    def __init__(self) -> None:
        self._daemons: dict[bool, tuple[Daemon, Path]] = {}  # on a slow disk, or not: the daemon and its place
        self._numbers = itertools.count()

    def lacks(self, state: State) -> str | None:
        return slowdisk.missing() if state is State.SLOW else None

    def keeps(self, state: State) -> bool:
        return True

    def open(self, state: State, ground: Ground) -> Export:
        slow = state is State.SLOW
        if slow not in self._daemons:
            self._daemons[slow] = self._start(state, ground)
        daemon, place = self._daemons[slow]
        generations = images.blank(ground.size)
        before = _allocated(place)
        name = f"{state.value.replace(' ', '-').replace(',', '')}.{next(self._numbers)}"
        with _control(place) as pool:
            if state in (State.FULL, State.SLOW):
                pool.create(name, ground.size)
                _fill(place, name, ground)
            else:
                pool.clone(_IMAGE, name)
            random = np.random.default_rng(state.depth)
            for depth in range(1, state.depth + 1):
                with Client(place / "s", name) as client:
                    write_some(client, generations, depth, random)
                pool.snapshot(name, f"{name}@{depth}")
        return Export(place / "s", name, daemon.pid, generations, lambda: _remove(place, name, state.depth, before))

    def _start(self, state: State, ground: Ground) -> tuple[Daemon, Path]:
        """With the image that all clones are made of: a snapshot of a full volume."""
        place = ground.place(self.name)
        config = place / "exports.toml"
        config.write_text(_CONFIG.format(size=f"{4 * ground.size + GiB} B"))  # a limit that no work comes near
        argv = [sys.executable, "-m", "nbdthin", "serve", "--config", str(config)]
        daemon = Daemon(argv, place / "s", env=ground.environment(state))
        with _control(place) as pool:
            pool.create(_GOLDEN, ground.size)
            _fill(place, _GOLDEN, ground)
            pool.snapshot(_GOLDEN, _IMAGE)
        return daemon, place

    def check_parents(self, ground: Ground) -> None:
        for _, place in self._daemons.values():
            with Client(place / "s", _IMAGE) as client:
                images.check_kept(client, images.blank(ground.size))


@contextmanager
def _control(place: Path) -> Iterator[nbdthin.Client]:
    try:
        with nbdthin.connect(place / "control") as pool:
            yield pool
    except Error as error:
        raise BenchError(f"nbdthin: {error}") from error


def _fill(place: Path, name: str, ground: Ground) -> None:
    with Client(place / "s", name) as client:
        images.fill(client, ground.size)


def _remove(place: Path, name: str, depth: int, before: int) -> None:
    """And wait until its space is back: the next one is not measured beside the clearing up of the last."""
    with _control(place) as pool:
        pool.remove(name, *(f"{name}@{number}" for number in range(1, depth + 1)), force=True)
    deadline = time.monotonic() + _SPACE_BACK
    while _allocated(place) > before + _TREE and time.monotonic() < deadline:
        time.sleep(0.01)


def _allocated(place: Path) -> int:
    """Bytes of the data file that the file system has given it."""
    return (place / "pool" / "data").stat().st_blocks * 512
