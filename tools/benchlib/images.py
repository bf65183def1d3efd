"""What the blocks of an image hold, by rule, so that any block read back says whether it is right.

A block of 4 KiB is a function of its number and of a generation: 0 for the first filling, k for what was written
before the k-th snapshot of a chain. fio's measured writes leave a constant (`WRITTEN`) that is no generation's
block. Nothing here knows sockets or servers; `Client` is only handed the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .client import Client
from .errors import BenchError

BLOCK = 4096
_STEP = 256  # blocks in one request: 1 MiB
# Blocks in one request that fills: 64 KiB. A file's first writes decide how large its folios in the page cache are, and
# to overwrite 4 KiB of a folio of 1 MiB costs ext4 twice the CPU (Linux 6.18: nbdkit 30 us for 15). All are at their
# best with small ones.
_FILL_STEP = 16
_WORDS = BLOCK // 8

WRITTEN_BYTE = 0xA5
_WRITTEN = np.uint64(int.from_bytes(bytes([WRITTEN_BYTE]) * 8, "little"))
# Odd constants of which no two rows or columns repeat within an image: a block in another's place shows.
_LANES = np.arange(_WORDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_NUMBER = np.uint64(0xD1B54A32D192ED03)
_GENERATION = np.uint64(0x8CB92BA72F3D8DD7)

Words = NDArray[np.uint64]

NOTHING = np.uint64(2**64 - 1)  # the generation of a block that nobody wrote: zeroes


def content(numbers: Words, generations: Words) -> Words:
    """One row of 512 words for each block number."""
    seeds = (numbers + np.uint64(1)) * _NUMBER ^ generations * _GENERATION
    rows: Words = seeds[:, None] ^ _LANES[None, :]
    rows[generations == NOTHING] = 0
    return rows


def blank(size: int) -> Words:
    """The generations of an image of `size` bytes that was filled and no more."""
    return np.zeros(size // BLOCK, dtype=np.uint64)


def empty(size: int) -> Words:
    """Those of an image of `size` bytes that nobody wrote to."""
    return np.full(size // BLOCK, NOTHING)


def make_sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def allocate(path: Path, size: int) -> None:
    """Gives a file its space on the disk, without anything in it."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _steps(generations: Words, step: int = _STEP) -> Iterator[tuple[int, Words]]:
    """(offset in bytes, expected rows) through a whole image."""
    numbers = np.arange(len(generations), dtype=np.uint64)
    for first in range(0, len(generations), step):
        part = slice(first, first + step)
        yield first * BLOCK, content(numbers[part], generations[part])


def fill_file(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _, rows in _steps(blank(size)):
            file.write(rows.tobytes())
        file.flush()
        os.fdatasync(file.fileno())


def fill(client: Client, size: int) -> None:
    for offset, rows in _steps(blank(size), _FILL_STEP):
        client.write(offset, rows.tobytes())
    client.flush()


def write_blocks(client: Client, generations: Words, numbers: Words, generation: int) -> None:
    """Writes the blocks `numbers` in `generation` and notes it in `generations`."""
    generations[numbers] = generation
    for number, row in zip(numbers.tolist(), content(numbers, generations[numbers]), strict=True):
        client.write(number * BLOCK, row.tobytes())


def check(client: Client, generations: Words) -> int:
    """Reads all of an image; how many blocks hold what fio wrote. Raises BenchError for what nobody wrote there."""
    written = 0
    for offset, expected in _steps(generations):
        found = np.frombuffer(client.read(offset, expected.nbytes), dtype=np.uint64).reshape(expected.shape)
        is_written = (found == _WRITTEN).all(axis=1)
        wrong = np.flatnonzero(~((found == expected).all(axis=1) | is_written))
        if len(wrong):
            raise BenchError(f"{len(wrong)} wrong blocks from byte {offset + int(wrong[0]) * BLOCK} on")
        written += int(is_written.sum())
    return written


def check_kept(client: Client, generations: Words) -> None:
    """The same of an image that fio did not write to."""
    written = check(client, generations)
    if written:
        raise BenchError(f"{written} blocks hold what was written elsewhere")


def check_file(path: Path, size: int) -> None:
    """A raw parent is what it was filled with."""
    with path.open("rb") as file:
        for offset, expected in _steps(blank(size)):
            if file.read(expected.nbytes) != expected.tobytes():
                raise BenchError(f"{path.name}: the parent changed, at byte {offset} or behind it")
