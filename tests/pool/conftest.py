"""Pools for tests. Every pool that a test makes here ends in `check`, a commit, a reopening and `check` again.

The helpers wrap the real parts (`Faults`, `Calls`) or read files as FORMAT.md says they are; none stands in for a part.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from nbdthin.pool import journal as journal_module
from nbdthin.pool import pool as pool_module
from nbdthin.pool.check import check, check_path
from nbdthin.pool.layers import LEAF_SHIFT, SUBBLOCKS, Layer, words
from nbdthin.pool.policy import Policy
from nbdthin.pool.pool import Pool
from nbdthin.pool.volume import Volume
from nbdthin.units import KiB, MiB

BLOCK = 64 * KiB
SUB = BLOCK // SUBBLOCKS
FIXED = Policy(min_free=0, auto_extend=False)  # a pool that can be filled, and stays as it is
LEAF = 512 * BLOCK  # bytes that one leaf maps


class Pools:
    """Makes pools in a directory and keeps an eye on them until the test ends."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[Path, Pool] = {}

    def make(
        self,
        *,
        size: int | str = 64 * MiB,
        block_size: int = BLOCK,
        data: Path | None = None,
        path: Path | None = None,
        autocommit: bool = True,
        policy: Policy = FIXED,
    ) -> Pool:
        if path is None:
            path = self._directory / f"pool{len(list(self._directory.glob('pool*')))}"
        Pool.init(path, size=size, block_size=block_size, data=data)
        return self.open(path, autocommit=autocommit, policy=policy)

    def open(self, path: Path, *, autocommit: bool = True, policy: Policy = FIXED) -> Pool:
        pool = self._open[path] = Pool.open(path, autocommit=autocommit, policy=policy)
        return pool

    def close(self, pool: Pool) -> Path:
        """Close `pool` for good or for the test to damage: nothing is checked."""
        self._open.pop(pool.path).close()
        return pool.path

    def kill(self, pool: Pool) -> Path:
        """End `pool` as SIGKILL ends its process."""
        return kill(self._open.pop(pool.path))

    def crash(self, pool: Pool) -> Path:
        """End `pool` without a commit: what was not durable is gone, but for data written in place."""
        pool.fail(OSError(errno.EIO, "the test crashed it"))
        return self.close(pool)

    def reopen(self, pool: Pool, *, autocommit: bool = True) -> Pool:
        """Check, commit, close, open and check again."""
        if pool.failed is None:
            assert check(pool) == []
            pool.commit()
            assert check(pool) == []
        again = self.open(self.close(pool), autocommit=autocommit, policy=pool.policy)
        assert check(again) == []
        return again

    def _places(self, pool: Pool) -> list[object]:
        """Where the bytes of the first few names are."""
        volumes = [pool.volume(row.name) for row in pool.list()[:20]]
        return [volume.segments(0, min(volume.size, 16 * MiB)) for volume in volumes]

    def finish(self) -> None:
        try:
            for pool in list(self._open.values()):
                before = self._places(pool) if pool.failed is None else None
                again = self.reopen(pool)
                assert before is None or self._places(again) == before
                path = self.close(again)
                assert check_path(path).problems == ()
        finally:
            for pool in self._open.values():
                pool.fail(OSError(errno.EIO, "the test failed"))
                with suppress(OSError):  # closed already
                    pool.close()


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pools]:
    if journal_module.SEGMENT_BYTES == 4 * MiB:  # zeroes for hundreds of pools would be most of the time
        monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 256 * KiB)
        monkeypatch.setattr(journal_module, "_ZEROES", bytes(64 * KiB))
    pools = Pools(tmp_path)
    yield pools
    pools.finish()


@pytest.fixture
def pool(pools: Pools) -> Pool:
    """64 MiB in blocks of 64 KiB; verbs are durable when they return."""
    return pools.make()


@pytest.fixture
def quiet(pools: Pools) -> Pool:
    """The same, and nothing is committed but by the test."""
    return pools.make(autocommit=False)


@pytest.fixture
def full(pools: Pools) -> Pool:
    """15 blocks of 16 KiB, none committed but by the test: easily full."""
    return pools.make(size=256 * KiB, block_size=16 * KiB, autocommit=False)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> int:
    """Journal segments of 4 KiB, so that few frames fill one. Returns their size."""
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 4 * KiB)
    monkeypatch.setattr(journal_module, "_ZEROES", bytes(KiB))
    return 4 * KiB


@pytest.fixture
def eager_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint at every commit that has journalled more than the checkpoint before it."""
    monkeypatch.setattr(pool_module, "CHECKPOINT_JOURNAL", 0)


def need_root(what: str) -> None:
    """Skip, with the reason, what only root can do; in CI, where root is promised, fail."""
    if os.geteuid() == 0:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} needs root, and CI must have it")
    pytest.skip(f"{what} needs root")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 20 MiB."""
    need_root("mounting a small file system")
    path = tmp_path / "disk"
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(path))
    try:
        yield path
    finally:
        run("umount", str(path))


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """A loop device of 64 MiB over `tmp_path / "backing"`."""
    need_root("a loop device")
    backing = tmp_path / "backing"
    with open(backing, "wb") as file:
        file.truncate(64 * MiB)
    device = run("losetup", "--find", "--show", str(backing))
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


# -- content


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes without repetition, so that what is read from a wrong place is not taken for right."""
    return random.Random(seed).randbytes(length)


def over_leaves(pool: Pool, leaves: int, snapshot: str) -> Pool:
    """The same pool with a new volume `v`, two blocks written in each of its leaves, and a snapshot of that."""
    pool.create("v", leaves * LEAF)
    for leaf in range(leaves):
        pool.volume("v").write(leaf * LEAF, pattern(2 * BLOCK, leaf))
    pool.snapshot("v", snapshot)
    return pool


def contents(pool: Pool) -> dict[str, list[tuple[int, str]]]:
    """What each name reads as, where it is not zero: (offset, digest), so that large ones cost little."""
    return {row.name: _written(pool.volume(row.name)) for row in pool.list()}


def _written(volume: Volume) -> list[tuple[int, str]]:
    part = 64 * volume.pool.block_size
    parts = sorted(
        {
            ((leaf << LEAF_SHIFT) + index) // 64 * part
            for layer in chain(volume.layer)
            for leaf, own in layer.own.items()
            for index in np.flatnonzero(words(own)).tolist()
        }
    )
    read = [(offset, volume.read(offset, min(part, volume.size - offset))) for offset in parts if offset < volume.size]
    return [(offset, hashlib.sha256(data).hexdigest()) for offset, data in read if data.count(0) != len(data)]


def chain(layer: Layer) -> Iterator[Layer]:
    """The layer, its parent, and so on."""
    node: Layer | None = layer
    while node is not None:
        yield node
        node = node.parent


def walk(layer: Layer, block: int) -> tuple[int, ...]:
    """The physical block of each subblock, 0 for one that reads as zero: by the definition, one layer at a time."""
    found = [0] * SUBBLOCKS
    rest = (1 << SUBBLOCKS) - 1
    for node in chain(layer):
        entry = node.entry(block)
        if entry & rest:
            found = [entry >> 32 if (entry & rest) >> sub & 1 else found[sub] for sub in range(SUBBLOCKS)]
        rest &= ~(entry | entry >> 16)
    return tuple(found)


def used(pool: Pool) -> int:
    """Blocks of the pool in use."""
    return pool.allocator.used


def kill(pool: Pool) -> Path:
    """End `pool` as SIGKILL ends its process: no commit, nothing tidied up; the page cache keeps what it has."""
    pool.unsynced.close(clean=False)
    pool.journal.close()
    pool.sums.close()
    pool.data.close()
    os.close(pool._lock)
    return pool.path


def fill(pool: Pool, name: str = "filler") -> None:
    """Write one new volume until the pool has no block left, and commit."""
    blocks = pool.allocator.free
    pool.create(name, blocks * pool.block_size)
    pool.volume(name).write(0, bytes(blocks * pool.block_size))
    pool.commit()
    assert pool.allocator.free == 0


# -- faults and records of calls, on the real parts


class Faults:
    """Wraps a method of a real object: the next `times` calls raise `code` instead of doing anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: object, method: str, code: int, after: int = 0) -> None:
        self.calls = 0
        self.active = True
        real: Callable[..., object] = getattr(target, method)

        def faulty(*arguments: object) -> object:
            self.calls += 1
            if self.active and self.calls > after:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        monkeypatch.setattr(target, method, faulty)


class Calls:
    """Wraps methods of real objects and notes the order in which they are called; they still do their work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self._monkeypatch = monkeypatch

    def watch(self, target: object, method: str, name: str) -> None:
        real: Callable[..., object] = getattr(target, method)

        def watched(*arguments: object) -> object:
            self.seen.append(name)
            return real(*arguments)

        self._monkeypatch.setattr(target, method, watched)


class Writes:
    """Counts the bytes that reach the data file, by wrapping its real `write`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pool: Pool) -> None:
        self.bytes = 0
        self.calls = 0
        real = pool.data.write

        def counted(payload: memoryview, position: int) -> None:
            self.bytes += len(payload)
            self.calls += 1
            real(payload, position)

        monkeypatch.setattr(pool.data, "write", counted)


# -- journal files


def logs(path: Path) -> list[Path]:
    return sorted((path / "journal").glob("*.log"))


def checkpoints(path: Path) -> list[Path]:
    return sorted((path / "journal").glob("*.checkpoint"))


def frames(path: Path) -> list[tuple[int, int]]:
    """(offset, end) of each frame of a journal file."""
    data = path.read_bytes()
    found = []
    offset = 0
    while (parsed := journal_module.parse_frame(data, offset)) is not None:
        end = offset + journal_module.HEADER.size + len(parsed[1])
        found.append((offset, end))
        offset = end
    return found


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    """Damage one byte of a file in place."""
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ mask]))
