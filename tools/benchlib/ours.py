"""nbdthin as one of the servers: one daemon with one pool, in which every image is a name; and one on a slow disk."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import nbdthin
from nbdthin.errors import Error
from nbdthin.units import GiB, MiB

from . import bigpool, images
from .client import Client
from .errors import BenchError
from .process import Daemon, cpu_seconds, free_port
from .servers import Export, Ground, Setting, State, write_some

_COMPILE = Path(__file__).parents[1] / "compile"
_COMPILED = str(_COMPILE.parent.parent / ".venv/compiled")  # where it puts what it makes
_TREE = MiB  # bytes that the file system may keep for its tree of extents
_REST = 60.0  # seconds until the checksums of a parent must be there
_SPACE_BACK = 60.0  # seconds; a file system mounted with `discard` takes several for a GiB

_ROOM = 64  # images of the size that the first one has; a limit that no work comes near
_CONFIG = """\
[pool]
path = "pool"
size = "{size} B"

[server]
listen = ["unix:s", "tcp:127.0.0.1:{port}"]

[control]
socket = "control"

[scrub]
rate = "{sums}"
"""
_SUMS = "1 GiB"


def choose_data_path(interpreted: bool) -> str:
    """Have all nbdthin that is started from now on run compiled, if tools/compile has been run. Says which it is."""
    os.environ["PYTHONSAFEPATH"] = "1"  # not the sources in the working directory
    path = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each not in ("", _COMPILED)]
    compiled = not interpreted and subprocess.run([_COMPILE, "--where"], stdout=subprocess.DEVNULL).returncode == 0
    if compiled:
        path.insert(0, _COMPILED)
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    return "compiled" if compiled else "interpreted"


@dataclass(frozen=True, slots=True)
class _Daemon:
    process: Daemon
    place: Path
    port: int


class Nbdthin:
    """The daemon starts with the first image asked for; clones are made and removed while it runs, as users do."""

    name = "nbdthin"
    programs: tuple[str, ...] = ()
    settings = (
        Setting((), "its defaults, but for"),
        Setting((f'[scrub] rate = "{_SUMS}"',), "the parent's checksums are there before anything is measured"),
    )

    def __init__(self) -> None:
        self._daemons: dict[State, _Daemon] = {}  # one for the images in most states, as if they were FULL
        self._golden: dict[int, str] = {}  # the snapshot that clones of a size are made of
        self._numbers = itertools.count()

    def is_raw(self, state: State) -> bool:
        return False

    def keeps(self, state: State) -> bool:
        return True

    def open(self, state: State, ground: Ground) -> Export:
        if state is State.MAPPED:
            return _open_mapped(ground)
        kind = state if state in (State.SLOW, State.COLD) else State.FULL
        if kind not in self._daemons:
            self._daemons[kind] = _start(_ROOM * max(ground.size, GiB), ground, ground.environment(state))
        daemon = self._daemons[kind]
        place = daemon.place
        golden = self._golden_image(daemon, ground) if state is State.CLONE or state.depth else ""
        before = _allocated(place)
        name = f"{state.value.replace(' ', '-').replace(',', '')}.{next(self._numbers)}"
        generations = images.empty(ground.size) if state is State.EMPTY else images.blank(ground.size)
        with _control(place) as pool:
            if golden:
                pool.clone(golden, name)
            else:
                pool.create(name, ground.size)
            if state.is_full:
                _fill(place, name, ground)
            random = np.random.default_rng(state.depth)
            for depth in range(1, state.depth + 1):
                with Client(place / "s", name) as client:
                    write_some(client, generations, depth, random)
                pool.snapshot(name, f"{name}@{depth}")
        if state.depth:
            _settle(daemon.process.pid)
        address = ("127.0.0.1", daemon.port) if state is State.TCP else place / "s"
        close = partial(_remove, place, name, state.depth, before)
        return Export(address, name, daemon.process.pid, generations, close)

    def _golden_image(self, daemon: _Daemon, ground: Ground) -> str:
        """A snapshot of a full volume."""
        if ground.size not in self._golden:
            name = f"golden-{ground.size}"
            with _control(daemon.place) as pool:
                pool.create(name, ground.size)
                _fill(daemon.place, name, ground)
                pool.snapshot(name, f"{name}@1")
            _settle(daemon.process.pid)
            self._golden[ground.size] = f"{name}@1"
        return self._golden[ground.size]

    def check_parents(self, ground: Ground) -> None:
        for size, name in self._golden.items():
            with Client(self._daemons[State.FULL].place / "s", name) as client:
                images.check_kept(client, images.blank(size))


def _start(size: int, ground: Ground, environment: Mapping[str, str], pool: Path | None = None) -> _Daemon:
    """With a new pool of `size` bytes, or with the one at `pool`, which it takes away."""
    place = ground.place(Nbdthin.name)
    if pool is not None:
        pool.rename(place / "pool")
    port = free_port()
    config = place / "exports.toml"
    config.write_text(_CONFIG.format(size=size, port=port, sums=_SUMS))
    argv = [sys.executable, "-m", "nbdthin", "serve", "--config", str(config)]
    return _Daemon(Daemon(argv, place / "s", env=environment), place, port)


def _open_mapped(ground: Ground) -> Export:
    """A daemon of its own: the mapping of such a volume is made, not written."""
    pool = ground.place("mapped") / "pool"
    bigpool.make_full(pool, ground.size)
    images.allocate(pool / "data", (pool / "data").stat().st_size)
    daemon = _start(0, ground, {}, pool)

    def close() -> None:
        daemon.process.stop()
        shutil.rmtree(daemon.place)

    return Export(daemon.place / "s", bigpool.FULL_VOLUME, daemon.process.pid, images.empty(ground.size), close)


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


def _settle(pid: int) -> None:
    """Waits until the daemon has computed the checksums of what was sealed, and rests."""
    deadline = time.monotonic() + _REST
    rested = False
    while not rested and time.monotonic() < deadline:
        before = cpu_seconds(pid)
        time.sleep(0.2)
        rested = cpu_seconds(pid) - before < 0.02


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
