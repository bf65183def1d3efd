"""How a daemon ends, what it leaves, and that a pool has one user, on a file and on a block device."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import nbdthin
from nbdthin.units import GiB, KiB, MiB
from tests.clients import libnbd
from tests.clients.daemon import Daemon, nbdthin_command, run, running
from tests.clients.hostmount import loop, make_file_system, mounted_export, sums, wait_until
from tests.conftest import need

WRITE = 4 * KiB
DEPTH = 16  # writes in flight, a connection
STOPS_WITHIN = 10  # seconds


class Recorder:
    """A client that writes without a pause and remembers what was answered."""

    def __init__(self, uri: str) -> None:
        self.answered: dict[int, bytes] = {}  # offset -> data
        self.errors: set[int] = set()
        self._buffer = libnbd.load().Buffer
        self._handle = libnbd.new()
        self._handle.connect_uri(uri)
        self._next = 0

    @property
    def alive(self) -> bool:
        return self._handle.aio_is_ready()

    def work(self) -> None:
        """Keep DEPTH writes in flight, once around."""
        while self.alive and self._handle.aio_in_flight() < DEPTH:
            data = os.urandom(WRITE)
            done = partial(self._done, self._next, data)
            self._handle.aio_pwrite(self._buffer.from_bytearray(bytearray(data)), self._next, completion=done)
            self._next += WRITE
        if self.alive:
            self._handle.poll(100)

    def _done(self, offset: int, data: bytes, error: libnbd.Number) -> int:
        if error.value:
            self.errors.add(error.value)
        else:
            self.answered[offset] = data
        return 1  # libnbd forgets it


def test_sigterm_under_load_loses_nothing_that_was_answered_and_tells_no_client_of_an_error(
    daemon: Daemon, tmp_path: Path
) -> None:
    nbd = libnbd.load()
    busy = daemon.create("busy", "256 MiB")
    uris = [daemon.create(f"recorded{number}", GiB) for number in range(2)]
    jobs = ("--rw=randrw", "--bs=4k", "--iodepth=16", "--numjobs=4", "--time_based", "--runtime=600", "--size=256m")
    command = [need("fio"), "--name=load", "--thread", "--ioengine=nbd", f"--uri={busy}", *jobs]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path) as fio:
        try:
            recorders = [Recorder(uri) for uri in uris]
            while min(len(recorder.answered) for recorder in recorders) < 1000:
                for recorder in recorders:
                    recorder.work()
            daemon.signal(signal.SIGTERM)
            while any(recorder.alive for recorder in recorders):
                for recorder in recorders:
                    try:
                        recorder.work()
                    except nbd.Error as error:  # sending to who is gone
                        assert error.errnum in (errno.EPIPE, errno.ECONNRESET, errno.EINVAL, errno.ENOTCONN), error
            assert daemon.wait(STOPS_WITHIN) == 0
            said, _ = fio.communicate(timeout=STOPS_WITHIN)
        finally:
            fio.kill()
    for refusal in ("Input/output error", "Cannot send after transport endpoint shutdown"):
        assert refusal not in said, said
    assert set().union(*(recorder.errors for recorder in recorders)) <= {errno.ENOTCONN}
    daemon.start()
    for uri, recorder in zip(uris, recorders, strict=True):
        with libnbd.connected(uri) as handle:
            for offset, data in recorder.answered.items():
                assert handle.pread(WRITE, offset) == data, f"{uri} at {offset}"


def test_clients_that_idle_or_do_not_take_their_replies_do_not_keep_the_daemon(daemon: Daemon) -> None:
    uri = daemon.create("kept", "64 MiB")
    with libnbd.connected(uri) as idle, socket.socket(socket.AF_UNIX) as silent, daemon.connect() as control:
        silent.connect(str(daemon.socket))
        idle.pwrite(b"x" * 4 * KiB, 0)
        stalled = libnbd.new()
        stalled.connect_uri(uri)
        buffer = libnbd.load().Buffer
        for number in range(64):  # nobody calls poll for the answers
            stalled.aio_pread(buffer(MiB), number * MiB)
        assert control.list()[0].name == "kept"
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(STOPS_WITHIN) == 0


def test_sigint_ends_it_as_politely(daemon: Daemon) -> None:
    with libnbd.connected(daemon.create("kept", "1 MiB")) as handle:
        handle.pwrite(b"kept", 0)
        daemon.signal(signal.SIGINT)
        assert daemon.wait(STOPS_WITHIN) == 0
    daemon.start()
    with libnbd.connected(daemon.uri("kept")) as handle:
        assert handle.pread(4, 0) == b"kept"


def test_a_killed_daemon_comes_back_with_what_was_answered_though_nobody_flushed(daemon: Daemon) -> None:
    """A client that connects again does not know that there was a crash, and flushes as if nothing had been."""
    nbd = libnbd.load()
    uri = daemon.create("kept", "256 MiB")
    recorder = Recorder(uri)
    while len(recorder.answered) < 2000:
        recorder.work()
    with libnbd.connected(uri) as handle:
        handle.trim(8 * KiB, 0)
        handle.zero(4 * KiB, 16 * KiB)
        handle.pwrite(b"unaligned", 200 * MiB + 5)
        daemon.kill()
    while recorder.alive:
        try:
            recorder.work()
        except nbd.Error as error:
            assert error.errnum in (errno.EPIPE, errno.ECONNRESET, errno.EINVAL, errno.ENOTCONN), error
    daemon.start()
    recorder.answered.update({0: bytes(WRITE), 4 * KiB: bytes(WRITE), 16 * KiB: bytes(WRITE)})
    with libnbd.connected(uri) as handle:
        for offset, data in recorder.answered.items():
            assert handle.pread(WRITE, offset) == data, f"at {offset}"
        assert handle.pread(9, 200 * MiB + 5) == b"unaligned"


# -- one pool, one user


def test_a_pool_that_is_served_cannot_be_opened_again(daemon: Daemon, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    config = second / "exports.toml"
    config.write_text(
        f'pool.path = "{daemon.pool}"\nserver.listen = ["unix:nbd.sock"]\ncontrol.socket = "control.sock"\n'
    )
    for command in (("serve", "--config", config), ("check", daemon.pool)):
        refused = subprocess.run(nbdthin_command(*command), capture_output=True, text=True)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        assert str(daemon.pool) in refused.stderr
    with pytest.raises(nbdthin.Locked):
        nbdthin.Pool.open(daemon.pool)
    daemon.create("still", "1 MiB")


# -- on a block device


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The file behind the block device, all hole."""
    file = tmp_path / "device.img"
    with file.open("wb") as image:
        image.truncate(2 * GiB)
    return file


@pytest.fixture
def device(disk: Path) -> Iterator[Path]:
    with loop(disk) as device:
        yield device


@pytest.fixture
def device_daemon(device: Path, tmp_path: Path) -> Iterator[Daemon]:
    directory = tmp_path / "on-device"
    directory.mkdir()
    run(*nbdthin_command("init", directory / "pool", "--data", device))
    with running(directory) as daemon:
        yield daemon


def test_a_pool_on_a_block_device_keeps_its_data_and_gives_space_back_to_it(device_daemon: Daemon, disk: Path) -> None:
    daemon = device_daemon
    uri = daemon.create("disk", "4 GiB")
    with daemon.connect() as control:
        info = control.info().pool
        assert info.data_total <= 2 * GiB
        assert info.oversubscription > 2
    make_file_system(uri, "ext4")
    with mounted_export(uri) as directory:
        (directory / "kept").write_bytes(os.urandom(MiB))
        (directory / "dropped").write_bytes(os.urandom(64 * MiB))
        expected = sums(directory)
    full = disk.stat().st_blocks * 512
    assert full > 64 * MiB
    daemon.stop()
    daemon.start()
    with mounted_export(uri) as directory:
        assert sums(directory) == expected
        (directory / "dropped").unlink()
        run("sync", "-f", directory)
        run(need("fstrim"), directory)
    wait_until(lambda: disk.stat().st_blocks * 512 < full - 60 * MiB, "the device has got its space back")
    with mounted_export(uri) as directory:
        assert sums(directory) == {"kept": expected["kept"]}


def test_a_block_device_that_is_in_use_is_refused(device_daemon: Daemon, device: Path, tmp_path: Path) -> None:
    for force in ([], ["--force"]):
        command = nbdthin_command("init", tmp_path / "other", "--data", device, *force)
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        assert str(device) in refused.stderr
    with libnbd.connected(device_daemon.create("disk", "1 GiB")) as handle:
        handle.pwrite(b"alive", 0)


def test_a_killed_daemon_on_a_block_device_comes_back_with_what_was_flushed(device_daemon: Daemon) -> None:
    uri = device_daemon.create("disk", "1 GiB")
    data = os.urandom(3 * MiB)
    with libnbd.connected(uri) as handle:
        handle.pwrite(data, 777)
        handle.flush()
        device_daemon.kill()
    device_daemon.start()
    with libnbd.connected(uri) as handle:
        assert handle.pread(len(data), 777) == data
