"""A daemon of its own for a test: started as a user starts it, in a directory of its own, checked when it has ended."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbdthin
from nbdthin.units import GiB

CONFIG = """
[pool]
path = "pool"
size = "{size} MiB"
[server]
listen = ["unix:nbd.sock", "tcp:127.0.0.1:{port}"]
[control]
socket = "control.sock"
[[export]]
name = "golden/*"
read_only = true
description = "not to be written"
"""

PATIENCE = 120  # seconds until a test gives up on what should have happened at once; nothing is measured with it


def nbdthin_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "nbdthin", *map(str, arguments)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# What a service manager does between fork and exec: LISTEN_PID is known only there. The arguments: names, joined by
# colons, their descriptors, by commas, and the command.
HAND_OVER = """
import fcntl, os, sys
names, fds = sys.argv[1], [int(fd) for fd in sys.argv[2].split(",")]
for index, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3 + len(fds)) for fd in fds]):
    os.dup2(fd, 3 + index)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names)
os.execv(sys.argv[3], sys.argv[3:])
"""


def handing_over(sockets: Mapping[str, socket.socket]) -> list[str]:
    """What to put before a command so that it gets these sockets as from systemd; its process inherits them."""
    fds = ",".join(str(each.fileno()) for each in sockets.values())
    return [sys.executable, "-S", "-E", "-c", HAND_OVER, ":".join(sockets), fds]


class Daemon:
    """`directory` holds its config, its pool, its sockets and what it says (`log`)."""

    def __init__(self, directory: Path, *, size: int = 100 * GiB) -> None:
        self.directory = directory
        self.pool = directory / "pool"
        self.control = directory / "control.sock"
        self.socket = directory / "nbd.sock"
        self.config = directory / "exports.toml"
        self.log = directory / "daemon.log"
        self.port = free_port()
        self.config.write_text(CONFIG.format(size=size >> 20, port=self.port))
        self.handed: dict[str, socket.socket] = {}  # listening sockets that it is given, by name
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def launch(self) -> None:
        """Start it and wait for nothing."""
        assert self._process is None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._handing_over(), *nbdthin_command("serve", "--config", self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[each.fileno() for each in self.handed.values()],
            )

    def _handing_over(self) -> list[str]:
        return handing_over(self.handed) if self.handed else []

    def start(self) -> None:
        self.launch()
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, f"the daemon did not start:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"the daemon does not answer:\n{self.log.read_text()}"
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with self.connect() as control:
                control.info()
        except nbdthin.Unreachable:
            return False
        return True

    def end(self, number: signal.Signals) -> None:
        """All of its way down, by SIGTERM or SIGKILL."""
        self.signal(number)
        assert self.wait() == (0 if number == signal.SIGTERM else -number), self.log.read_text()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit status, negative for a signal."""
        assert self._process is not None
        status = self._process.wait(timeout)
        self._process = None
        return status

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def stop(self) -> None:
        self.end(signal.SIGTERM)

    def close(self) -> None:
        """End it if it runs, and hold it to what every test expects of it: no traceback, and a pool that is sound."""
        if self._process is not None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        assert "Traceback" not in self.log.read_text(), self.log.read_text()
        check = subprocess.run(nbdthin_command("check", self.pool), capture_output=True, text=True)
        assert check.returncode == 0, check.stdout + check.stderr

    def uri(self, name: str) -> str:
        with self.connect() as control:
            uri = control.show(name).uri
        assert uri is not None
        return uri

    def connect(self) -> nbdthin.Client:
        return nbdthin.connect(self.control)

    def create(self, name: str, size: str | int) -> str:
        """A new volume, and where clients find it."""
        with self.connect() as control:
            control.create(name, size)
        return self.uri(name)

    def snapshot(self, volume: str, name: str) -> str:
        with self.connect() as control:
            control.snapshot(volume, name)
        return self.uri(name)

    def clone(self, snapshot: str, name: str) -> str:
        with self.connect() as control:
            control.clone(snapshot, name)
        return self.uri(name)

    def data_used(self) -> int:
        """Bytes of the pool's data that are taken."""
        with self.connect() as control:
            return control.info().pool.data_used


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Daemon]:
    daemon = Daemon(directory)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


@contextlib.contextmanager
def supervised(directory: Path) -> Iterator[Daemon]:
    """A daemon whose sockets this process holds, as systemd does: those who connect while it is down are queued.

    It has not been started.
    """
    daemon = Daemon(directory)
    with contextlib.ExitStack() as stack:
        for name, family, address in (
            ("nbd", socket.AF_UNIX, str(daemon.socket)),
            ("nbd-tcp", socket.AF_INET, ("127.0.0.1", daemon.port)),
            ("control", socket.AF_UNIX, str(daemon.control)),
        ):
            listening = daemon.handed[name] = stack.enter_context(socket.socket(family))
            if family == socket.AF_INET:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        try:
            yield daemon
        finally:
            daemon.close()


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a client to its end and return what it printed. It must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_json(*command: str | Path) -> object:
    return json.loads(run(*command))
