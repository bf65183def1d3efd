"""A disk that really refuses: a loop device whose backing file has no room to grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdthin.errors import PoolFailed
from nbdthin.pool.pool import Pool
from nbdthin.units import KiB, MiB

from .conftest import BLOCK, need_root, pattern, run


@pytest.fixture
def failing_device(tmp_path: Path) -> Iterator[Path]:
    """64 MiB, of which about 4 can be written: then the kernel meets an I/O error when it writes back."""
    need_root("a loop device on a small file system")
    directory = tmp_path / "small"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory))
    try:
        backing = directory / "backing"
        with open(backing, "wb") as file:
            file.truncate(64 * MiB)
        device = run("losetup", "--find", "--show", str(backing))
        try:
            yield Path(device)
        finally:
            run("losetup", "--detach", device)
    finally:
        run("umount", str(directory))


def test_after_a_sync_that_the_disk_refused_the_pool_reads_what_the_disk_has(
    failing_device: Path, tmp_path: Path
) -> None:
    """The kernel keeps the pages that it could not write, calls them clean, and lets the next sync succeed."""
    Pool.init(tmp_path / "pool", data=failing_device)
    pool = Pool.open(tmp_path / "pool", autocommit=False)
    pool.create("v", "32 MiB")
    volume = pool.volume("v")
    volume.write(0, pattern(MiB))
    pool.commit()
    pool.snapshot("v", "v@1")
    pool.commit()
    volume.write(0, pattern(BLOCK, 2))
    volume.write(MiB, pattern(16 * MiB, 3))
    pool.unsynced.start(pool.journal.sequence + 1)
    pool.unsynced.publish()
    with pytest.raises(PoolFailed):
        pool.commit()
    assert pool.info().failed is not None
    assert pool.volume("v@1").read(0, MiB) == pattern(MiB)
    with pytest.raises(PoolFailed):
        volume.write(0, b"x" * 4 * KiB)
    with pytest.raises(PoolFailed):
        pool.snapshot("v", "v@2")
    pool.close()
    with Pool.open(tmp_path / "pool") as again:
        assert [row.name for row in again.list()] == ["v", "v@1"]
        assert again.volume("v").read(0, MiB) == pattern(MiB)
        assert again.volume("v").read(MiB, 16 * MiB) == bytes(16 * MiB)


def test_what_was_overwritten_in_place_and_refused_is_not_read_from_the_cache(
    failing_device: Path, tmp_path: Path
) -> None:
    Pool.init(tmp_path / "pool", data=failing_device)
    with Pool.open(tmp_path / "pool", autocommit=False) as pool:
        pool.create("v", "32 MiB")
        pool.volume("v").write_zeroes(0, 32 * MiB, allocate=True)
        pool.commit()
        pool.volume("v").write(0, bytes(range(256)) * 16 * KiB * 2)
        with pytest.raises(PoolFailed):
            pool.commit()
        position = (pool.volume("v").layer.entry(127) >> 32) * pool.block_size  # among the last, and so refused
        refused = memoryview(bytearray(BLOCK))
        pool.data.read_into(refused, position)
        assert not any(refused), "the page cache still shows what the disk never got"
