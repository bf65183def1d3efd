"""A daemon with a pool of its own, perhaps one whose one image is fully mapped without a byte of data."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from benchlib import bigpool
from benchlib.client import Client
from benchlib.process import Daemon, cpu_seconds

import nbdthin
from nbdthin.addresses import UnixAddress
from nbdthin.host import own_memory
from nbdthin.pool.records import LEAF_BLOCKS
from nbdthin.units import KiB

BLOCK = bigpool.BLOCK_SIZE
IMAGE = "image"

# A pool may promise more than the disk below has: what is measured are mappings, not data.
_CONFIG = """\
[pool]
path = "pool"
size = "{size} B"
min_free = "0%"
auto_extend = false
[server]
listen = ["unix:s"]
[control]
socket = "control"
"""


class Served:
    """The daemon that serves the pool at `place`."""

    def __init__(self, place: Path, daemon: Daemon, pool: nbdthin.Client) -> None:
        self._place = place
        self._daemon = daemon
        self.pool = pool  # its control socket

    @property
    def memory(self) -> int:
        """Bytes that are its own."""
        return own_memory(psutil.Process(self._daemon.pid))

    def grown(self, before: int) -> int:
        """Bytes that its memory has grown by; 0 where it has meanwhile given back more than it took."""
        return max(self.memory - before, 0)

    @property
    def cpu(self) -> float:
        """Seconds since its start, in steps of 10 ms."""
        return cpu_seconds(self._daemon.pid)

    @property
    def data(self) -> Path:
        return self._place / "pool" / "data"

    @property
    def socket(self) -> Path:
        return self._place / "s"

    def client(self, name: str) -> Client:
        return Client(self.socket, name)

    def uri(self, name: str) -> str:
        return UnixAddress(self.socket).uri(name)

    def settle(self, seconds: float = 0.3) -> None:
        """Let what goes on in the background come to an end: a checkpoint, the next journal segment."""
        time.sleep(seconds)


@contextmanager
def serving(place: Path, size: int = 0) -> Iterator[Served]:
    """`size` bytes of pool, unless there is one at `place` already."""
    config = place / "exports.toml"
    config.write_text(_CONFIG.format(size=size or BLOCK))
    daemon = Daemon([sys.executable, "-m", "nbdthin", "serve", "--config", str(config)], place / "s")
    try:
        with nbdthin.connect(place / "control") as pool:
            yield Served(place, daemon, pool)
    finally:
        daemon.stop()


def make_image(place: Path, size: int) -> None:
    """A pool in `place` with the snapshot IMAGE of `size` bytes, a multiple of 32 MiB, all of it mapped."""
    bigpool.make_image(place / "pool", size, IMAGE)


def read_all_over(client: Client, size: int) -> None:
    """4 KiB of every 32 MiB, which is every leaf of the mapping. Raises BenchError where it is not zeroes."""
    expected = bytes(4 * KiB)
    step, at_once = LEAF_BLOCKS * BLOCK, 64
    for first in range(0, size, step * at_once):
        places = range(first, min(first + step * at_once, size), step)
        for place in places:
            client.ask(place, place, len(expected))
        for _ in places:
            place, data = client.answer(len(expected))
            if data != expected:
                raise nbdthin.Error(f"byte {place} of the image is not what it was")
