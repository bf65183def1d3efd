"""A restart of the daemon is not an outage: its listening sockets stay, so that clients queue, and those that come
back by themselves go on as if nothing had been, with a mounted file system on top.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from nbdthin.units import KiB, MiB
from tests import rawclient
from tests.clients import libnbd
from tests.clients.daemon import Daemon, run, supervised
from tests.clients.hostmount import loop, mounted, storage_daemon, sums, wait_until
from tests.conftest import need

ENDINGS = [signal.SIGTERM, signal.SIGKILL]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with supervised(tmp_path) as daemon:
        daemon.start()
        yield daemon


# -- the queue


@pytest.mark.parametrize("number", ENDINGS)
def test_clients_that_connect_while_no_daemon_runs_are_served_by_the_next(
    daemon: Daemon, number: signal.Signals
) -> None:
    daemon.create("a", "1 MiB")
    with contextlib.closing(rawclient.Client(daemon.socket, "a")) as client:
        assert client.write(0, b"a" * 4096, flags=rawclient.FUA) == 0
    daemon.end(number)
    with (
        contextlib.closing(rawclient.Client(daemon.socket)) as queued,
        socket.create_connection(("127.0.0.1", daemon.port)) as tcp,
        daemon.connect() as control,
        ThreadPoolExecutor() as threads,
    ):
        queued.sock.settimeout(0)
        with pytest.raises(BlockingIOError):
            queued.sock.recv(1)
        queued.sock.settimeout(None)
        asked = threads.submit(control.show, "a")
        daemon.start()
        assert asked.result().size == MiB
        queued.handshake("a", False, ())
        assert queued.read(0, 4096) == b"a" * 4096
        assert tcp.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
    for path in (daemon.socket, daemon.control):
        assert path.is_socket(), "what was handed over is not the daemon's to remove"


def wait_for_more(counts: list[int]) -> None:
    """Wait until each of them has grown."""
    before = list(counts)
    wait_until(lambda: all(now > then for now, then in zip(counts, before, strict=True)), "everyone is served")


def test_nobody_is_accepted_and_then_closed_while_the_daemon_is_restarted(daemon: Daemon) -> None:
    """Each client that connects is given its export, by the old daemon or by the new one."""
    daemon.create("a", "1 MiB")
    enough = threading.Event()
    served = [0] * 4

    def connect(number: int) -> None:
        while not enough.is_set():
            rawclient.Client(daemon.socket, "a").close()
            served[number] += 1

    with ThreadPoolExecutor() as threads:
        connecting = [threads.submit(connect, number) for number in range(len(served))]
        try:
            for _ in range(5):
                wait_for_more(served)
                daemon.stop()
                daemon.start()
        finally:
            enough.set()
    for each in connecting:
        each.result()


# -- a file system on a client that comes back


class Busy:
    """Writes files and syncs each, until it is told to stop; what it wrote is known."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.synced: dict[str, bytes] = {}
        self._enough = threading.Event()
        self._threads = ThreadPoolExecutor(1)
        self._writing = self._threads.submit(self._write)

    def _write(self) -> None:
        while not self._enough.is_set():
            name = f"f{len(self.synced) % 200}"
            data = os.urandom(64 * KiB)
            with (self.directory / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self.synced[name] = data
            self.count += 1

    count = 0

    def goes_on(self) -> None:
        """Wait until it has written more."""
        target = self.count + 3
        wait_until(lambda: self.count >= target or self._writing.done(), "a file written")
        if self._writing.done():
            self._writing.result()

    def stop(self) -> None:
        self._enough.set()
        self._writing.result()
        self._threads.shutdown()


@contextlib.contextmanager
def busy_disk(daemon: Daemon) -> Iterator[Busy]:
    """An ext4 on a new volume "disk", by QEMU's client, written without a pause: sound in the end, with all of it."""
    for program in ("mkfs.ext4", "e2fsck"):
        need(program)
    daemon.create("disk", "256 MiB")
    with storage_daemon(daemon.socket, "disk") as file, loop(file) as device:
        run("mkfs.ext4", "-q", device)
        with mounted(device) as directory:
            busy = Busy(directory)
            yield busy
            busy.stop()
            run("sync", "-f", directory)
            Path("/proc/sys/vm/drop_caches").write_text("1")
            for name, data in busy.synced.items():
                assert (directory / name).read_bytes() == data, name
        run("e2fsck", "-fn", device)


@pytest.mark.slow
def test_ext4_on_qemus_client_rides_through_restarts(daemon: Daemon) -> None:
    with busy_disk(daemon) as busy:
        for number in [*ENDINGS, signal.SIGKILL, *ENDINGS]:
            busy.goes_on()
            daemon.end(number)
            daemon.start()
            busy.goes_on()
    with storage_daemon(daemon.socket, "disk") as file, loop(file) as device, mounted(device, "ro") as directory:
        assert sums(directory) == {name: sha256(data).hexdigest() for name, data in busy.synced.items()}
    with libnbd.connected(daemon.uri("disk")) as handle:
        assert handle.get_size() == 256 * MiB


@pytest.mark.slow
def test_so_does_one_on_a_disk_that_was_removed_meanwhile(daemon: Daemon) -> None:
    """`rm --deferred`: it is there for the client that had it, and for nobody and nothing else, until that one goes."""
    with busy_disk(daemon) as busy:
        busy.goes_on()
        uri = daemon.uri("disk")
        with daemon.connect() as control:
            control.remove("disk", deferred=True)
        busy.goes_on()
        with pytest.raises(libnbd.load().Error, match="has no export"), libnbd.connected(uri):
            pass
        for number in [*ENDINGS, *ENDINGS]:
            daemon.end(number)
            daemon.start()
            busy.goes_on()
    with daemon.connect() as control:
        assert control.list() == []
        (row,) = control.list(deferred=True)  # for a minute, the client may be on its way back
        wait_until(lambda: control.show(row.name).open_count == 0, "the client has gone")
        control.remove(row.name)
    wait_until(lambda: daemon.data_used() == 0, "its space is free")
