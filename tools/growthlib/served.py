"""A daemon with a pool of its own, and pools whose one image is fully mapped without a byte of data."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np
import psutil
from benchlib.client import Client
from benchlib.process import Daemon, cpu_seconds

import nbdthin
from nbdthin.host import own_memory
from nbdthin.pool.journal import Journal
from nbdthin.pool.layers import FULL, Words
from nbdthin.pool.pool import Pool
from nbdthin.pool.records import LEAF_BLOCKS, Counter, End, Layer, Leaf, Name, Record, encode
from nbdthin.units import KiB

BLOCK = 64 * KiB
IMAGE = "image"
_RUN = 16  # blocks that lie together: what a volume is given at a time
_FRAME = 128  # leaves

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
        """Bytes, resident."""
        resident = own_memory(psutil.Process(self._daemon.pid))
        return resident

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
        return f"nbd+unix:///{quote(name, safe='')}?socket={quote(str(self.socket))}"

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
    """A pool in `place` with the snapshot IMAGE of `size` bytes, a multiple of 32 MiB, all of it mapped.

    As a pool's own checkpoint, by the engine's own encoder. The data file is a hole: all reads as zeroes.
    """
    blocks = size // BLOCK
    assert blocks and blocks % LEAF_BLOCKS == 0
    path = place / "pool"
    Pool.init(path, size=(blocks + blocks // 8 + _RUN) * BLOCK, block_size=BLOCK)
    journal = Journal(path / "journal")
    journal.load(lambda _: None)
    journal.write_checkpoint(journal.start_segment(), _payloads(blocks))
    journal.close()


def _payloads(blocks: int) -> Iterator[bytes]:
    part: list[Record] = [Counter(2), Layer(1, 0), Name(IMAGE, True, 1, blocks * BLOCK, time.time(), {})]
    count = 0
    for leaf in _leaves(blocks):
        part.append(leaf)
        if len(part) >= _FRAME:
            yield encode(part)
            count += len(part)
            part = []
    yield encode([*part, End(count + len(part))])


def _leaves(blocks: int) -> Iterator[Leaf]:
    """In runs of no order, as those of a volume that was written beside others."""
    runs = np.random.default_rng(1).permutation(blocks // _RUN).astype(np.uint64)
    within = np.arange(_RUN, dtype=np.uint64)
    each = LEAF_BLOCKS // _RUN
    for leaf in range(blocks // LEAF_BLOCKS):
        physical: Words = (runs[leaf * each : (leaf + 1) * each, None] * np.uint64(_RUN) + within).reshape(-1)
        entries = (physical + np.uint64(1)) << np.uint64(32) | np.uint64(FULL)
        yield Leaf(1, leaf, entries.tobytes())


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
