"""The kernel's own nbd driver, in a guest of tools/vm: the client that volumes are made for."""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from nbdthin.pool.records import lasting_name
from nbdthin.units import MiB
from tests.clients import libnbd
from tests.clients.daemon import Daemon, nbdthin_command, run, supervised
from tests.conftest import need

HERE = Path(__file__).parent
RUN = HERE.parents[1] / "tools/vm/run.sh"
PROGRAMS = (
    "qemu-system-x86_64",
    "busybox",
    "gcc",
    "nbd-client",
    "cpio",
    "modprobe",
    "unxz",
    "mkfs.ext4",
    "mkfs.xfs",
    "dmsetup",
)

pytestmark = [pytest.mark.guest, pytest.mark.slow]


def run_guest(
    daemon: Daemon,
    script: Path,
    hook: list[str] | None = None,
    *,
    disks: Sequence[Path] = (),
    python: bool = False,
    **variables: str | int,
) -> str:
    """Run a guest script against a daemon; its `host WORDS` are words for `hook`, or verbs of nbdthin.

    With `python`, the guest has nbdthin too.

    Returns the console.
    """
    for program in PROGRAMS:
        need(program)
    hook = hook or nbdthin_command("--socket", daemon.control)
    options = [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]
    options += [part for disk in disks for part in ("--disk", str(disk))]
    if python:
        options += ["--python", sys.executable]
    command = [str(RUN), "--hook", shlex.join(hook), *options, str(daemon.port), str(script)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as guest:
        try:
            console = guest.communicate()[0].decode(errors="replace")
        finally:
            guest.terminate()  # nothing to do unless this test was interrupted: run.sh then ends QEMU
    assert guest.returncode == 0, f"status {guest.returncode}\n{console}"
    return console


@pytest.mark.parametrize(("kind", "block_size"), [("ext4", 512), ("xfs", 4096)])
def test_the_kernel_formats_mounts_trims_and_checks_a_volume_its_snapshot_and_its_clone(
    kind: str, block_size: int, daemon: Daemon
) -> None:
    daemon.create("disk", "1 GiB")
    console = run_guest(daemon, HERE / "guest/disk.sh", KIND=kind, BLOCK_SIZE=block_size)
    assert "127.0.0.1" in console.split("@@ HOST rm disk:")[1].splitlines()[0], "who holds the disk"
    full, trimmed = (int(used) for used in re.findall(r'"data_used": (\d+)', console))
    assert full - trimmed >= 45 * MiB
    with daemon.connect() as control:
        rows = {row.name: row for row in control.list()}
    assert rows["clone"].parent == rows["disk"].parent == "disk@load"
    assert not any(row.connections for row in rows.values())
    with libnbd.connected(daemon.uri("clone")) as handle:
        assert handle.pread(4096, 0) != bytes(4096)


# What the guest's `host WORDS` runs here to have this process do something.
ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as asking:
    asking.connect(sys.argv[1])
    asking.sendall(" ".join(sys.argv[2:]).encode())
    asking.shutdown(socket.SHUT_WR)
    sys.exit(asking.recv(1000).decode() or 0)
"""


@contextlib.contextmanager
def answering(directory: Path, answer: Callable[[str], None]) -> Iterator[list[str]]:
    """A hook command whose words `answer` is called with, in a thread. It has no spaces, as run.sh wants it."""
    program, path = directory / "ask.py", directory / "ask.sock"
    program.write_text(ASK)
    hook = [sys.executable, str(program), str(path)]
    with socket.socket(socket.AF_UNIX) as listening, ThreadPoolExecutor(1) as thread:
        listening.bind(str(path))
        listening.listen()
        serving = thread.submit(_serve, listening, answer)
        try:
            yield hook
        finally:
            subprocess.run(hook)  # no words: it is over
            serving.result()


def _serve(listening: socket.socket, answer: Callable[[str], None]) -> None:
    while True:
        connected, _ = listening.accept()
        with connected, connected.makefile() as words:
            asked = words.read()
            if not asked:
                return
            try:
                answer(asked)
            except Exception as error:  # the guest fails, and with it the test
                connected.sendall(repr(error).encode())


def restart(daemon: Daemon, ending: str) -> None:
    daemon.end(signal.Signals[ending])
    daemon.start()


@pytest.mark.parametrize("connections", [1, 4])
def test_a_mounted_busy_ext4_rides_through_restarts(connections: int, tmp_path: Path) -> None:
    with supervised(tmp_path) as daemon:
        daemon.start()
        daemon.create("disk", "256 MiB")
        with answering(tmp_path, partial(restart, daemon)) as hook:
            console = run_guest(daemon, HERE / "guest/restart.sh", hook, CONNECTIONS=connections)
    assert console.count("a new one was taken") >= 6, console


def verbs(daemon: Daemon) -> Callable[[str], None]:
    """What the guest asks for: a signal's name restarts the daemon, all else is a verb of nbdthin."""

    def answer(words: str) -> None:
        if words.startswith("SIG"):
            restart(daemon, words)
        else:
            run(*nbdthin_command("--socket", daemon.control, *words.split()))

    return answer


def test_a_device_stays_what_it_is_though_its_volume_is_removed_and_the_name_used_again(tmp_path: Path) -> None:
    with supervised(tmp_path) as daemon:
        daemon.start()
        daemon.create("disk", "256 MiB")
        with daemon.connect() as control:
            lasting = lasting_name("disk", control.show("disk").created)
        with answering(tmp_path, verbs(daemon)) as hook:
            run_guest(daemon, HERE / "guest/removed.sh", hook, python=True, LASTING=lasting)
        with daemon.connect() as control:
            assert [(row.name, row.size, row.referenced) for row in control.list()] == [("disk", 512 * MiB, 0)]


def test_attach_by_netlink_rides_through_restarts_and_growth_and_mends_what_died(tmp_path: Path) -> None:
    with supervised(tmp_path) as daemon:
        daemon.start()
        daemon.create("disk", "256 MiB")
        with answering(tmp_path, verbs(daemon)) as hook:
            console = run_guest(daemon, HERE / "guest/devices.sh", hook, python=True)
        assert console.count("undone: disk") == 2
