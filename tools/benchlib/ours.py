"""nbdthin as one of the servers: one daemon with one pool, in which every image is a name."""

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

from . import images
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
        self._daemon: Daemon | None = None
        self._place = Path()  # of the running daemon
        self._numbers = itertools.count()

    def lacks(self, state: State) -> str | None:
        return None

    def keeps(self, state: State) -> bool:
        return True

    def open(self, state: State, ground: Ground) -> Export:
        daemon = self._daemon or self._start(ground)
        generations = images.blank(ground.size)
        before = self._allocated()
        name = f"{state.value.replace(' ', '-')}.{next(self._numbers)}"
        with self._control() as pool:
            if state is State.FULL:
                pool.create(name, ground.size)
                self._fill(name, ground)
            else:
                pool.clone(_IMAGE, name)
            random = np.random.default_rng(state.depth)
            for depth in range(1, state.depth + 1):
                with Client(self._place / "s", name) as client:
                    write_some(client, generations, depth, random)
                pool.snapshot(name, f"{name}@{depth}")
        return Export(self._place / "s", name, daemon.pid, generations, lambda: self._remove(name, state.depth, before))

    def _start(self, ground: Ground) -> Daemon:
        """With the image that all clones are made of: a snapshot of a full volume."""
        self._place = ground.place(self.name)
        config = self._place / "exports.toml"
        config.write_text(_CONFIG.format(size=f"{4 * ground.size + GiB} B"))  # a limit that no work comes near
        argv = [sys.executable, "-m", "nbdthin", "serve", "--config", str(config)]
        self._daemon = Daemon(argv, self._place / "s")
        with self._control() as pool:
            pool.create(_GOLDEN, ground.size)
            self._fill(_GOLDEN, ground)
            pool.snapshot(_GOLDEN, _IMAGE)
        return self._daemon

    @contextmanager
    def _control(self) -> Iterator[nbdthin.Client]:
        try:
            with nbdthin.connect(self._place / "control") as pool:
                yield pool
        except Error as error:
            raise BenchError(f"nbdthin: {error}") from error

    def _fill(self, name: str, ground: Ground) -> None:
        with Client(self._place / "s", name) as client:
            images.fill(client, ground.size)

    def _remove(self, name: str, depth: int, before: int) -> None:
        """And wait until its space is back: the next one is not measured beside the clearing up of the last."""
        with self._control() as pool:
            pool.remove(name, *(f"{name}@{number}" for number in range(1, depth + 1)), force=True)
        deadline = time.monotonic() + _SPACE_BACK
        while self._allocated() > before + _TREE and time.monotonic() < deadline:
            time.sleep(0.01)

    def _allocated(self) -> int:
        """Bytes of the data file that the file system has given it."""
        return (self._place / "pool" / "data").stat().st_blocks * 512

    def check_parents(self, ground: Ground) -> None:
        if self._daemon is not None:
            with Client(self._place / "s", _IMAGE) as client:
                images.check_kept(client, images.blank(ground.size))
