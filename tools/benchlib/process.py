"""Servers as processes: started until their socket answers, charged for their CPU time, ended by their pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from .client import Address, connect
from .errors import BenchError

_START = 20.0  # seconds until the socket must answer: a chain of 100 files on a busy machine takes 1 to 2
_STOP = 15.0  # seconds to end by itself; nbdthin promises 10

_running: set[Daemon] = set()  # for `servers_ended`: an interrupt may come when no one else knows of a server yet


class Daemon:
    """One server process (and its children), from its start to `stop`.

    It gets a session of its own, so that a Ctrl-C in the terminal reaches the bench alone, which then ends the
    servers in order. It is up when its socket `sock` answers, or `address` where it listens elsewhere. `pidfile` is for
    servers that go into the background: theirs is the process that counts.
    """

    def __init__(
        self,
        argv: Sequence[str],
        sock: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pidfile: Path | None = None,
        address: Address | None = None,
    ) -> None:
        self.name = Path(argv[0]).name
        self._log = sock.with_suffix(".log")
        self._pidfile = pidfile
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self.pid = self._child.pid
        _running.add(self)
        try:
            self._wait_for(address or sock)
        except BenchError:
            self.stop()
            raise

    def _wait_for(self, address: Address) -> None:
        deadline = time.monotonic() + _START
        while not (self._background_pid() and _answers(address)):
            ended = self._child.poll()
            if ended is not None and (self._pidfile is None or ended != 0):
                raise BenchError(f"{self.name} ended with status {ended}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name} did not answer at {address} within {_START:.0f} s: {self.last_words()}")
            time.sleep(0.005)

    def _background_pid(self) -> bool:
        """Whether `pid` is known to be the serving process."""
        if self._pidfile is None:
            return True
        try:
            self.pid = int(self._pidfile.read_text())
        except (FileNotFoundError, ValueError):  # not there yet, or not yet written
            return False
        return True

    def last_words(self) -> str:
        return last_line(self._log.read_text(errors="replace"))

    def stop(self) -> None:
        try:
            processes = family(self.pid)
        except BenchError:
            processes = []
        _end(processes)
        self._child.wait()
        _running.discard(self)


def interrupt_on_signals() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt; SIGINT, too: a script's background job starts with it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def servers_ended() -> Iterator[None]:
    """However it ends, no server is left."""
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the second Ctrl-C of an impatient user would leave the rest running
        for daemon in list(_running):
            daemon.stop()


def _end(processes: Sequence[psutil.Process]) -> None:
    """Asks all, waits, and kills who stays."""
    for process in processes:
        if process.is_running():
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=_STOP)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at, nor will soon: the kernel hands out others first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(address: Address) -> bool:
    """Whether an NBD server greets there. A socket that connects is not enough: nbd-server then still has half a
    second of CPU to spend on keys for TLS, which would be charged to the first requests."""
    try:
        with connect(address, _START) as probe:
            return probe.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
    except (FileNotFoundError, ConnectionError):
        return False


def last_line(text: str) -> str:
    """Of what a program said, the line that tells why it failed."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def output_of(argv: Sequence[str], name: str = "") -> str:
    """What a helper program prints. Raises BenchError with its last line, and `name` in place of its own."""
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise BenchError(f"{name or argv[0]}: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def family(pid: int) -> list[psutil.Process]:
    """A process and its children, and theirs. Raises BenchError where it has ended."""
    try:
        main = psutil.Process(pid)
        return [main, *main.children(recursive=True)]
    except psutil.NoSuchProcess as error:
        raise BenchError("the server is gone") from error


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, its threads and its children, the ended ones too (steps of 10 ms).

    Call it when no child is just ending: a child's time moves to its parent when the parent notices the end.
    """
    total = 0.0
    for process in family(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
