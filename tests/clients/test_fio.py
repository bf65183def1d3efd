"""fio with its nbd engine: many requests at once over several connections, every block verified by its checksum."""

from __future__ import annotations

from pathlib import Path

from tests.clients.daemon import Daemon, run
from tests.conftest import need

COMMON = ("--ioengine=nbd", "--verify=crc32c", "--verify_fatal=1", "--randrepeat=0", "--output-format=terse")


def fio(uri: str, directory: Path, *jobs: str) -> None:
    """Run jobs. fio leaves files behind where it runs."""
    need("fio")
    run("fio", *COMMON, f"--uri={uri}", *jobs, cwd=directory)


def test_random_writes_and_reads_of_all_sizes_over_four_connections_verify(
    shared_daemon: Daemon, tmp_path: Path
) -> None:
    uri = shared_daemon.create("sizes", "512 MiB")
    jobs = ("--numjobs=4", "--offset_increment=128m", "--size=24m", "--iodepth=32")
    fio(uri, tmp_path, "--name=sizes", "--rw=randrw", "--bsrange=512-256k", "--bs_unaligned=0", *jobs)


def test_blocks_survive_the_trims_of_their_neighbours(shared_daemon: Daemon, tmp_path: Path) -> None:
    """Four connections: two write every other 4 KiB and verify, two trim what lies between, in the same blocks."""
    uri = shared_daemon.create("trims", "128 MiB")
    halves = ("--numjobs=2", "--offset_increment=64m", "--io_size=12m", "--size=24m", "--bs=4k", "--iodepth=16")
    writers = ("--name=writers", "--rw=write:4k", *halves)
    trimmers = ("--name=trimmers", "--rw=trim:4k", "--offset=4k", *halves)
    fio(uri, tmp_path, *writers, *trimmers)


def test_what_is_trimmed_and_written_again_verifies(shared_daemon: Daemon, tmp_path: Path) -> None:
    uri = shared_daemon.create("again", "256 MiB")
    # Depth 1: of a trim and a write of the same block in flight at once, either may be the later.
    jobs = ("--numjobs=4", "--offset_increment=64m", "--size=8m", "--iodepth=1")
    fio(uri, tmp_path, "--name=again", "--rw=randtrimwrite", "--bs=16k", *jobs)


def test_overwrites_of_a_clone_verify_and_leave_the_snapshot_as_it_was(shared_daemon: Daemon, tmp_path: Path) -> None:
    layout = ("--size=12m", "--bs=4k", "--iodepth=32", "--numjobs=4", "--offset_increment=32m", "--randseed=7")
    uri = shared_daemon.create("origin", "128 MiB")
    fio(uri, tmp_path, "--name=origin", "--rw=randwrite", *layout)
    snapshot = shared_daemon.snapshot("origin", "origin@1")
    clone = shared_daemon.clone("origin@1", "copy")
    fio(clone, tmp_path, "--name=copy", "--rw=randwrite", "--verify_pattern=0x5a", *layout)
    fio(snapshot, tmp_path, "--name=origin", "--rw=randread", "--verify_only=1", *layout)
