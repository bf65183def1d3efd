"""The end of the daemon, as those see it who wait for an answer."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

import nbdthin
from nbdthin.control import commands
from nbdthin.control.client import connect_async
from nbdthin.control.server import ControlServer
from nbdthin.lag import Lag
from nbdthin.pool.files import Files
from nbdthin.pool.live import LivePool
from nbdthin.pool.pool import Pool
from nbdthin.server import Server
from nbdthin.units import MiB
from tests.clients.daemon import PATIENCE, Daemon, nbdthin_command, running
from tests.rawclient import Client


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """With something to scrub."""
    with running(tmp_path) as daemon:
        daemon.create("v", "8 MiB")
        client = Client(daemon.socket, "v")
        assert client.write(0, b"x" * 4 * MiB) == 0
        client.close()
        daemon.snapshot("v", "s")
        yield daemon


def started(daemon: Daemon, *arguments: str) -> subprocess.Popen[str]:
    """A verb that has said its first line: it is under way."""
    command = nbdthin_command("--json", "--socket", daemon.control, *arguments)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("arguments", "behind"),
    [(["events"], ""), (["scrub", "--rate", "2M"], "; the scrub had come to [1-3] MiB of 4 MiB")],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stream_ends_with_one_line_when_the_daemon_does(
    daemon: Daemon, number: signal.Signals, arguments: list[str], behind: str
) -> None:
    with started(daemon, *arguments) as verb:
        daemon.signal(number)
        _, errors = verb.communicate(timeout=PATIENCE)
        said = "the daemon stops" if number == signal.SIGTERM else f"the daemon at {daemon.control} has ended"
        assert re.fullmatch(f"nbdthin: {said}{behind}\n", errors)
        assert verb.returncode == 1
    assert daemon.wait() in (0, -number)


@pytest.mark.parametrize("arguments", [["events"], ["scrub", "--rate", "2M"]])
def test_ctrl_c_ends_a_stream_without_a_word(daemon: Daemon, arguments: list[str]) -> None:
    with started(daemon, *arguments) as verb:
        verb.send_signal(signal.SIGINT)
        assert verb.communicate(timeout=PATIENCE)[1] == ""
        assert verb.returncode == 128 + signal.SIGINT


def test_a_stream_into_a_closed_pipe_ends_without_a_word(daemon: Daemon) -> None:
    with started(daemon, "events") as verb:
        assert verb.stdout is not None and verb.stderr is not None
        verb.stdout.close()
        with daemon.connect() as pool:
            pool.extend("200 GiB")
        assert verb.stderr.read() == ""
        assert verb.wait(PATIENCE) == 128 + signal.SIGPIPE


def test_the_python_client_is_told_that_the_daemon_stops(daemon: Daemon) -> None:
    with daemon.connect() as pool:
        events = pool.events()
        assert next(events).kind == "listening"
        daemon.stop()
        with pytest.raises(nbdthin.Unreachable, match=r"^the daemon stops$"):
            list(events)


class SlowFiles(Files):
    """Syncs wait, once they are told to."""

    def __init__(self) -> None:
        self.may_sync = threading.Event()
        self.may_sync.set()

    def sync(self, fd: int) -> None:
        self.may_sync.wait()
        super().sync(fd)


def test_whoever_waits_for_a_commit_that_comes_too_late_is_told_what_is_not_known(tmp_path: Path) -> None:
    Pool.init(tmp_path / "pool", size="16M")
    files = SlowFiles()

    async def main() -> None:
        live = LivePool(Pool.open(tmp_path / "pool", autocommit=False, files=files))
        control = ControlServer(commands.Daemon(live, Server(live), (), tmp_path / "sock", Lag()))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "sock"))
            await control.listen(listening)
            async with await connect_async(tmp_path / "sock") as pool, await connect_async(tmp_path / "sock") as idle:
                await idle.list()
                files.may_sync.clear()
                creating = asyncio.ensure_future(pool.create("v", "1M"))
                while "v" not in live.pool.state.names:  # noqa: ASYNC110 - carried out by another task
                    await asyncio.sleep(0.01)
                await control.close(0.1)
                with pytest.raises(nbdthin.Unreachable, match="the daemon stops; whether this was carried out is not"):
                    await creating
                with pytest.raises(nbdthin.Unreachable, match=r"has ended$"):
                    await idle.list()
        files.may_sync.set()
        await live.close()

    uvloop.run(main())
