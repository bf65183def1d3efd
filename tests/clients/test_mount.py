"""Exports as file systems on the machine's own kernel, and what Docker's devicemapper driver promised of its layers."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nbdthin.units import GiB, KiB, MiB
from tests.clients import libnbd
from tests.clients.daemon import Daemon, run
from tests.clients.hostmount import (
    attached,
    check_file_system,
    make_file_system,
    mounted,
    mounted_export,
    sums,
)
from tests.conftest import need

BLOCK = 64 * KiB
UNREPLAYED = {"ext4": "noload", "xfs": "norecovery"}  # for a mount that writes nothing at all


def fill(directory: Path, count: int, size: int) -> dict[str, str]:
    """`count` random files. Returns their sums."""
    directory.mkdir(exist_ok=True)
    for number in range(count):
        (directory / f"file{number}").write_bytes(os.urandom(size))
    return sums(directory)


# -- file systems


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_keeps_its_files_and_gives_back_their_space(kind: str, daemon: Daemon) -> None:
    uri = daemon.create("disk", "2 GiB")
    make_file_system(uri, kind)
    empty = daemon.data_used()
    with mounted_export(uri) as directory:
        kept = fill(directory / "kept", 8, MiB)
        fill(directory / "dropped", 32, 2 * MiB)
    assert daemon.data_used() - empty > 72 * MiB
    with mounted_export(uri) as directory:
        assert sums(directory / "kept") == kept
        shutil.rmtree(directory / "dropped")
    # Mounted again: ext4 trims only what its journal has let go of, xfs frees what was removed in the background.
    with mounted_export(uri) as directory:
        run(need("fstrim"), directory)
    assert daemon.data_used() - empty < 16 * MiB
    check_file_system(uri, kind)
    with mounted_export(uri) as directory:
        assert sums(directory / "kept") == kept
        assert not (directory / "dropped").exists()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_snapshot_under_load_is_a_crash_consistent_image(kind: str, daemon: Daemon) -> None:
    uri = daemon.create("loaded", "1 GiB")
    make_file_system(uri, kind)
    with mounted_export(uri) as directory, fio_load(directory), Writer(directory) as writer:
        synced: dict[str, list[str]] = {}
        for number in range(3):
            writer.wait_for(25 * (number + 1))
            synced[f"loaded@{number}"] = list(writer.synced)
            daemon.snapshot("loaded", f"loaded@{number}")
        writer.wait_for(len(writer.synced) + 10)
    for snapshot, names in synced.items():
        clone = daemon.clone(snapshot, f"clone-of-{snapshot}")
        with mounted_export(clone) as directory:  # replays the journal
            for name in names:
                assert (directory / name).read_bytes() == Writer.content(name), f"{name} of {snapshot}"
        check_file_system(clone, kind)
    check_file_system(uri, kind)


@contextlib.contextmanager
def fio_load(directory: Path) -> Iterator[None]:
    """fio writes at random to a file, past the page cache, as fast as it can."""
    jobs = ("--rw=randwrite", "--bs=4k", "--size=32m", "--direct=1", "--ioengine=libaio", "--iodepth=16")
    command = [need("fio"), "--name=load", "--thread", "--time_based", "--runtime=600", *jobs]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL) as fio:
        try:
            yield
            assert fio.poll() is None, "fio ended"
        finally:
            fio.terminate()


class Writer:
    """Writes files into a directory, one fsync each, until it is left. `synced` are those whose fsync has returned."""

    def __init__(self, directory: Path) -> None:
        self.synced: list[str] = []
        self._directory = directory
        self._changed = threading.Condition()
        self._stop = False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._write)

    @staticmethod
    def content(name: str) -> bytes:
        return name.encode() * 20_000

    def _write(self) -> None:
        parent = os.open(self._directory, os.O_RDONLY)
        try:
            while not self._stop:
                name = f"file{len(self.synced)}"
                with (self._directory / name).open("wb") as file:
                    file.write(self.content(name))
                    os.fsync(file.fileno())
                os.fsync(parent)
                with self._changed:
                    self.synced.append(name)
                    self._changed.notify()
        except OSError as error:
            self._error = error
        finally:
            os.close(parent)
            with self._changed:
                self._stop = True
                self._changed.notify()

    def wait_for(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stop or len(self.synced) >= count)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()
        assert self._error is None, self._error


def read_when_at_rest(daemon: Daemon) -> int:
    """Bytes that the daemon has read, once it computes no checksums in the background any more."""
    process = psutil.Process(daemon.pid)
    read, before = process.io_counters().read_chars, -1
    while read != before:
        time.sleep(0.3)
        read, before = process.io_counters().read_chars, read
    return int(read)


def test_a_clone_of_10_gib_with_a_file_system_mounts_and_costs_no_data_block(daemon: Daemon) -> None:
    uri = daemon.create("big", 10 * GiB)
    make_file_system(uri, "ext4")
    with mounted_export(uri) as directory:
        files = fill(directory / "files", 64, MiB)
        content = (directory / "files" / "file7").read_bytes()
    daemon.snapshot("big", "big@1")
    used, taken = daemon.data_used(), data_taken(daemon)
    clone = daemon.clone("big@1", "clone")
    with attached(clone) as device, mounted(device, "ro", "noload") as directory:
        assert sums(directory / "files") == files
    assert daemon.data_used() == used
    with daemon.connect() as control:
        row = control.show("clone")
        assert (row.size, row.exclusive) == (10 * GiB, 0)

    with libnbd.connected(clone, "base:allocation") as handle:
        offset = whole_block_of(content, handle)
        read = read_when_at_rest(daemon)
        handle.pwrite(b"c" * 4 * KiB, offset + 8 * KiB)
        handle.flush()
        # What was around the 4 KiB was not fetched, and no more than they went into the data.
        assert psutil.Process(daemon.pid).io_counters().read_chars - read < 32 * KiB
    assert daemon.data_used() - used == BLOCK
    assert data_taken(daemon) - taken == 4 * KiB
    with mounted_export(clone) as directory:
        changed = sums(directory / "files")
        assert changed.pop("file7") != files["file7"]
        assert changed == {name: sum_ for name, sum_ in files.items() if name != "file7"}
    with mounted_export(uri) as directory:
        assert sums(directory / "files") == files


def data_taken(daemon: Daemon) -> int:
    """Bytes that the pool's data file takes on its disk."""
    return (daemon.pool / "data").stat().st_blocks * 512


def whole_block_of(content: bytes, handle: libnbd.Handle) -> int:
    """Where on the disk there is a block of the pool that holds nothing but a part of this file."""
    offset = 0
    for length, flags in libnbd.extents(handle, "base:allocation", 10 * GiB):
        for start in range(-(-offset // BLOCK) * BLOCK, offset + length - BLOCK + 1, BLOCK):
            if not flags and bytes(handle.pread(BLOCK, start)) in content:
                return start
        offset += length
    raise AssertionError("the file has no whole block")


# -- what the devicemapper driver promised


def test_a_fresh_snapshot_and_a_fresh_clone_take_no_data_block(daemon: Daemon) -> None:
    with libnbd.connected(daemon.create("base", "10 GiB")) as handle:
        handle.pwrite(os.urandom(MiB), 0)
        handle.flush()
    used = daemon.data_used()
    daemon.snapshot("base", "image")
    for number in range(20):
        daemon.clone("image", f"container{number}")
    assert daemon.data_used() == used == MiB


def test_56_kib_to_a_new_place_take_exactly_one_block_of_64_kib(daemon: Daemon) -> None:
    daemon.create("base", "10 GiB")
    daemon.snapshot("base", "image")
    container = daemon.clone("image", "container")
    with libnbd.connected(container) as handle:
        handle.pwrite(os.urandom(56 * KiB), 5 * GiB)
        handle.flush()
        assert daemon.data_used() == BLOCK
        handle.pwrite(os.urandom(8 * KiB), 5 * GiB + 56 * KiB)
        handle.flush()
        assert daemon.data_used() == BLOCK


def test_a_block_is_read_from_the_image_that_owns_it_whatever_lies_between(daemon: Daemon) -> None:
    """Each image of a chain of five adds a file and replaces one; a container on top sees the newest of each."""
    uri = daemon.create("build", "1 GiB")
    make_file_system(uri, "ext4")
    expected: dict[str, str] = {}
    for layer in range(5):
        with mounted_export(uri) as directory:
            (directory / f"of-layer{layer}").write_bytes(os.urandom(300 * KiB))
            (directory / "replaced").write_bytes(os.urandom(100 * KiB))
            expected = sums(directory)
        daemon.snapshot("build", f"image:{layer}")
        uri = daemon.clone(f"image:{layer}", f"build{layer}")
        with daemon.connect() as control:
            control.remove("build")
            control.rename(f"build{layer}", "build")
        uri = daemon.uri("build")
    container = daemon.clone("image:4", "container")
    with mounted_export(container, "ro", "noload", read_only=True) as directory:
        assert sums(directory) == expected
    with libnbd.connected(container, "qemu:allocation-depth") as handle:
        depths = {depth for _, depth in libnbd.extents(handle, "qemu:allocation-depth", GiB)}
    assert depths == {0, 2, 3, 4, 5, 6}  # nothing is the container's own yet, and every image is read from


def test_a_small_change_in_a_big_file_copies_only_what_changed(daemon: Daemon) -> None:
    uri = daemon.create("base", "2 GiB")
    make_file_system(uri, "ext4")
    with mounted_export(uri) as directory:
        (directory / "big").write_bytes(os.urandom(128 * MiB))
    daemon.snapshot("base", "image")
    before, taken = daemon.data_used(), data_taken(daemon)
    container = daemon.clone("image", "container")
    with mounted_export(container, "noatime") as directory, (directory / "big").open("r+b") as file:
        file.seek(70 * MiB)
        file.write(b"changed" * 100)
    # The block itself, and what the file system notes down: inodes, the journal, the superblock.
    assert BLOCK <= daemon.data_used() - before <= 2 * MiB
    assert data_taken(daemon) - taken <= MiB
    with libnbd.connected(container, "qemu:allocation-depth") as handle:
        depths = libnbd.extents(handle, "qemu:allocation-depth", 2 * GiB)
    assert sum(length for length, depth in depths if depth == 1) <= MiB
    assert sum(length for length, depth in depths if depth == 2) >= 127 * MiB


def test_the_changes_of_a_container_go_with_it_and_the_image_stays(daemon: Daemon) -> None:
    uri = daemon.create("base", "1 GiB")
    make_file_system(uri, "ext4")
    with mounted_export(uri) as directory:
        files = fill(directory / "files", 16, MiB)
    image = daemon.snapshot("base", "image")
    used = daemon.data_used()
    for _ in range(2):
        container = daemon.clone("image", "container")
        with mounted_export(container) as directory:
            assert sums(directory / "files") == files
            shutil.rmtree(directory / "files")
            fill(directory / "own", 8, 2 * MiB)
        assert daemon.data_used() > used + 16 * MiB
        with daemon.connect() as control:
            control.remove("container")
        assert daemon.data_used() == used
        with mounted_export(image, "ro", "noload", read_only=True) as directory:
            assert sums(directory / "files") == files
    check_file_system(image, "ext4")
